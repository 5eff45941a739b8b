//! The ways from a log to its tables, with room for rows that are on them.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};

use super::{Batch, Ready};

/// Room of one reading, in KiB: beyond it nothing is decoded. A batch that is larger travels alone.
const ROOM_KIB: u32 = 1024;

#[derive(Debug)]
pub struct Outlets {
    tables: Vec<mpsc::Sender<Batch>>,
    room: Arc<Semaphore>,
}

impl Default for Outlets {
    fn default() -> Outlets {
        Outlets { tables: Vec::new(), room: Arc::new(Semaphore::new(ROOM_KIB as usize)) }
    }
}

/// A place in a table's queue, and room for what goes there.
#[derive(Debug)]
pub struct Reserved {
    place: mpsc::OwnedPermit<Batch>,
    room: OwnedSemaphorePermit,
}

impl Outlets {
    /// One more table's, whose end this is.
    pub fn open(&mut self) -> mpsc::Receiver<Batch> {
        let (outlet, batches) = mpsc::channel(2);
        self.tables.push(outlet);
        batches
    }

    /// For so many bytes to this table. `None`: the table has left, and its rows are where they were.
    pub async fn reserve(&self, next: Option<(usize, usize)>) -> Option<Reserved> {
        let (table, bytes) = next?;
        let outlet = self.tables.get(table)?;
        let kib = u32::try_from(bytes / 1024).unwrap_or(u32::MAX).clamp(1, ROOM_KIB);
        let room = self.room.clone().acquire_many_owned(kib).await.ok()?;
        let place = outlet.clone().reserve_owned().await.ok()?;
        Some(Reserved { place, room })
    }
}

impl Reserved {
    pub fn send(self, ready: Ready) {
        self.place.send(Batch { rows: ready.rows.into(), room: self.room });
    }
}
