//! The group in MySQL and MariaDB.

use std::{collections::BTreeSet, time::Duration};

use sqlx::AssertSqlSafe;

use super::{
    super::{
        Attendance, Error,
        group::{Dialect, GroupSql, check_buckets, check_tables, group_methods},
    },
    Mysql, sql,
};
use crate::coordinate::{Held, Member, Part, Seen, View, standing::Attended};

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
            or_nothing: "ON DUPLICATE KEY UPDATE part = part",
            // Rows are looked at in the order of their key, so that no two wait for one another.
            skip_locked: |_| String::new(),
        })
    }
}

group_methods!(Mysql);
