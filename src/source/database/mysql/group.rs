//! The group in MySQL and MariaDB.

use std::{collections::BTreeSet, time::Duration};

use sqlx::AssertSqlSafe;

use super::{
    super::{
        Attendance, Error,
        group::{Dialect, GroupSql, check_buckets, check_tables, group_methods, missing},
        positions::{Noted, PositionsSql, position_methods, unit_id},
    },
    Mysql, sql,
};
use crate::coordinate::{Held, Member, Part, Seen, View, standing::Attended};

/// Of tables with one row a part.
const OR_NOTHING: &str = "ON DUPLICATE KEY UPDATE part = part";

impl Mysql {
    fn group_sql(&self) -> GroupSql {
        GroupSql::new(&Dialect {
            own: &|name| self.own(name),
            now: "UTC_TIMESTAMP(6)",
            later: |micros| format!("UTC_TIMESTAMP(6) + INTERVAL {micros} MICROSECOND"),
            seconds_until: |moment| format!("TIMESTAMPDIFF(MICROSECOND, UTC_TIMESTAMP(6), {moment}) / 1e6"),
            int: "SIGNED",
            text: "CHAR",
            float: "DOUBLE",
            or_nothing: OR_NOTHING,
            skip_locked: " FOR UPDATE SKIP LOCKED",
        })
    }

    fn positions_sql(&self) -> PositionsSql {
        PositionsSql::new(&|name| self.own(name), OR_NOTHING)
    }
}

group_methods!(Mysql);
position_methods!(Mysql);
