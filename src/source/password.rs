//! The password of the database as it is now: from a file, or printed by a command. One that is rotated, or lives for
//! minutes, is taken up: a file is looked at all the time, so that no connection is tried with what it had before; a
//! command is asked whenever the server has refused a login.

use std::{
    fmt,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

use tracing::warn;

use super::database::Error;
use crate::{
    command::{ANSWER_WITHIN, ask},
    config,
};

/// How often the files that connections are made of are looked at. They are few and small.
pub(super) const LOOK_EVERY: Duration = Duration::from_secs(1);

#[derive(Clone)]
pub(super) enum Password {
    /// What the URL or the environment says.
    Fixed,
    File(PathBuf),
    Command {
        command: Vec<String>,
        /// Whether it runs because a login was refused.
        asking: Arc<AtomicBool>,
    },
}

/// A command may have a secret among its arguments.
impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Password::Fixed => "Fixed",
            Password::File(_) => "File",
            Password::Command { .. } => "Command",
        })
    }
}

impl Password {
    pub fn of(source: &config::Source) -> Password {
        match (&source.password_file, source.password_command.as_slice()) {
            (Some(file), _) => Password::File(file.clone()),
            (None, []) => Password::Fixed,
            (None, command) => Password::Command { command: command.to_vec(), asking: Arc::default() },
        }
    }

    /// `None` where it never changes.
    pub async fn read(&self) -> Result<Option<String>, Error> {
        let text = match self {
            Password::Fixed => return Ok(None),
            Password::File(file) => std::fs::read_to_string(file)
                .map_err(|error| Error::Setup(format!("source.password_file {}: {error}", file.display())))?,
            Password::Command { command, .. } => {
                let (name, asked) = (command[0].clone(), command.clone());
                let answer = tokio::task::spawn_blocking(move || ask(&asked, ANSWER_WITHIN)).await;
                answer
                    .unwrap_or_else(|error| Err(error.to_string()))
                    .map_err(|error| Error::Setup(format!("source.password_command {name}: {error}")))?
            }
        };
        Ok(Some(line(&text)))
    }

    /// What the file has now. `None` where there is none, or it is just being replaced.
    pub fn in_file(&self) -> Option<String> {
        let Password::File(file) = self else { return None };
        std::fs::read_to_string(file).ok().map(|text| line(&text)).filter(|text| !text.is_empty())
    }

    /// The server refuses it: a command is asked for another one. Nobody waits for that, as it may take its time.
    pub fn refused(&self, take_up: impl FnOnce(&str) + Send + 'static) {
        let Password::Command { asking, .. } = self else { return };
        if asking.swap(true, Ordering::AcqRel) {
            return;
        }
        let (this, asking) = (self.clone(), asking.clone());
        tokio::spawn(async move {
            match this.read().await {
                Ok(password) => take_up(&password.unwrap_or_default()),
                Err(error) => {
                    warn!(%error, "the server refuses the password of the database, and no other is to be had");
                }
            }
            asking.store(false, Ordering::Release);
        });
    }
}

/// An editor or `echo` ends it with a newline that is no part of the secret.
fn line(text: &str) -> String {
    text.trim_end_matches(['\r', '\n']).to_owned()
}
