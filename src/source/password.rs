//! The password of the database as it is now: from a file, or printed by a command. Asked for whenever a
//! connection is made, so that one that is rotated, or lives for minutes, is taken up.

use std::{
    fmt,
    io::Read as _,
    path::PathBuf,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

use super::database::Error;
use crate::config;

/// A command that takes longer hangs.
const ANSWER_WITHIN: Duration = Duration::from_secs(30);

#[derive(Clone)]
pub(super) enum Password {
    /// What the URL or the environment says.
    Fixed,
    File(PathBuf),
    Command(Vec<String>),
}

/// A command may have a secret among its arguments.
impl fmt::Debug for Password {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Password::Fixed => "Fixed",
            Password::File(_) => "File",
            Password::Command(_) => "Command",
        })
    }
}

impl Password {
    pub fn of(source: &config::Source) -> Password {
        match (&source.password_file, source.password_command.as_slice()) {
            (Some(file), _) => Password::File(file.clone()),
            (None, []) => Password::Fixed,
            (None, command) => Password::Command(command.to_vec()),
        }
    }

    /// `None` where it never changes.
    pub async fn read(&self) -> Result<Option<String>, Error> {
        let text = match self {
            Password::Fixed => return Ok(None),
            Password::File(file) => std::fs::read_to_string(file)
                .map_err(|error| Error::Setup(format!("source.password_file {}: {error}", file.display())))?,
            Password::Command(command) => {
                let (name, asked) = (command[0].clone(), command.clone());
                let answer = tokio::task::spawn_blocking(move || ask(&asked, ANSWER_WITHIN)).await;
                answer
                    .unwrap_or_else(|error| Err(error.to_string()))
                    .map_err(|error| Error::Setup(format!("source.password_command {name}: {error}")))?
            }
        };
        Ok(Some(text.trim_end_matches(['\r', '\n']).to_owned()))
    }
}

/// What a command prints. What it says on stderr is for our own.
fn ask(command: &[String], within: Duration) -> Result<String, String> {
    let (program, arguments) = command.split_first().ok_or("it is empty")?;
    let mut child = Command::new(program)
        .args(arguments)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .spawn()
        .map_err(|error| error.to_string())?;
    let deadline = Instant::now() + within;
    let status = loop {
        match child.try_wait().map_err(|error| error.to_string())? {
            Some(status) => break status,
            None if Instant::now() >= deadline => {
                child.kill().ok();
                child.wait().ok();
                return Err(format!("no answer within {} s", within.as_secs()));
            }
            None => std::thread::sleep(Duration::from_millis(10)),
        }
    };
    if !status.success() {
        return Err(status.to_string());
    }
    let mut text = String::new();
    let mut stdout = child.stdout.take().ok_or("it has no output")?;
    stdout.read_to_string(&mut text).map_err(|error| error.to_string())?;
    match text.trim_end().is_empty() {
        true => Err("it printed nothing".into()),
        false => Ok(text),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asked(script: &str) -> Result<String, String> {
        ask(&["sh", "-c", script].map(str::to_owned), Duration::from_millis(500))
    }

    #[test]
    fn a_command_prints_the_password_or_it_is_told_why_not() {
        assert_eq!(asked("echo secret"), Ok("secret\n".into()));
        assert_eq!(asked("exit 3").unwrap_err(), "exit status: 3");
        assert_eq!(asked("true").unwrap_err(), "it printed nothing");
        assert_eq!(asked("exec sleep 60").unwrap_err(), "no answer within 0 s");
        assert_eq!(
            ask(&["no-such-program".into()], ANSWER_WITHIN).unwrap_err(),
            "No such file or directory (os error 2)"
        );
    }
}
