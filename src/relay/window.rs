//! How much may be in flight, in events and in bytes: claimed by a source before it hands events
//! over, released when they are settled. This is what bounds the relay's memory.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::Notify;

/// Events and bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Room {
    pub events: usize,
    pub bytes: usize,
}

#[derive(Debug)]
pub struct Window {
    limit: Room,
    used: Mutex<Room>,
    /// The last claim found no room.
    short: AtomicBool,
    freed: Notify,
}

impl Window {
    pub fn new(limit: Room) -> Arc<Window> {
        Arc::new(Window {
            limit,
            used: Mutex::default(),
            short: AtomicBool::new(false),
            freed: Notify::new(),
        })
    }

    /// What may still be claimed.
    pub fn room(&self) -> Room {
        let used = self.used();
        Room {
            events: self.limit.events.saturating_sub(used.events),
            bytes: self.limit.bytes.saturating_sub(used.bytes),
        }
    }

    /// What is claimed now.
    pub fn used(&self) -> Room {
        *self.used.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Claims room for events. One larger than the whole window is let in when nothing else is in
    /// flight: it travels alone.
    pub fn claim(&self, events: usize, bytes: usize) -> bool {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        let fits = used.events + events <= self.limit.events && used.bytes + bytes <= self.limit.bytes;
        let taken = fits || *used == Room::default();
        if taken {
            used.events += events;
            used.bytes += bytes;
        }
        self.short.store(!taken, Ordering::Relaxed);
        taken
    }

    /// Whether a source waits for room.
    pub fn is_short(&self) -> bool {
        self.short.load(Ordering::Relaxed)
    }

    pub fn release(&self, events: usize, bytes: usize) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.events = used.events.saturating_sub(events);
        used.bytes = used.bytes.saturating_sub(bytes);
        drop(used);
        self.freed.notify_waiters();
        self.freed.notify_one();
    }

    /// Corrects a claim whose size turned out to be another.
    pub fn adjust(&self, claimed: usize, real: usize) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.bytes = (used.bytes + real).saturating_sub(claimed);
    }

    pub fn limit(&self) -> Room {
        self.limit
    }

    /// Waits until something was released. Cancel safe.
    pub async fn freed(&self) {
        self.freed.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn claims_stop_at_either_limit_and_a_giant_travels_alone() {
        let window = Window::new(Room { events: 3, bytes: 100 });
        assert!(window.claim(2, 60));
        assert!(!window.claim(2, 1), "too many events");
        assert!(!window.claim(1, 41), "too many bytes");
        assert!(window.is_short());
        assert!(window.claim(1, 40));
        assert!(!window.is_short());
        assert_eq!(window.room(), Room { events: 0, bytes: 0 });
        window.release(3, 100);
        assert!(window.claim(1, 1_000), "alone");
        assert!(!window.claim(1, 1), "and nothing beside it");
    }
}
