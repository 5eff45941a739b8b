//! Connections for large payloads. The driver receives a row in pieces and moves them together, a large one twice; here it
//! is received where it stays. There are few of these, of the pool's number, and what they cannot do the pool does.

use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use sqlx::{Connection as _, PgPool};
use tracing::{debug, info, warn};

use super::Postgres;
use crate::source::postgres::wire::{Connection, Value};

/// How many there are at most: as many payloads as a table fetches at once. The pool keeps one at least.
const MOST: u32 = 2;
/// When one is made again, after it failed.
const AGAIN_AFTER: Duration = Duration::from_secs(5);
/// What the server calls them, in pg_stat_activity.
const NAME: &str = "whippet-payloads";

/// Those of one pool.
#[derive(Default)]
pub(super) struct Large {
    state: Mutex<State>,
    /// Whether the log has it that they fail. That is said once, whatever pool it is.
    said: Arc<AtomicBool>,
}

#[derive(Default)]
struct State {
    idle: Vec<Connection>,
    /// How many the pool has given up for them, and how many are in use.
    given: u32,
    used: u32,
    not_before: Option<Instant>,
}

impl std::fmt::Debug for Large {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Large")
    }
}

/// One that is in use, or about to be made.
struct Place<'a> {
    of: &'a Large,
    connection: Option<Connection>,
    /// The pool has to give one up first.
    given: bool,
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.of.state().used -= 1;
    }
}

impl Large {
    /// For another pool.
    pub fn renewed(&self) -> Large {
        Large { state: Mutex::default(), said: self.said.clone() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn place(&self, most: u32) -> Option<Place<'_>> {
        let mut state = self.state();
        let connection = state.idle.pop();
        let given = state.used < state.given;
        let waits = state.not_before.is_some_and(|not_before| Instant::now() < not_before);
        if connection.is_none() && (waits || state.used >= most) {
            return None;
        }
        state.used += 1;
        Some(Place { of: self, connection, given })
    }

    /// What a statement finds; `None` where the pool is to be asked.
    pub async fn value(&self, db: &Postgres, pool: &PgPool, sql: &str, parameter: &str) -> Option<Value> {
        let mut place = self.place(MOST.min(db.most.saturating_sub(1)))?;
        if let Some(connection) = place.connection.take() {
            match self.ask(connection, sql, parameter).await {
                Ok(value) => return value,
                // It may have been closed for being idle: the next one tells.
                Err(error) => debug!(error, "a connection for large payloads is made anew"),
            }
        }
        if !place.given {
            let given = pool.acquire().await.ok()?.leak();
            self.state().given += 1;
            given.close().await.ok();
        }
        let asked = match db.connect_for_large().await {
            Ok(connection) => self.ask(connection, sql, parameter).await,
            Err(error) => Err(error),
        };
        match asked {
            Ok(value) => {
                if self.said.swap(false, Ordering::Relaxed) {
                    info!("large payloads come by connections of their own again");
                }
                value
            }
            Err(error) => {
                self.state().not_before = Some(Instant::now() + AGAIN_AFTER);
                if self.said.swap(true, Ordering::Relaxed) {
                    debug!(error, "a large payload comes by the driver");
                } else {
                    warn!(
                        error,
                        "a connection for large payloads fails: they come by the driver, which takes more of the processor, until \
                         one works"
                    );
                }
                None
            }
        }
    }

    /// Asks on this connection, and keeps it where it can be asked again. What the server has against the statement is told
    /// by the pool, which is asked next.
    async fn ask(
        &self,
        mut connection: Connection,
        sql: &str,
        parameter: &str,
    ) -> Result<Option<Value>, String> {
        let value = match connection.value(sql, parameter).await {
            Ok(value) => {
                debug!(bytes = value.bytes(), "a large payload came by a connection of its own");
                Some(value)
            }
            Err(error) if error.code().is_some() => {
                debug!(%error, "a large payload is asked for by the driver");
                None
            }
            Err(error) => return Err(error.to_string()),
        };
        self.state().idle.push(connection);
        Ok(value)
    }
}

impl Postgres {
    async fn connect_for_large(&self) -> Result<Connection, String> {
        let password = self.password().await.map_err(|error| error.to_string())?;
        let mut settings = self.wire(NAME);
        settings.password = password;
        if let Some(options) = self.options().get_options() {
            settings.parameters.push(("options".to_owned(), options.to_owned()));
        }
        Connection::connect(&settings).await.map_err(|error| error.to_string())
    }
}
