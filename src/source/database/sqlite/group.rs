//! The group in SQLite.

use std::{collections::BTreeSet, time::Duration};

use sqlx::{self as sql, AssertSqlSafe};

use super::{
    super::{
        Attendance, Error,
        group::{Dialect, GroupSql, check_buckets, check_tables, group_methods, missing},
        holds::OR_NOTHING,
        positions::{Noted, PositionsSql, position_methods, unit_id},
    },
    Sqlite,
};
use crate::coordinate::{Held, Member, Part, Seen, View, standing::Attended};

impl Sqlite {
    fn group_sql(&self) -> GroupSql {
        GroupSql::new(&Dialect {
            own: &|name| self.own(name),
            // Seconds since the Unix epoch, with fractions.
            now: "unixepoch('subsec')",
            later: |micros| format!("unixepoch('subsec') + {micros} / 1000000.0"),
            seconds_until: |moment| format!("{moment} - unixepoch('subsec')"),
            int: "INTEGER",
            text: "TEXT",
            float: "REAL",
            or_nothing: OR_NOTHING,
            // Writers take turns.
            skip_locked: "",
        })
    }

    fn positions_sql(&self) -> PositionsSql {
        PositionsSql::new(&|name| self.own(name), OR_NOTHING)
    }
}

group_methods!(Sqlite);
position_methods!(Sqlite);
