//! Rows that are decoded and wait to be handed over, table by table.

use super::Streamed;
use crate::relay::core::window_bytes;

/// Enough to hand over, in rows and in bytes.
const BATCH_ROWS: usize = 512;
const BATCH_BYTES: usize = 256 << 10;

/// Rows of one table that may be handed over.
#[derive(Debug)]
pub struct Ready {
    pub table: usize,
    pub rows: Vec<Streamed>,
    pub bytes: usize,
}

/// Those of all tables.
#[derive(Debug)]
pub struct Decoded {
    tables: Vec<Ready>,
    rows: usize,
    bytes: usize,
}

impl Decoded {
    pub fn of(tables: usize) -> Decoded {
        let tables = (0..tables).map(|table| Ready { table, rows: Vec::new(), bytes: 0 }).collect();
        Decoded { tables, rows: 0, bytes: 0 }
    }

    pub fn push(&mut self, table: usize, row: Streamed) {
        let (ready, bytes) = (&mut self.tables[table], row.event.as_ref().map_or(0, window_bytes));
        ready.rows.push(row);
        ready.bytes += bytes;
        self.rows += 1;
        self.bytes += bytes;
    }

    /// Whether it is time to hand over what there is.
    pub fn is_full(&self) -> bool {
        self.rows >= BATCH_ROWS || self.bytes >= BATCH_BYTES
    }

    /// What came since the last time.
    pub fn take(&mut self) -> Vec<Ready> {
        (self.rows, self.bytes) = (0, 0);
        let with_rows = self.tables.iter_mut().filter(|ready| !ready.rows.is_empty());
        with_rows
            .map(|ready| Ready {
                table: ready.table,
                rows: std::mem::take(&mut ready.rows),
                bytes: std::mem::take(&mut ready.bytes),
            })
            .collect()
    }
}
