//! Following the log: rows come from it instead of from reads of the table.
//!
//! The table stays the truth. Whenever the log begins to be read, and after everything that has the table
//! read again (a new generation, a release, a pause), the table is polled until nothing is left; then:
//!
//! 1. note a moment, and read the table once more, whole: everything that the moment sees is handed over
//!    by now, held, or recorded;
//! 2. follow the log: drop what the moment sees, and what was read after it; everything else is new.
//!
//! So nothing is lost and nothing overtakes, whatever the log has missed. What the log brings while the
//! table is polled is dropped as soon as a moment sees it, because polling does too; it counts as settled
//! when everything that polling had found by the end of step 1 is.
//!
//! The way to step 1, and back to the table, is in `closing`; step 2 in `streaming`; and in `sight` what of the log the
//! database shows yet.

mod closing;
mod sight;
mod streaming;

use std::{collections::HashSet, sync::Arc, time::Duration};

use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};

use super::{LogEnd, Task};
use crate::{
    event::Place,
    source::log::{Acks, At, Batch, Incoming, Line, Moment},
};

pub(super) struct Following {
    lines: mpsc::UnboundedReceiver<Line>,
    /// Whether the table is polled while there is no log.
    polls: bool,
    /// How often it is polled although the log can be read, and when next.
    sweep: Option<Duration>,
    sweep_at: Instant,
    sweeping: bool,
    /// Only the log has these events: what is polled is what was held and is released.
    only: bool,
    again: Arc<Notify>,
    incoming: Option<Incoming>,
    /// What was taken from the log and not yet handed over in full.
    batch: Option<Batch>,
    phase: Phase,
    acks: Acks,
    /// Where only the log has the events: those that were held before, and may come again. `None` until the
    /// first row has come.
    held: Option<HashSet<Place>>,
    /// The last moment that was noted while polling.
    moment: Option<Moment>,
    /// The last moment that was noted for recording.
    visible: Option<Moment>,
    /// What polling had found at its end and is not recorded: with the last of them, everything that the
    /// log had left to the table is settled.
    found: Option<HashSet<Place>>,
    /// This table cannot be read and has left the log; it comes back when it can.
    left: bool,
}

enum Phase {
    Polling,
    /// Step 1: `read` are rows of reads that began after the moment.
    Closing {
        moment: Moment,
        read: HashSet<Place>,
    },
    /// Step 2.
    Streaming {
        overlap: Option<Overlap>,
    },
}

struct Overlap {
    moment: Moment,
    read: HashSet<Place>,
    /// Nothing of the above is in the log behind this.
    until: Moment,
}

/// What a table hears.
pub(super) enum News {
    Line(Line),
    Batch(Batch),
    /// The log is not read any more; a line will say why.
    End,
}

impl Following {
    pub fn new(end: LogEnd, only: bool) -> Following {
        let LogEnd { lines, polls, sweep, again } = end;
        Following {
            lines,
            polls,
            sweep,
            sweep_at: Instant::now(),
            sweeping: false,
            only,
            again,
            incoming: None,
            batch: None,
            phase: Phase::Polling,
            acks: Acks::default(),
            held: None,
            moment: None,
            visible: None,
            found: None,
            left: false,
        }
    }

    /// Waits for something new. Cancel safe.
    pub async fn news(this: Option<&mut Following>) -> News {
        let Some(this) = this else { return std::future::pending().await };
        // One batch at a time: it holds the room of the next ones.
        let waits = this.batch.is_none();
        tokio::select! {
            biased;
            Some(line) = this.lines.recv() => News::Line(line),
            batch = receive(this.incoming.as_mut()), if waits => batch.map_or(News::End, News::Batch),
            else => std::future::pending().await,
        }
    }

    fn is_streaming(&self) -> bool {
        matches!(self.phase, Phase::Streaming { .. })
    }

    /// A row was recorded, or its hold was.
    fn settled(&mut self, place: &Place, number: Option<u64>) {
        if let Some(number) = number {
            self.acks.settle(number);
        }
        if let Some(found) = &mut self.found {
            found.remove(place);
        }
    }

    /// Tells the log how far its rows are settled.
    fn tell(&mut self) {
        if self.found.as_ref().is_some_and(HashSet::is_empty) {
            self.found = None;
            self.acks.settle_deferred();
        }
        if let Some(incoming) = &self.incoming {
            incoming.progress.settle(self.acks.settled());
        }
    }

    /// Whether a row of the log is one that polling has found.
    fn is_old(&mut self, at: &At, place: &Place) -> bool {
        let Phase::Streaming { overlap: past } = &mut self.phase else { return false };
        let Some(overlap) = past else { return false };
        if overlap.until.is_behind(at) {
            *past = None;
            return false;
        }
        overlap.moment.sees(at) || overlap.read.contains(place)
    }
}

async fn receive(incoming: Option<&mut Incoming>) -> Option<Batch> {
    match incoming {
        Some(incoming) => incoming.batches.recv().await,
        None => std::future::pending().await,
    }
}

impl Task {
    pub(super) fn is_streaming(&self) -> bool {
        self.log.as_ref().is_some_and(Following::is_streaming)
    }

    /// Whether the table may be read now.
    pub(super) fn may_poll(&self) -> bool {
        self.log.as_ref().is_none_or(|log| log.polls || log.only || log.incoming.is_some())
    }

    /// Whether the log can be read, where the table cannot do without.
    pub(super) fn has_its_log(&self) -> bool {
        self.log.as_ref().is_none_or(|log| log.polls || log.incoming.is_some())
    }

    /// Has the log store soon how far it is settled.
    pub(super) fn await_store(&self) {
        if let Some(incoming) = self.log.as_ref().and_then(|log| log.incoming.as_ref()) {
            incoming.progress.await_store();
        }
    }

    /// Whether a pause of the whole table stops its reading. Where only the log has the events they are
    /// held instead, one by one: the log is not to grow for it.
    pub(super) fn stops_for_a_pause(&self) -> bool {
        self.log.as_ref().is_none_or(|log| !log.only)
    }

    pub(super) fn hear(&mut self, news: News) {
        match news {
            News::Line(Line::Up(incoming)) => {
                self.leave_the_log();
                let Some(log) = &mut self.log else { return };
                (log.incoming, log.acks, log.left) = (Some(incoming), Acks::default(), false);
                if !log.only {
                    self.say("poll", "the log is read, and what is left in the table is polled first");
                }
                self.source.board.lost(self.feed.table, false);
                self.source.board.table_works(self.feed.table);
            }
            News::Line(Line::Down { why, lost }) => {
                self.leave_the_log();
                let Some(log) = &self.log else { return };
                if log.polls {
                    return self.say("poll", &why);
                }
                self.say("stream", &why);
                if log.only && lost {
                    self.source.board.lost(self.feed.table, true);
                }
                self.source.board.table_failed(self.feed.table, &why);
            }
            News::Batch(batch) => {
                if let Some(log) = &mut self.log {
                    log.batch = Some(batch);
                }
            }
            News::End => self.leave_the_log(),
        }
    }

    pub(super) fn hear_all(&mut self) {
        while let Some(line) = self.log.as_mut().and_then(|log| log.lines.try_recv().ok()) {
            self.hear(News::Line(line));
        }
    }

    fn say(&self, mode: &'static str, why: &str) {
        self.source.board.capture(self.feed.table, mode, why);
        self.source.metrics.capture(&self.source.spec.name, mode);
    }

    /// Polls the table, although the log could be read.
    pub(super) fn leave_for_the_table(&mut self, why: &str) {
        self.back_to_the_table();
        self.say("poll", why);
    }

    fn leave_the_log(&mut self) {
        self.back_to_the_table();
        if let Some(log) = &mut self.log {
            (log.incoming, log.batch, log.held, log.sweeping) = (None, None, None, false);
            // The next server may be another: what an old moment saw on this one may not be there.
            (log.moment, log.visible) = (None, None);
            for known in self.state.known.in_log() {
                // Their numbers were those of this reading.
                known.number = None;
                // A binlog that begins anew may never come to that place again.
                known.at.take_if(|at| matches!(at, At::Binlog(_)));
            }
        }
    }

    /// What was handed over is to be read again, and only the log has it.
    pub(super) fn read_the_log_again(&mut self) {
        if self.log.as_ref().is_some_and(|log| log.only && log.incoming.is_some()) {
            self.leave_the_log();
            if let Some(log) = &self.log {
                log.again.notify_one();
            }
        }
    }

    /// The table cannot be read, so its rows cannot be taken from the log either: the others go on.
    pub(super) fn cannot_follow(&mut self) {
        if self.log.as_ref().is_some_and(|log| log.incoming.is_some()) {
            self.leave_the_log();
            if let Some(log) = &mut self.log {
                log.left = true;
            }
        }
    }

    /// The table can be read: it wants its rows from the log again.
    pub(super) fn can_follow(&mut self) {
        if let Some(log) = &mut self.log
            && std::mem::take(&mut log.left)
        {
            log.again.notify_one();
        }
    }

    /// Rows of these places are recorded or held: they are known no more.
    pub(super) fn forget_known<'a>(&mut self, places: impl IntoIterator<Item = &'a Place> + Clone) {
        self.is_done_with(places.clone());
        for place in places {
            let number = self.state.known.remove(place);
            if let Some(log) = &mut self.log {
                log.settled(place, number);
            }
        }
        if let Some(log) = &mut self.log {
            log.tell();
        }
    }
}
