//! How transactions end, whether that is heard or not, and how a relay becomes the one producer.

use super::World;
use crate::{
    coordinate::Claim,
    relay::{
        core::{Action, End},
        position::Position,
        unit::Takeover,
    },
    source::database::Noted,
};

impl World {
    /// A transaction ends, or its answer is lost.
    pub(super) fn end(&mut self) {
        if let Some((generation, noted)) = self.notes.pop_front() {
            return self.apply(Action::Noted { generation, result: Ok(noted) });
        }
        if self.ends.is_empty() {
            return;
        }
        // By now the relay waits for another one.
        if let Some((generation, result)) = self.belated.pop_front() {
            self.too_late += 1;
            return self.apply(Action::Ended { generation, result });
        }
        // Each is on its own.
        let which = self.random.usize(..self.ends.len());
        let Some((generation, end)) = self.ends.remove(which) else { return };
        let lost = self.faults && self.random.u32(0..3) == 0;
        let done = self.is_done(which, end, lost);
        self.lost += usize::from(lost);
        let result = if lost { Err("no answer".into()) } else { done };
        self.apply(Action::Ended { generation, result });
    }

    /// The broker does what it was told, unless that does not reach it.
    pub(super) fn is_done(&mut self, which: usize, end: End, lost: bool) -> Result<(), String> {
        let ending = self.broker.ended(which);
        let arrives = !lost || self.random.bool();
        match end {
            End::Commit(position) => {
                let overlaps = self.broker.has_written();
                self.overlapped += usize::from(overlaps);
                self.unheard[usize::from(arrives)] += usize::from(overlaps && lost);
                self.committed += usize::from(arrives);
                if arrives {
                    return self.broker.commit(ending, position, &self.tables);
                }
                self.broker.loses_commit();
                Ok(())
            }
            End::Abort => {
                self.dropped += 1;
                Ok(())
            }
        }
    }

    /// What a relay does that becomes the one producer.
    pub(super) fn taken_over(&mut self) -> Takeover {
        let last = Position::decode("unit", &self.broker.positions).unwrap().unwrap_or_default();
        let position = Position {
            unit: "unit".into(),
            counter: last.counter + 1,
            doubts: last.doubts,
            ..Position::default()
        };
        self.broker.positions.extend(position.encode());
        let noted = Noted { counter: position.counter, ..Noted::default() };
        Takeover { claim: Claim::default(), position, noted, was_fenced: false }
    }
}
