//! Tables that stop and start anew while everything else goes on, as at a reload.

use super::{World, table::Stage};
use crate::{
    config::Order,
    event::TableIx,
    relay::{
        core::{self, Action},
        retry::GiveUp,
        window::Room,
    },
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

/// Its source told its gates before it heard that the table is to stop.
#[test]
fn a_table_that_stops_is_not_opened_again() {
    let mut world = World::new(1, &[Order::Key], GiveUp::default());
    world.faults = false;
    world.insert(1);
    world.tables[0].turn(&world.window, 10, &world.broker);
    assert!(matches!(world.tables[0].yields.back(), Some(Yield::Gates { .. })));
    world.reload(0);
    while let Some(yielded) = world.tables[0].yields.pop_front() {
        world.heard(0, yielded);
    }
    // Whatever it hands over now is for whoever reads the table next.
    let events = vec![world.tables[0].event(0)];
    assert!(world.window.claim(1, core::window_bytes(&events[0])));
    world.heard(0, Yield::Events { generation: world.core.generation(), events });
    assert_eq!((world.core.open(), world.window.used()), (0, Room::default()));
    assert!(world.core.is_drained_of(TableIx(0)));
    world.settle(1);
    assert_eq!(world.reloads, 1);
}
