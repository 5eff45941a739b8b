//! The group in PostgreSQL.

use std::{collections::BTreeSet, time::Duration};

use sqlx::{self as sql, AssertSqlSafe};

use super::{
    super::{
        Attendance, Error,
        group::{Dialect, GroupSql, check_buckets, check_tables, group_methods, missing},
        holds::OR_NOTHING,
        positions::{Noted, PositionsSql, position_methods, unit_id},
    },
    Postgres,
    holds::own,
};
use crate::coordinate::{Held, Member, Part, Seen, View, standing::Attended};

impl Postgres {
    fn group_sql(&self) -> GroupSql {
        GroupSql::new(&Dialect {
            own: &|name| own(&self.schema, name),
            now: "clock_timestamp()",
            later: |micros| format!("clock_timestamp() + {micros}::bigint * interval '1 microsecond'"),
            seconds_until: |moment| format!("extract(epoch FROM {moment} - clock_timestamp())"),
            int: "bigint",
            text: "text",
            float: "float8",
            or_nothing: OR_NOTHING,
            skip_locked: " FOR UPDATE SKIP LOCKED",
        })
    }

    /// Of the server, and of those that replicate it.
    pub async fn system_identifier(&self) -> Result<String, Error> {
        sql::query_scalar("SELECT system_identifier::text FROM pg_control_system()")
            .fetch_one(&self.pool())
            .await
            .map_err(Error::sql("ask for the server's identity"))
    }

    fn positions_sql(&self) -> PositionsSql {
        PositionsSql::new(&|name| own(&self.schema, name), OR_NOTHING)
    }
}

group_methods!(Postgres);
position_methods!(Postgres);
