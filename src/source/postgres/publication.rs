//! The publication: which tables the log has. It must have all of them, with every row and every column that
//! an event is made of; what it leaves out would be missing in Kafka without a word.

use std::time::Duration;

use sqlx::AssertSqlSafe;
use tracing::info;

use super::{
    rows::Known,
    slot::{Obstacle, Slot, sql},
};
use crate::source::database::{Error, TableSpec, answered, ddl, quoted, quoted_table};

/// A table that is to be published.
#[derive(Clone, Debug)]
pub struct Wanted {
    /// Quoted.
    name: String,
    oid: i64,
    /// Those that an event is made of.
    columns: Vec<String>,
}

impl Wanted {
    pub fn new(spec: &TableSpec, oid: u32, known: &[Known]) -> Wanted {
        let has = |column: &&String| known.iter().any(|known| known.name == **column);
        let columns = spec.columns.iter().chain(&spec.timestamps).filter(has).cloned().collect();
        Wanted { name: quoted_table(&spec.name), oid: i64::from(oid), columns }
    }
}

/// What a publication lacks, and the statement that mends it.
pub(super) struct Lack {
    pub why: String,
    pub statement: String,
    /// The relay does not do it by itself.
    pub by_hand: bool,
}

/// What a publication has of a table. Of a row filter and of columns PostgreSQL speaks from 15 on.
struct Published {
    oid: i64,
    filter: Option<String>,
    columns: Option<Vec<String>>,
}

impl Published {
    /// What is missing of this table, and what mends it.
    fn lacks(&self, wanted: &Wanted) -> Option<String> {
        if let Some(filter) = &self.filter {
            return Some(format!("publishes only rows of {} WHERE {filter}", wanted.name));
        }
        let columns = self.columns.as_ref()?;
        let missing: Vec<&str> =
            wanted.columns.iter().filter(|name| !columns.contains(name)).map(String::as_str).collect();
        (!missing.is_empty()).then(|| format!("publishes {} without {}", wanted.name, missing.join(", ")))
    }
}

impl Slot {
    /// Has the tables in the publication.
    pub(super) async fn publish(&self, tables: &[Wanted]) -> Result<(), Obstacle> {
        let Some(Lack { why, statement, by_hand }) = self.lack(tables).await? else { return Ok(()) };
        if by_hand {
            return Err(Obstacle::Setup(format!("{why}. Run as the owner of the tables: {statement}")));
        }
        if !self.settings.create {
            return Err(Obstacle::Setup(format!(
                "{why}, and source.stream.create is false: run as the owner of the tables: {statement}"
            )));
        }
        self.change(&statement).await?;
        info!(publication = self.settings.publication, statement, "publication changed");
        Ok(())
    }

    /// What the publication lacks, if something.
    pub(super) async fn lack(&self, tables: &[Wanted]) -> Result<Option<Lack>, Obstacle> {
        let name = &self.settings.publication;
        let pool = self.database.pool();
        let there: Option<bool> = answered("look for the publication", async {
            sqlx::query_scalar("SELECT pubinsert FROM pg_publication WHERE pubname = $1")
                .bind(name)
                .fetch_optional(&pool)
                .await
                .map_err(sql("look for the publication"))
        })
        .await?;
        if there == Some(false) {
            return Ok(Some(Lack {
                why: format!("publication {name} publishes no inserts"),
                statement: format!("ALTER PUBLICATION {} SET (publish = 'insert')", quoted(name)),
                by_hand: true,
            }));
        }
        let published = self.published().await?;
        let of = |wanted: &Wanted| published.iter().find(|published| published.oid == wanted.oid);
        if let Some((wanted, lacks)) =
            tables.iter().find_map(|wanted| Some((wanted, of(wanted)?.lacks(wanted)?)))
        {
            return Ok(Some(Lack {
                why: format!("publication {name} {lacks}: the log must have every row whole"),
                statement: format!(
                    "ALTER PUBLICATION {name} DROP TABLE {table}; ALTER PUBLICATION {name} ADD TABLE {table}",
                    name = quoted(name),
                    table = wanted.name,
                ),
                by_hand: true,
            }));
        }
        let missing: Vec<String> =
            tables.iter().filter(|wanted| of(wanted).is_none()).map(|wanted| wanted.name.clone()).collect();
        if there.is_some() && missing.is_empty() {
            return Ok(None);
        }
        Ok(Some(match there {
            None => Lack {
                why: format!("publication {name} does not exist"),
                statement: ddl::create_publication(name, &missing),
                by_hand: false,
            },
            Some(_) => Lack {
                why: format!("publication {name} does not have every table"),
                statement: format!("ALTER PUBLICATION {} ADD TABLE {}", quoted(name), missing.join(", ")),
                by_hand: false,
            },
        }))
    }

    /// Whether this role owns the tables, so that it may publish them.
    pub(super) async fn owns(&self, tables: &[Wanted]) -> Result<bool, Error> {
        let oids: Vec<i64> = tables.iter().map(|wanted| wanted.oid).collect();
        answered("look for the tables' owners", async {
            sqlx::query_scalar(
                "SELECT coalesce(bool_and(pg_has_role(relowner, 'USAGE')), true) FROM pg_class \
                 WHERE oid::bigint = ANY($1)",
            )
            .bind(&oids)
            .fetch_one(&self.database.pool())
            .await
            .map_err(sql("look for the tables' owners"))
        })
        .await
    }

    async fn published(&self) -> Result<Vec<Published>, Error> {
        let found: Vec<(i64, Option<String>, Option<Vec<String>>)> = answered("look for the publication", async {
            sqlx::query_as(
                "SELECT c.oid::bigint, to_jsonb(p) ->> 'rowfilter', \
                   (SELECT array_agg(name) FROM jsonb_array_elements_text(nullif(to_jsonb(p) -> 'attnames', 'null')) name) \
                 FROM pg_publication_tables p JOIN pg_namespace n ON n.nspname = p.schemaname \
                 JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename WHERE p.pubname = $1",
            )
            .bind(&self.settings.publication)
            .fetch_all(&self.database.pool())
            .await
            .map_err(sql("look for the publication"))
        })
        .await?;
        Ok(found.into_iter().map(|(oid, filter, columns)| Published { oid, filter, columns }).collect())
    }

    /// Names the publication as it is: it has another version after every change, to and fro too.
    pub(super) async fn version(&self) -> Result<String, Error> {
        answered("look for the publication", async {
            sqlx::query_scalar(AssertSqlSafe(format!("SELECT coalesce(({VERSION}), '')")))
                .bind(&self.settings.publication)
                .fetch_one(&self.database.pool())
                .await
                .map_err(sql("look for the publication"))
        })
        .await
    }

    /// Whether the tables still have these numbers (`None` for one that was not there), and are published as
    /// they were.
    pub(super) async fn has_still(
        &self,
        tables: &[(String, Option<i64>)],
        version: &str,
    ) -> Result<bool, Error> {
        let (names, oids): (Vec<&str>, Vec<Option<i64>>) =
            tables.iter().map(|(name, oid)| (name.as_str(), *oid)).unzip();
        answered("look for the tables", async {
            sqlx::query_scalar(AssertSqlSafe(format!(
                "SELECT ({VERSION}) IS NOT DISTINCT FROM $2 \
                 AND NOT EXISTS (SELECT FROM unnest($3::text[], $4::bigint[]) AS t(name, oid) \
                 WHERE to_regclass(t.name)::oid::bigint IS DISTINCT FROM t.oid OR (t.oid IS NOT NULL AND NOT EXISTS ( \
                   SELECT FROM pg_publication_tables p JOIN pg_namespace n ON n.nspname = p.schemaname \
                   JOIN pg_class c ON c.relnamespace = n.oid AND c.relname = p.tablename \
                   WHERE p.pubname = $1 AND c.oid::bigint = t.oid)))"
            )))
            .bind(&self.settings.publication)
            .bind(version)
            .bind(&names)
            .bind(&oids)
            .fetch_one(&self.database.pool())
            .await
            .map_err(sql("look for the tables"))
        })
        .await
    }

    /// Waits until every transaction that is open now has ended: what it inserted before the publication was
    /// changed, the log has as it was published then.
    pub(super) async fn outlive_writers(&self) -> Result<(), Obstacle> {
        let doing = "look for open transactions";
        let pool = self.database.pool();
        let next: String = answered(doing, async {
            sqlx::query_scalar("SELECT pg_current_xact_id()::text").fetch_one(&pool).await.map_err(sql(doing))
        })
        .await?;
        let mut said = false;
        loop {
            let over: bool = answered(doing, async {
                sqlx::query_scalar("SELECT pg_snapshot_xmin(pg_current_snapshot()) > $1::xid8")
                    .bind(&next)
                    .fetch_one(&pool)
                    .await
                    .map_err(sql(doing))
            })
            .await?;
            if over {
                return Ok(());
            }
            if !std::mem::replace(&mut said, true) {
                info!(
                    publication = self.settings.publication,
                    "waiting for transactions that may have begun before the publication was changed"
                );
            }
            tokio::time::sleep(LOOK_AGAIN_AFTER).await;
        }
    }
}

const LOOK_AGAIN_AFTER: Duration = Duration::from_millis(200);

/// The rows of the catalogue, with the transactions that wrote them.
const VERSION: &str = "SELECT concat_ws(' ', p.oid, p.xmin, \
   (SELECT string_agg(r.oid || ':' || r.xmin, ' ' ORDER BY r.oid) FROM pg_publication_rel r WHERE r.prpubid = p.oid)) \
   FROM pg_publication p WHERE p.pubname = $1";
