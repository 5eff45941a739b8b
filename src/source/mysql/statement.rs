//! What a statement in the log does to the transaction that it is in.

/// A statement, by its first words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Statement<'a> {
    Begin,
    Commit,
    Rollback,
    /// The name of a savepoint, as it is written.
    Savepoint(&'a [u8]),
    RollbackTo(&'a [u8]),
    XaStart,
    /// It ends the statements of an XA transaction; it is prepared or committed next.
    XaEnd,
    XaCommit,
    XaRollback,
    /// Of a table that is made empty or dropped: it inserts nothing.
    Definition,
    Other,
}

/// The words that those begin with.
const DEFINITIONS: [&str; 5] = [
    "CREATE TABLE",
    "CREATE TEMPORARY TABLE",
    "DROP TABLE",
    "DROP TEMPORARY TABLE",
    "DROP /*!40005 TEMPORARY */ TABLE",
];

impl<'a> Statement<'a> {
    pub fn of(text: &'a [u8]) -> Statement<'a> {
        let after = |words: &str| {
            let (start, rest) = text.split_at_checked(words.len())?;
            start.eq_ignore_ascii_case(words.as_bytes()).then_some(rest)
        };
        let is = |words: &str| after(words).is_some();
        if is("BEGIN") {
            Statement::Begin
        } else if is("COMMIT") {
            Statement::Commit
        } else if is("XA START") {
            Statement::XaStart
        } else if is("XA END") {
            Statement::XaEnd
        } else if is("XA COMMIT") {
            Statement::XaCommit
        } else if is("XA ROLLBACK") {
            Statement::XaRollback
        } else if let Some(name) = after("ROLLBACK TO SAVEPOINT").or_else(|| after("ROLLBACK TO")) {
            Statement::RollbackTo(name.trim_ascii())
        } else if is("ROLLBACK") {
            Statement::Rollback
        } else if let Some(name) = after("SAVEPOINT") {
            Statement::Savepoint(name.trim_ascii())
        } else if DEFINITIONS.iter().any(|words| is(words)) && !contains(text, "SELECT") {
            Statement::Definition
        } else {
            Statement::Other
        }
    }
}

/// Whether a statement may be about a table, or has a word.
pub fn contains(text: &[u8], name: &str) -> bool {
    text.windows(name.len().max(1)).any(|part| part.eq_ignore_ascii_case(name.as_bytes()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn statements_are_told_by_their_first_words() {
        for (text, is) in [
            ("begin", Statement::Begin),
            ("COMMIT", Statement::Commit),
            ("ROLLBACK", Statement::Rollback),
            ("SAVEPOINT `a`", Statement::Savepoint(b"`a`")),
            ("ROLLBACK TO `a`", Statement::RollbackTo(b"`a`")),
            ("ROLLBACK TO SAVEPOINT a", Statement::RollbackTo(b"a")),
            ("XA START X'61',X'',1", Statement::XaStart),
            ("XA END X'61',X'',1", Statement::XaEnd),
            ("XA COMMIT X'61',X'',1", Statement::XaCommit),
            ("XA ROLLBACK X'61',X'',1", Statement::XaRollback),
            ("CREATE TABLE `t` (a int) START TRANSACTION", Statement::Definition),
            ("DROP TEMPORARY TABLE IF EXISTS `t`", Statement::Definition),
            ("CREATE TABLE t AS SELECT f()", Statement::Other),
            ("INSERT INTO outbox VALUES (1)", Statement::Other),
            ("", Statement::Other),
        ] {
            assert_eq!(Statement::of(text.as_bytes()), is, "{text}");
        }
    }
}
