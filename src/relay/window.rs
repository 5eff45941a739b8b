//! How much may be in flight, in events and in bytes: claimed by a source before it hands events
//! over, released when they are settled. This is what bounds the relay's memory.
//!
//! A source that found it full waits until there is room that is worth it: handed over one by one, events
//! cost more than they need.

use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicBool, Ordering},
};

use tokio::sync::Notify;

/// A quarter of the bytes is room that is worth it.
const WORTH: usize = 4;

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
    worth_it: Notify,
}

impl Window {
    pub fn new(limit: Room) -> Arc<Window> {
        Arc::new(Window {
            limit,
            used: Mutex::default(),
            short: AtomicBool::new(false),
            freed: Notify::new(),
            worth_it: Notify::new(),
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

    /// Whether there is room that is worth handing over for.
    pub fn is_worth_it(&self) -> bool {
        self.is_worth(self.used())
    }

    fn is_worth(&self, used: Room) -> bool {
        used.events == 0 || self.limit.bytes.saturating_sub(used.bytes) >= self.limit.bytes / WORTH
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
        let is_worth_it = self.is_worth(*used);
        drop(used);
        for waited_for in [Some(&self.freed), is_worth_it.then_some(&self.worth_it)].into_iter().flatten() {
            waited_for.notify_waiters();
            waited_for.notify_one();
        }
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

    /// The same, until there is room that is worth it.
    pub async fn worth_it(&self) {
        self.worth_it.notified().await;
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    #[test]
    fn who_waits_for_a_good_part_is_woken_for_no_less() {
        let window = Window::new(Room { events: 100, bytes: 100 });
        let any = || window.freed().now_or_never().is_some();
        let worth_it = || window.worth_it().now_or_never().is_some();
        assert!(window.claim(50, 100) && !window.claim(1, 1));
        window.release(24, 24);
        assert!(any() && !worth_it() && !window.is_worth_it());
        window.release(1, 1);
        assert!(worth_it() && window.is_worth_it());
        assert!(window.claim(1, 20) && !window.is_worth_it());
        window.release(26, 90);
        assert!(window.is_worth_it(), "empty");
    }

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
