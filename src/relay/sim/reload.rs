//! Tables that stop and start anew while everything else goes on, as at a reload.

use super::{World, table::Stage};
use crate::{
    event::TableIx,
    relay::core::Action,
    source::{Command, Yield},
};

impl World {
    /// A table is to stop, or has had its time to.
    pub(super) fn reload(&mut self, number: usize) {
        let table = TableIx(number as u16);
        match self.tables[number].stage {
            Stage::Runs => {
                self.tell(table, Command::Stop);
                self.tables[number].stage = Stage::Stops;
                self.apply(Action::Retire(table));
            }
            Stage::Stops if self.faults && self.random.u32(0..20) == 0 => {
                self.apply(Action::WaitNoLonger(table));
            }
            Stage::Stops | Stage::Ended => {}
        }
    }

    /// Sources whose channel the relay closes finish, and end.
    pub(super) fn let_go(&mut self) {
        for (number, table) in self.tables.iter_mut().enumerate() {
            if table.stage == Stage::Stops && self.core.is_drained_of(TableIx(number as u16)) {
                table.finish(&self.broker);
            }
        }
    }

    /// The relay has heard the last of a source: the table starts anew at its place.
    pub(super) fn heard(&mut self, number: usize, yielded: Yield) {
        let ended = matches!(yielded, Yield::Ended);
        let table = TableIx(number as u16);
        self.apply(Action::FromSource(table, yielded));
        if ended {
            assert_eq!(self.core.in_flight(table), 0);
            self.core.add(table, self.rules[number].clone());
            self.tables[number].start(self.core.generation());
            self.reloads += 1;
        }
    }
}
