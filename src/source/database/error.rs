//! What goes wrong with a database, and what that calls for.

use std::{future::Future, time::Duration};

use crate::doctor::{Finding, Fix};

/// What went wrong with the database, and what the operator can do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Setup(String),
    /// The same, where it can be told what mends it.
    #[error("{says}. To mend it: {}", .fix.text())]
    Refused { says: String, fix: Fix },
    #[error("the lease was taken by another relay (epoch {0} is not ours any more)")]
    Fenced(i64),
    #[error("{0}: the database does not answer")]
    NoAnswer(&'static str),
    #[error("{doing}: {source}")]
    Sql {
        doing: &'static str,
        #[source]
        source: Fault,
    },
}

/// What a driver says.
#[derive(Debug, thiserror::Error)]
pub enum Fault {
    #[error(transparent)]
    Sqlx(#[from] sqlx::Error),
    #[cfg(feature = "mysql")]
    #[error(transparent)]
    Mysql(#[from] mysql_async::Error),
}

/// How long the database may take for one answer.
const ANSWER_WITHIN: Duration = Duration::from_mins(1);

/// Several tasks notice the same fault, and connections that are younger were made for it already. A server that
/// refuses does so at once, and each time makes the pause before the next try longer.
pub(super) const REFUSED: Duration = Duration::from_secs(1);
/// The same of one that does not answer, and may only be slow: connections that hang are there beside the new ones.
pub(super) const UNANSWERED: Duration = Duration::from_secs(5);

/// An answer, or [`Error::NoAnswer`]: a connection can be dead without anybody telling.
pub async fn answered<T>(
    doing: &'static str,
    answer: impl Future<Output = Result<T, Error>>,
) -> Result<T, Error> {
    tokio::time::timeout(ANSWER_WITHIN, answer).await.unwrap_or(Err(Error::NoAnswer(doing)))
}

impl Error {
    /// Where the connections lead to a server that is of no use, one that does not answer or that has become a
    /// standby (read_only_sql_transaction, or it says that it shuts down): how old those are that are to be thrown
    /// away for it.
    pub(super) fn renews_older_than(&self) -> Option<Duration> {
        match self {
            Error::NoAnswer(_) | Error::Sql { source: Fault::Sqlx(sqlx::Error::PoolTimedOut), .. } => {
                Some(UNANSWERED)
            }
            Error::Sql { source: Fault::Sqlx(source), .. } => {
                let code = source.as_database_error().and_then(|error| error.code());
                matches!(code.as_deref(), Some("25006" | "57P01" | "57P02" | "57P03")).then_some(REFUSED)
            }
            #[cfg(feature = "mysql")]
            Error::Sql { source: Fault::Mysql(source), .. } => super::mysql::renews_older_than(source),
            Error::Setup(_) | Error::Refused { .. } | Error::Fenced(_) => None,
        }
    }

    /// Whether what was tried may have been done all the same: the answer is lost, and is no refusal.
    pub fn leaves_in_doubt(&self) -> bool {
        match self {
            Error::NoAnswer(_) => true,
            Error::Sql { source: Fault::Sqlx(sqlx::Error::PoolTimedOut), .. } => false,
            // A server that shuts down may say so of what is committed, and not on its standby (class 57P).
            Error::Sql { source: Fault::Sqlx(source), .. } => source
                .as_database_error()
                .is_none_or(|error| error.code().is_some_and(|code| code.starts_with("57P"))),
            #[cfg(feature = "mysql")]
            Error::Sql { source: Fault::Mysql(source), .. } => {
                !matches!(source, mysql_async::Error::Server(_))
            }
            Error::Setup(_) | Error::Refused { .. } | Error::Fenced(_) => false,
        }
    }

    /// Whether the server does not take the password: of invalid_authorization_specification, or
    /// ER_ACCESS_DENIED_ERROR, ER_ACCESS_DENIED_NO_PASSWORD_ERROR, ER_MUST_CHANGE_PASSWORD_LOGIN.
    pub(super) fn refuses_login(&self) -> bool {
        match self {
            Error::Sql { source: Fault::Sqlx(source), .. } => {
                let code = source.as_database_error().and_then(|error| error.code());
                code.is_some_and(|code| code.starts_with("28"))
            }
            #[cfg(feature = "mysql")]
            Error::Sql { source: Fault::Mysql(mysql_async::Error::Server(error)), .. } => {
                matches!(error.code, 1045 | 1698 | 1862)
            }
            _ => false,
        }
    }

    /// A table that is refused, as `whippet doctor` says it.
    pub(super) fn refusal(&self, check: &'static str) -> Option<Finding> {
        match self {
            Error::Refused { says, fix } => Some(Finding::fail(check, says).mended_by(fix.clone())),
            _ => None,
        }
    }

    pub(super) fn sql<E: Into<Fault>>(doing: &'static str) -> impl FnOnce(E) -> Error {
        move |source| Error::Sql { doing, source: source.into() }
    }
}
