//! Names: as they are written into statements, and what is said of one that nothing has.

use super::Error;

/// A double-quoted identifier, safe in any statement of PostgreSQL and SQLite.
pub(in crate::source) fn quoted(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}

/// `schema.table` or `table`, quoted part by part.
pub(in crate::source) fn quoted_table(name: &str) -> String {
    name.split('.').map(quoted).collect::<Vec<_>>().join(".")
}

/// A string literal, for constants inside statements.
pub(in crate::source) fn literal(text: &str) -> String {
    format!("'{}'", text.replace('\'', "''"))
}

/// The error for a table that is not there, or cannot be seen. `meant`: one that is, and whose name has the same letters.
#[cfg(any(feature = "postgres", feature = "mysql"))]
pub(super) fn no_table(table: &str, meant: Option<&str>) -> Error {
    Error::Setup(match meant {
        Some(meant) => format!("table {table} does not exist; did you mean {meant:?}? Mend tables[].name"),
        None => format!(
            "table {table} does not exist, or may not be seen from here: make it with `whippet sql`, or mend \
             tables[].name"
        ),
    })
}

/// The error for columns that are configured and not there.
pub(super) fn missing_columns(table: &str, missing: &[&str], present: &[String]) -> Error {
    let named = |name: &&str| match nearest(name, present) {
        Some(near) => format!("{name:?} (did you mean {near:?}?)"),
        None => format!("{name:?}"),
    };
    Error::Setup(format!(
        "table {table} has no column {}; it has {}. Map the names under `columns`, or make the \
         table with `whippet sql`",
        missing.iter().map(named).collect::<Vec<_>>().join(", "),
        present.join(", "),
    ))
}

fn nearest<'a>(name: &str, present: &'a [String]) -> Option<&'a str> {
    present
        .iter()
        .map(|candidate| (strsim::jaro_winkler(name, candidate), candidate.as_str()))
        .filter(|(score, _)| *score > 0.75)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers_and_literals_cannot_break_out() {
        assert_eq!(quoted_table("public.outbox"), r#""public"."outbox""#);
        assert_eq!(quoted(r#"a"; drop table x"#), r#""a""; drop table x""#);
        assert_eq!(literal("it's"), "'it''s'");
    }
}
