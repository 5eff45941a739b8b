//! The group in PostgreSQL.

use std::{collections::BTreeSet, time::Duration};

use sqlx::{self as sql, AssertSqlSafe};

use super::{
    super::{
        Attendance, Error,
        group::{Dialect, GroupSql, check_buckets, check_tables, group_methods},
        holds::OR_NOTHING,
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
            skip_locked: |column| format!(" ORDER BY {column} FOR UPDATE SKIP LOCKED"),
        })
    }
}

group_methods!(Postgres);
