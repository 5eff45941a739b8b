//! What `whippet doctor` finds of the log: whether it can be followed. Nothing is changed, and a relay that reads it is
//! not disturbed.

use super::{
    publication::{Lack, Wanted},
    slot::{Obstacle, Slot, sql},
    wire,
};
use crate::{
    config,
    coordinate::report,
    doctor::{Finding, Fix},
    source::database::{Postgres, TableSpec, answered, literal, quoted},
};

const WAL_LEVEL: &str = "postgres: wal_level";
const ROLE: &str = "postgres: replication";
const PUBLICATION: &str = "postgres: publication";
const SLOT: &str = "postgres: slot";

struct Server {
    role: String,
    wal_level: String,
    may_replicate: bool,
    may_create: bool,
    slots: i64,
    most_slots: i64,
}

pub async fn examine(
    database: &Postgres,
    source: &config::Source,
    specs: &[TableSpec],
) -> Result<Vec<Finding>, Obstacle> {
    let application = "whippet doctor".to_owned();
    let settings = source.stream.clone().unwrap_or_default();
    let slot = Slot { database: database.clone(), settings, application };
    let found: (String, String, bool, bool, i64, i64) = answered("ask the server", async {
        sqlx::query_as(
            "SELECT current_user::text AS role, current_setting('wal_level') AS wal_level, \
               (SELECT rolreplication OR rolsuper FROM pg_roles WHERE rolname = current_user) AS may_replicate, \
               has_database_privilege(current_database(), 'CREATE') AS may_create, \
               (SELECT count(*) FROM pg_replication_slots) AS slots, \
               current_setting('max_replication_slots')::bigint AS most_slots",
        )
        .fetch_one(&database.pool())
        .await
        .map_err(sql("ask the server"))
    })
    .await?;
    let (role, wal_level, may_replicate, may_create, slots, most_slots) = found;
    let server = Server { role, wal_level, may_replicate, may_create, slots, most_slots };
    let mut findings = vec![of_wal_level(&server)];
    findings.push(of_role(database, &server).await?);
    findings.push(slot.of_publication(specs, &server).await?);
    findings.push(slot.of_slot(specs, &server).await?);
    Ok(findings)
}

fn of_wal_level(server: &Server) -> Finding {
    if server.wal_level == "logical" {
        return Finding::ok(WAL_LEVEL, "logical");
    }
    let says = format!("it is {}; after the change the server has to be restarted", server.wal_level);
    Finding::fail(WAL_LEVEL, says).mended_by(Fix::Sql("ALTER SYSTEM SET wal_level = 'logical'".into()))
}

/// Whether this role may read the log, and a connection for it gets through.
async fn of_role(database: &Postgres, server: &Server) -> Result<Finding, Obstacle> {
    if !server.may_replicate {
        let fix = Fix::Sql(format!("ALTER ROLE {} REPLICATION", quoted(&server.role)));
        return Ok(Finding::fail(ROLE, format!("{} may not read the log", server.role)).mended_by(fix));
    }
    let settings = database.replication("whippet doctor");
    let settings =
        wire::Settings { password: database.password().await.map_err(Obstacle::from)?, ..settings };
    let asked = async {
        let mut connection = wire::Connection::connect(&settings).await?;
        connection.query("IDENTIFY_SYSTEM").await
    };
    Ok(match asked.await {
        Ok(_) => Finding::ok(ROLE, format!("{} may read the log, and can connect for it", server.role)),
        Err(error) => {
            let says = format!("a connection that reads the log does not get through: {}", report(&error));
            let fix = Fix::Config("source.url: (the address of the server itself, not of a pooler)".into());
            Finding::fail(ROLE, says).mended_by(fix)
        }
    })
}

impl Slot {
    async fn of_publication(&self, specs: &[TableSpec], server: &Server) -> Result<Finding, Obstacle> {
        let mut wanted = Vec::new();
        for spec in specs.iter().filter(|spec| spec.is_table()) {
            // One that is not there is told of already.
            if let Some((oid, known)) = self.columns(spec).await? {
                wanted.push(Wanted::new(spec, oid, &known));
            }
        }
        let name = &self.settings.publication;
        let Some(Lack { why, statement, by_hand }) = self.lack(&wanted).await? else {
            return Ok(Finding::ok(PUBLICATION, format!("{name} has every table whole")));
        };
        let owns = server.may_create && self.owns(&wanted).await?;
        Ok(match self.settings.create && owns && !by_hand {
            true => Finding::ok(PUBLICATION, format!("{why}; the relay mends that when it starts")),
            false => Finding::fail(PUBLICATION, why).mended_by(Fix::Sql(statement)),
        })
    }

    async fn of_slot(&self, specs: &[TableSpec], server: &Server) -> Result<Finding, Obstacle> {
        let name = &self.settings.slot;
        let fail = |says: String, fix: Fix| Finding::fail(SLOT, says).mended_by(fix);
        let make = format!("SELECT pg_create_logical_replication_slot({}, 'pgoutput')", literal(name));
        let another = || Fix::Config("source.stream.slot: (a name that nobody has)".into());
        let Some(found) = self.find().await? else {
            return Ok(match (self.settings.create, server.slots < server.most_slots) {
                (_, false) => fail(
                    format!(
                        "{name} is not there, and the server has {} of {} slots; after the change it has to be \
                         restarted",
                        server.slots, server.most_slots
                    ),
                    Fix::Sql(format!("ALTER SYSTEM SET max_replication_slots = {}", server.slots + 10)),
                ),
                (true, true) => Finding::ok(SLOT, format!("{name} is made when a relay starts")),
                (false, true) => {
                    fail(format!("{name} is not there, and source.stream.create is false"), Fix::Sql(make))
                }
            });
        };
        if found.plugin.as_deref() != Some("pgoutput") || !found.here {
            return Ok(fail(format!("{name} is no pgoutput slot of this database"), another()));
        }
        if let Some(owner) = found.owner.filter(|owner| !owner.starts_with("whippet:")) {
            return Ok(fail(format!("{name} is in use by {owner:?}"), another()));
        }
        let Some(reason) = found.lost else {
            return Ok(Finding::ok(SLOT, format!("{name} can be read from")));
        };
        let drop = format!("SELECT pg_drop_replication_slot({})", literal(name));
        let says = format!("the server has invalidated {name} ({reason})");
        let replaceable = specs.iter().all(TableSpec::stays);
        Ok(match (replaceable, self.settings.create) {
            (true, true) => Finding::warn(SLOT, format!("{says}; a relay makes it anew when it starts")),
            (true, false) => fail(says, Fix::Sql(format!("{drop};\n{make}"))),
            (false, _) => fail(
                format!("{says}, and with it events that no table has: see what is missing, then begin anew"),
                Fix::Shell("whippet teardown --config FILE".into()),
            ),
        })
    }
}
