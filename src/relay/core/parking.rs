//! Keys that stop: the event that can never be published, and all that follow it.

use tracing::error;

use super::{Core, Table, event_id};
use crate::{
    event::{Event, TableIx},
    relay::lanes::Waiting,
    sink::{Kind, Ticket},
    source::{Hold, RouteKey},
};

pub(super) const BEHIND: &str = "an earlier event of its key is parked";

/// Topic and key, as the relay's own table has them: an empty topic where there is none.
fn route_key(rules: &Table, event: &Event) -> RouteKey {
    match rules.rules.route(&event.row) {
        Ok(route) => (route.topic.into_owned(), route.key.map(|key| key.into_owned())),
        Err(_) => (String::new(), None),
    }
}

impl Core {
    /// Parks an event's key: the event and all that waits behind it are held.
    pub(super) fn reject(
        &mut self,
        ticket: Ticket,
        rules: &Table,
        event: &Event,
        reason: String,
        attempts: u32,
    ) {
        let Some(entry) = self.ledger.get(ticket) else { return };
        let (table, lane) = (entry.table, entry.lane);
        self.metrics.publish_failures(&rules.name, Kind::Rejected.label()).inc();
        error!(
            table = rules.name.as_str(), place = %event.place, id = event_id(rules, event), reason,
            "event can never be published as it is: its key is parked and the rest flows on"
        );
        self.suspects.remove(&(table, event.place.clone()));
        self.progress[table.0 as usize].last_error =
            Some(format!("{} {} parked: {reason}", rules.name, event.place));
        if lane.is_some() {
            self.progress[table.0 as usize].parked.insert(route_key(rules, event));
        }
        self.hold(ticket, rules, event, "rejected", reason, attempts);
        for Waiting { ticket, event } in self.lanes.park(lane) {
            self.hold(ticket, rules, &event, "behind", BEHIND.into(), 0);
        }
        self.count_parked(table);
    }

    pub(super) fn hold(
        &mut self,
        ticket: Ticket,
        rules: &Table,
        event: &Event,
        cause: &'static str,
        reason: String,
        attempts: u32,
    ) {
        let Some(entry) = self.ledger.get(ticket) else { return };
        let table = entry.table;
        let (topic, key) = route_key(rules, event);
        self.holding += 1;
        self.progress[table.0 as usize].holds.push(Hold {
            ticket,
            place: event.place.clone(),
            event_id: event_id(rules, event).to_owned(),
            topic,
            key,
            cause,
            reason,
            attempts,
        });
    }

    pub(super) fn count_parked(&self, table: TableIx) {
        let progress = &self.progress[table.0 as usize];
        self.metrics.parked(&self.tables[table.0 as usize].name, progress.parked.len(), progress.held_events);
    }

    pub(super) fn halt_if_too_much_is_held(&mut self, table: TableIx) {
        let (rules, progress) = (&self.tables[table.0 as usize], &mut self.progress[table.0 as usize]);
        if progress.held_events > rules.max_held && !progress.halted {
            error!(
                table = rules.name.as_str(),
                held = progress.held_events,
                max = rules.max_held,
                "more events are held than hold.max_events allows: the table halts. Mend and \
                 release the parked keys, or raise the limit"
            );
            progress.halted = true;
            self.effects.halt.push(table);
        }
    }
}
