//! What the source remembers of the positions that relays keep in Kafka (`kafka.delivery: exactly_once`): as
//! whom, and how far they had come at least. The statements are those of all dialects; each is a transaction of
//! its own.
//!
//! A row for each slot, and one for the part that is not shared: that one has what all ids begin with, and no position.

/// A delivery unit as its source knows it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Noted {
    /// Its transactional id, made at its first start.
    pub unit: String,
    /// The server that the source was on, where it can be told; empty before the first position.
    pub server: String,
    /// The Kafka cluster and the topic that have its positions; empty before the first one.
    pub cluster: String,
    pub topic: String,
    /// A position that it has had.
    pub counter: i64,
}

/// The unit of a slot of a source.
pub fn unit_id(units: &str, slot: u16) -> String {
    format!("{units}-{slot}")
}

#[derive(Debug)]
pub(super) struct PositionsSql {
    /// `$1`, `$2`: the part, and a new unit's id.
    pub begin: String,
    /// `$1`: the part.
    pub look: String,
    /// `$1` to `$6`: counter, server, cluster, topic, unit and epoch.
    pub note: String,
    /// Units that have a position.
    pub all: String,
    /// The slots that a relay had once.
    pub slots: String,
    /// What an operator does to begin anew.
    pub forget: String,
}

impl PositionsSql {
    /// By the quoted names of the relay's own tables.
    pub fn new(own: &dyn Fn(&str) -> String, or_nothing: &str) -> PositionsSql {
        let (positions, members) = (own("positions"), own("members"));
        PositionsSql {
            begin: format!(
                "INSERT INTO {positions} (part, unit, server, cluster, topic, counter) VALUES ($1, $2, '', '', '', 0) \
                 {or_nothing}"
            ),
            look: format!("SELECT unit, server, cluster, topic, counter FROM {positions} WHERE part = $1"),
            all: format!("SELECT unit, server, cluster, topic, counter FROM {positions} WHERE counter > 0"),
            slots: format!("SELECT part FROM {positions} WHERE part < -1"),
            forget: format!("DELETE FROM {positions}"),
            // The turn has every row changed, which is what is counted.
            note: format!(
                "UPDATE {positions} SET counter = CASE WHEN counter < $1 THEN $1 ELSE counter END, server = $2, cluster = $3, topic = $4, turn = turn + 1 \
                 WHERE unit = $5 AND EXISTS (SELECT 1 FROM {members} m WHERE m.epoch = $6)"
            ),
        }
    }
}

/// What a database does for positions. Where it is used, `sql` is the driver. A type with `pool` and a method
/// `positions_sql`.
macro_rules! position_methods {
    ($database:ty) => {
        impl $database {
            /// What the ids of all units of the source begin with, made the first time.
            pub async fn units(&self) -> Result<String, Error> {
                let new = format!("whippet-{}", uuid::Uuid::new_v4());
                Ok(self.unit_of(Part::Whole, new).await?.unit)
            }

            /// The unit of a slot, which is made the first time.
            pub async fn unit(&self, units: &str, slot: u16) -> Result<Noted, Error> {
                self.unit_of(Part::Slot(slot), unit_id(units, slot)).await
            }

            async fn unit_of(&self, part: Part, new: String) -> Result<Noted, Error> {
                type Row = (String, String, String, String, i64);
                let doing = "look for the delivery unit";
                let statements = self.positions_sql();
                loop {
                    let found: Option<Row> = sql::query_as(AssertSqlSafe(statements.look.as_str()))
                        .bind(part.number())
                        .fetch_optional(&self.pool())
                        .await
                        .map_err(Error::sql(doing))?;
                    if let Some((unit, server, cluster, topic, counter)) = found {
                        return Ok(Noted { unit, server, cluster, topic, counter });
                    }
                    sql::query(AssertSqlSafe(statements.begin.as_str()))
                        .bind(part.number())
                        .bind(new.as_str())
                        .execute(&self.pool())
                        .await
                        .map_err(Error::sql(doing))?;
                }
            }

            /// The units that have a position, and the statement that has them forgotten.
            pub async fn noted(&self) -> Result<(Vec<Noted>, String), Error> {
                type Row = (String, String, String, String, i64);
                let statements = self.positions_sql();
                let rows: Vec<Row> = sql::query_as(AssertSqlSafe(statements.all.as_str()))
                    .fetch_all(&self.pool())
                    .await
                    .map_err(Error::sql("look for the delivery units"))?;
                let noted =
                    |(unit, server, cluster, topic, counter)| Noted { unit, server, cluster, topic, counter };
                Ok((rows.into_iter().map(noted).collect(), statements.forget))
            }

            /// The slots that a relay had once: there may be something in doubt of them.
            pub async fn used_slots(&self) -> Result<Vec<Part>, Error> {
                let numbers: Vec<(i32,)> = sql::query_as(AssertSqlSafe(self.positions_sql().slots.as_str()))
                    .fetch_all(&self.pool())
                    .await
                    .map_err(Error::sql("look for the delivery units"))?;
                Ok(numbers.into_iter().filter_map(|(number,)| Part::of_number(number)).collect())
            }

            /// Notes a position that Kafka has, if the lease is still of this epoch.
            pub async fn note_position(&self, noted: &Noted, epoch: i64) -> Result<(), Error> {
                let done = sql::query(AssertSqlSafe(self.positions_sql().note.as_str()))
                    .bind(noted.counter)
                    .bind(noted.server.as_str())
                    .bind(noted.cluster.as_str())
                    .bind(noted.topic.as_str())
                    .bind(noted.unit.as_str())
                    .bind(epoch)
                    .execute(&self.pool())
                    .await
                    .map_err(Error::sql("note the position"))?;
                if done.rows_affected() == 0 { Err(Error::Fenced(epoch)) } else { Ok(()) }
            }
        }
    };
}
pub(super) use position_methods;
