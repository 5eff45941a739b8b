//! What the database shows yet of what the log has. The log has a row from when its commit is on the disk, and that
//! may be long before: with a synchronous standby, for as long as that is away.

use std::collections::HashSet;

use super::super::Task;
use crate::{
    event::Place,
    source::{
        database::{Error, answered},
        log::{At, Moment},
    },
};

impl Task {
    /// Those of these places that came from the log: whose transaction can be seen, and whose cannot be seen
    /// yet.
    pub(in crate::source::table) async fn by_sight(
        &self,
        places: &[Place],
    ) -> Result<(Vec<Place>, HashSet<Place>), Error> {
        let of_log = places.iter().filter_map(|place| Some((place, self.state.known.at(place)?)));
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
    pub(in crate::source::table) async fn hidden(
        &self,
        places: &[Place],
    ) -> Result<(HashSet<Place>, Option<Moment>), Error> {
        let in_binlog = |place: &Place, moment: Option<&Moment>| {
            self.state.known.at(place).is_some_and(|at| {
                matches!(at, At::Binlog(_)) && !moment.is_some_and(|moment| moment.sees(at))
            })
        };
        if !self.source.spec.stays() {
            // Nothing of theirs is changed.
            return Ok((HashSet::new(), None));
        }
        let last = self.log.as_ref().and_then(|log| log.visible.as_ref());
        if !places.iter().any(|place| in_binlog(place, last)) {
            return Ok((HashSet::new(), None));
        }
        let moment = answered("note the moment", self.source.database.moment()).await?;
        let hidden = places.iter().filter(|place| in_binlog(place, Some(&moment))).cloned().collect();
        Ok((hidden, Some(moment)))
    }

    pub(in crate::source::table) fn has_seen(&mut self, moment: Option<Moment>) {
        if let (Some(log), Some(moment)) = (&mut self.log, moment) {
            log.visible = Some(moment);
        }
    }

    /// Exactly once: a row is published when it can be seen, so that what is in doubt can be recorded.
    pub(super) async fn may_publish(&mut self, at: &At) -> Result<bool, Error> {
        let seen = self.log.as_ref().and_then(|log| log.visible.as_ref());
        if !self.source.exactly_once || seen.is_some_and(|moment| moment.sees(at)) {
            return Ok(true);
        }
        let moment = answered("note the moment", self.source.database.moment()).await?;
        let sees = moment.sees(at);
        self.has_seen(Some(moment));
        Ok(sees)
    }
}
