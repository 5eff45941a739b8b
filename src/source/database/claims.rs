//! No table is relayed under two names.

use std::{
    collections::HashMap,
    sync::{Arc, Mutex, OnceLock, PoisonError, Weak},
};

use super::{Error, TableSpec, place::Placed};
use crate::doctor::Fix;

/// Which tables are relayed, by what the catalogue knows them by. A table goes with all that have a part in it.
#[derive(Clone, Debug, Default)]
pub(super) struct Claims(Arc<Mutex<HashMap<String, Claim>>>);

/// The name that it goes by, and what is there for as long as it does.
type Claim = (String, Weak<OnceLock<Placed>>);

impl Claims {
    /// Refuses a table that is relayed by another name.
    pub fn claim(&self, table: String, spec: &TableSpec) -> Result<(), Error> {
        let mut claims = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        claims.retain(|_, (_, placing)| placing.strong_count() > 0);
        match claims.get(&table) {
            Some((name, _)) if *name != spec.name => Err(Error::Refused {
                says: format!(
                    "table {} is table {name}, which is relayed already: each event would be published twice",
                    spec.name
                ),
                fix: Fix::Config("tables: (with one of the two names only)".into()),
            }),
            _ => {
                claims.insert(table, (spec.name.clone(), Arc::downgrade(&spec.placing.0)));
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Placing, place::tests::spec},
        *,
    };
    use crate::config::AfterPublish;

    #[test]
    fn a_table_of_two_names_is_refused_until_the_first_is_gone() {
        let claims = Claims::default();
        let first = spec("seq", AfterPublish::Delete);
        let second = TableSpec { name: "app.outbox".into(), placing: Placing::default(), ..first.clone() };
        claims.claim("1".into(), &first).unwrap();
        claims.claim("1".into(), &first.clone()).unwrap();
        claims.claim("2".into(), &second).unwrap();
        let error = claims.claim("1".into(), &second).unwrap_err().to_string();
        assert!(error.contains("table app.outbox is table outbox"), "{error}");
        drop(first);
        claims.claim("1".into(), &second).unwrap();
    }
}
