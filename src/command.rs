//! Programs that print a secret: a password, or a token.

use std::{
    io::Read as _,
    process::{Command, Stdio},
    time::{Duration, Instant},
};

/// A command that takes longer hangs.
pub(crate) const ANSWER_WITHIN: Duration = Duration::from_secs(30);

/// What a command prints. What it says on stderr is for our own.
pub(crate) fn ask(command: &[String], within: Duration) -> Result<String, String> {
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

    fn asked(script: &str, within: Duration) -> Result<String, String> {
        ask(&["sh", "-c", script].map(str::to_owned), within)
    }

    #[test]
    fn a_command_prints_the_secret_or_it_is_told_why_not() {
        assert_eq!(asked("echo secret", ANSWER_WITHIN), Ok("secret\n".into()));
        assert_eq!(asked("exit 3", ANSWER_WITHIN).unwrap_err(), "exit status: 3");
        assert_eq!(asked("true", ANSWER_WITHIN).unwrap_err(), "it printed nothing");
        assert_eq!(asked("exec sleep 60", Duration::from_millis(500)).unwrap_err(), "no answer within 0 s");
        assert_eq!(
            ask(&["no-such-program".into()], ANSWER_WITHIN).unwrap_err(),
            "No such file or directory (os error 2)"
        );
    }
}
