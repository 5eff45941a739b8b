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

use std::{
    collections::{HashMap, HashSet},
    sync::Arc,
    time::Duration,
};

use tokio::{
    sync::{Notify, mpsc},
    time::Instant,
};
use tracing::{info, warn};

use super::{LogEnd, Next, Task};
use crate::{
    event::{Event, Place},
    relay::core::window_bytes,
    source::{
        Yield,
        database::{Error, Reach, answered},
        log::{Acks, At, Batch, Incoming, Line, Moment, Streamed},
    },
};

/// More rows than this read in step 1 are no end: the table is polled on.
const LAST_ROWS_AT_MOST: usize = 50_000;
/// When a row is looked at again that cannot be seen yet.
const UNSEEN_AGAIN_AFTER: Duration = Duration::from_millis(2);

/// Rows that were handed over and are not recorded.
pub(super) type Known = HashMap<Place, InLog>;

/// Where a row is in the log, if it came from there.
#[derive(Clone, Debug, Default)]
pub(super) struct InLog {
    /// Its number in this reading.
    number: Option<u64>,
    /// Its transaction, which may not be seen yet.
    at: Option<At>,
}

impl InLog {
    pub(super) fn xid(&self) -> Option<u32> {
        self.at.as_ref().and_then(At::xid)
    }
}

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
                self.source.board.table_ready(self.feed.table);
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
            for known in self.state.known.values_mut() {
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

    /// Reads the table from its head, before anything more is taken from the log.
    pub(super) fn back_to_the_table(&mut self) {
        let Some(log) = &mut self.log else { return };
        if !matches!(log.phase, Phase::Polling) {
            log.phase = Phase::Polling;
            self.state.read_from_head(self.outbox.as_deref());
            self.next_read = Instant::now();
            self.interval = self.source.poll.min_interval;
        }
        if log.only {
            return;
        }
        log.acks.defer_all();
        log.found = None;
        self.state.known.values_mut().for_each(|known| known.number = None);
    }

    /// Drops what the log brings and polling finds, while the table is polled or stopped.
    pub(super) async fn skim(&mut self, stopped: bool) -> Result<(), Error> {
        let Some(log) = &mut self.log else { return Ok(()) };
        let Some(incoming) = log.incoming.as_mut().filter(|_| !log.only) else { return Ok(()) };
        'batches: loop {
            if log.batch.as_ref().is_none_or(|batch| batch.rows.is_empty()) {
                // Its room is free for the next one.
                log.batch = None;
                log.batch = incoming.batches.try_recv().ok();
            }
            let Some(batch) = &mut log.batch else { break };
            while let Some(row) = batch.rows.front() {
                if !log.moment.as_ref().is_some_and(|moment| moment.sees(&row.at)) {
                    let moment = answered("note the moment", self.source.database.moment()).await?;
                    let sees = moment.sees(&row.at);
                    log.moment = Some(moment);
                    if !sees {
                        // It has committed, and cannot be seen yet.
                        break 'batches;
                    }
                }
                batch.rows.pop_front();
                log.acks.defer_next();
            }
        }
        // What is stopped stays in the table, and is not waited for: that it is stopped is written down.
        if stopped && self.state.known.is_empty() {
            log.acks.settle_deferred();
        }
        log.tell();
        Ok(())
    }

    /// A read has come to the end of the table.
    pub(super) async fn end_of_table(&mut self) -> Result<(), Error> {
        let Some(log) = &mut self.log else { return Ok(()) };
        let Some(incoming) = &log.incoming else { return Ok(()) };
        match &mut log.phase {
            Phase::Polling if log.only => {
                log.phase = Phase::Streaming { overlap: None };
                self.say("stream", "the log is read");
            }
            Phase::Polling if incoming.progress.is_current() => {
                let moment = answered("note the moment", self.source.database.moment()).await?;
                log.phase = Phase::Closing { moment, read: HashSet::new() };
                self.next_read = Instant::now();
            }
            Phase::Polling | Phase::Streaming { .. } => {}
            Phase::Closing { moment, read } => {
                let until = answered("note the moment", self.source.database.moment()).await?;
                let overlap = Overlap { moment: moment.clone(), read: std::mem::take(read), until };
                log.phase = Phase::Streaming { overlap: Some(overlap) };
                log.found = Some(self.state.known.keys().cloned().collect());
                log.tell();
                let again = std::mem::take(&mut log.sweeping);
                log.sweep_at = Instant::now() + log.sweep.unwrap_or_default();
                if !again {
                    let table = self.source.spec.name.as_str();
                    info!(table, "nothing is left in the table: the log is followed");
                    self.say("stream", "the log is read");
                }
            }
        }
        Ok(())
    }

    /// Whether this read is one of step 1, which looks at the whole table.
    pub(super) fn is_closing(&self) -> bool {
        matches!(&self.log, Some(Following { phase: Phase::Closing { .. }, .. }))
    }

    /// Rows that polling hands over.
    pub(super) fn polled(&mut self, place: &Place) {
        if let Some(log) = &mut self.log
            && let Phase::Closing { read, .. } = &mut log.phase
        {
            read.insert(place.clone());
            if read.len() > LAST_ROWS_AT_MOST {
                log.phase = Phase::Polling;
            }
        }
    }

    /// Those of these places that came from the log: whose transaction can be seen, and whose cannot be seen
    /// yet. The log has it from when its commit is on the disk, and that may be long before: with a
    /// synchronous standby, for as long as that is away.
    pub(super) async fn by_sight(&self, places: &[Place]) -> Result<(Vec<Place>, HashSet<Place>), Error> {
        let of_log =
            places.iter().filter_map(|place| Some((place, self.state.known.get(place)?.at.as_ref()?)));
        let of_log: Vec<(&Place, &At)> = of_log.collect();
        let (mut seen, mut unseen) = (Vec::new(), HashSet::new());
        if of_log.is_empty() {
            return Ok((seen, unseen));
        }
        let moment = answered("note the moment", self.source.database.moment()).await?;
        for (place, at) in of_log {
            if moment.sees(at) {
                seen.push(place.clone());
            } else {
                unseen.insert(place.clone());
            }
        }
        Ok((seen, unseen))
    }

    /// Those of these places that came from a binlog and cannot be seen yet: to change one of them would wait
    /// for its transaction, holding what others need. And the moment that told, if it is a new one.
    pub(super) async fn hidden(&self, places: &[Place]) -> Result<(HashSet<Place>, Option<Moment>), Error> {
        let in_binlog = |place: &Place, moment: Option<&Moment>| {
            let at = self.state.known.get(place).and_then(|known| known.at.as_ref());
            at.is_some_and(|at| matches!(at, At::Binlog(_)) && !moment.is_some_and(|moment| moment.sees(at)))
        };
        let last = self.log.as_ref().and_then(|log| log.visible.as_ref());
        if !places.iter().any(|place| in_binlog(place, last)) {
            return Ok((HashSet::new(), None));
        }
        let moment = answered("note the moment", self.source.database.moment()).await?;
        let hidden = places.iter().filter(|place| in_binlog(place, Some(&moment))).cloned().collect();
        Ok((hidden, Some(moment)))
    }

    pub(super) fn has_seen(&mut self, moment: Option<Moment>) {
        if let (Some(log), Some(moment)) = (&mut self.log, moment) {
            log.visible = Some(moment);
        }
    }

    /// Rows of these places are recorded or held: they are known no more.
    pub(super) fn forget_known<'a>(&mut self, places: impl IntoIterator<Item = &'a Place> + Clone) {
        self.is_done_with(places.clone());
        for place in places {
            let number = self.state.known.remove(place).and_then(|known| known.number);
            if let Some(log) = &mut self.log {
                log.settled(place, number);
            }
        }
        if let Some(log) = &mut self.log {
            log.tell();
        }
    }

    /// Exactly once: a row is published when it can be seen, so that what is in doubt can be recorded.
    async fn may_publish(&mut self, at: &At) -> Result<bool, Error> {
        let seen = self.log.as_ref().and_then(|log| log.visible.as_ref());
        if !self.source.exactly_once || seen.is_some_and(|moment| moment.sees(at)) {
            return Ok(true);
        }
        let moment = answered("note the moment", self.source.database.moment()).await?;
        let sees = moment.sees(at);
        self.has_seen(Some(moment));
        Ok(sees)
    }

    /// Before the first row of a reading: what the log brings again although it is held.
    async fn look_for_held(&mut self, batch: &Batch) -> Result<(), Error> {
        let Some(log) = self.log.as_mut().filter(|log| log.only && log.held.is_none()) else { return Ok(()) };
        let first = batch.rows.front().and_then(|row| row.event.as_ref());
        if let (Some(first), Some(outbox)) = (first, &self.outbox) {
            let held = answered("look for what is held", outbox.held_from(&first.place)).await?;
            log.held = Some(held.into_iter().collect());
        }
        Ok(())
    }

    /// Hands over one batch of the log.
    pub(super) async fn follow(&mut self, recorded_by: Option<Instant>) -> Result<Next, Error> {
        if self.state.replaying
            && let Some(limits) = self.limits()
        {
            self.read_replays(limits).await?;
        }
        let look_again = self.look_ahead().await?;
        if !self.is_streaming() {
            return Ok(Next::At(Instant::now()));
        }
        let Some(log) = &mut self.log else { return Ok(Next::Told) };
        let next = log.batch.take().or_else(|| log.incoming.as_mut()?.batches.try_recv().ok());
        let Some(mut batch) = next else {
            if log.sweep.is_some() && log.sweep_at <= Instant::now() {
                log.sweeping = true;
                self.back_to_the_table();
                return Ok(Next::At(Instant::now()));
            }
            let sweep = log.sweep.map(|_| log.sweep_at);
            let old_rows = self.source.spec.retention.map(|_| self.expire_at);
            let next = recorded_by.into_iter().chain(old_rows).chain(look_again).chain(sweep).min();
            return Ok(next.map_or(Next::Told, Next::At));
        };
        self.source.metrics.events_read(&self.source.spec.name).inc_by(batch.rows.len() as u64);
        if let Err(error) = self.look_for_held(&batch).await {
            if let Some(log) = &mut self.log {
                log.batch = Some(batch);
            }
            return Err(error);
        }
        let (generation, now) = (self.state.generation, Next::At(Instant::now()));
        let mut ready: Vec<Event> = Vec::with_capacity(batch.rows.len());
        while let Some(Streamed { at, event }) = batch.rows.pop_front() {
            let Some(log) = &mut self.log else { break };
            let Some(event) = event else {
                warn!(
                    table = self.source.spec.name.as_str(),
                    "a row of the log is left to the table, which is polled"
                );
                // It counts as such when it can be seen there, which may not be yet.
                batch.rows.push_front(Streamed { at, event: None });
                log.batch = Some(batch);
                self.send(Yield::Events { generation, events: ready }).await;
                self.back_to_the_table();
                return Ok(now);
            };
            let again = log.held.as_ref().is_some_and(|held| {
                held.contains(&event.place) || self.state.known.contains_key(&event.place)
            });
            if again || log.is_old(&at, &event.place) {
                let number = log.acks.expect();
                match self.state.known.get_mut(&event.place) {
                    Some(known) if known.number.is_none() => known.number = Some(number),
                    _ => log.acks.settle(number),
                }
                continue;
            }
            let sight = self.may_publish(&at).await;
            if !matches!(sight, Ok(true)) {
                batch.rows.push_front(Streamed { at, event: Some(event) });
                if let Some(log) = &mut self.log {
                    log.batch = Some(batch);
                }
                self.send(Yield::Events { generation, events: ready }).await;
                return sight.map(|_| Next::At(Instant::now() + UNSEEN_AGAIN_AFTER));
            }
            let bytes = window_bytes(&event);
            if !self.source.window.claim(1, bytes) {
                self.send(Yield::Events { generation, events: std::mem::take(&mut ready) }).await;
                let claimed = self.claim(bytes).await;
                if !matches!(claimed, Ok(true)) {
                    batch.rows.push_front(Streamed { at, event: Some(event) });
                    if let Some(log) = &mut self.log {
                        log.batch = Some(batch);
                    }
                    return claimed.map(|_| now);
                }
            }
            let Some(log) = &mut self.log else { break };
            let number = log.acks.expect();
            if let Some(kept) = &mut self.state.kept {
                kept.take(&event.place, at.xid());
            }
            let known = InLog { number: Some(number), at: Some(at) };
            let before = self.state.known.insert(event.place.clone(), known);
            if let Some(before) = before.and_then(|known| known.number) {
                // The application used the number again while the first one is on its way.
                log.acks.settle(before);
            }
            ready.push(event);
        }
        // Its room is free before the window may be waited for again.
        drop(batch);
        self.send(Yield::Events { generation, events: ready }).await;
        if let Some(log) = &mut self.log {
            log.tell();
        }
        Ok(now)
    }
}

impl super::State {
    /// Reads begin at the head of the table.
    pub(super) fn read_from_head(&mut self, outbox: Option<&crate::source::database::Outbox>) {
        if let Some(outbox) = outbox {
            self.reach = outbox.has_cursor().then_some(Reach::NOTHING);
        }
        self.horizon = None;
    }
}
