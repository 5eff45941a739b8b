//! A relay as a child process: its log, its admin address, its memory, its end.

use std::{
    fmt::Write as _,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::TcpStream,
    process::{Child, Command, Stdio},
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use super::{SOON, World, whippet};

#[derive(Default)]
struct Log {
    lines: Mutex<(Vec<serde_json::Value>, bool)>,
    more: Condvar,
}

impl Log {
    fn lines(&self) -> MutexGuard<'_, (Vec<serde_json::Value>, bool)> {
        // A test that failed still shows its log.
        self.lines.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// `whippet run`, as a child process that logs JSON.
pub struct Relay {
    child: Child,
    log: Arc<Log>,
    pub admin: String,
}

impl Relay {
    pub fn start(config: &str) -> Relay {
        Relay::start_with(config, &[])
    }

    pub fn start_with(config: &str, environment: &[(&str, &str)]) -> Relay {
        let mut command = Command::new(env!("CARGO_BIN_EXE_whippet"));
        command.args(["run", "--config", config]).envs(environment.iter().copied());
        Relay::start_by(command)
    }

    /// By a command that becomes `whippet run`.
    pub fn start_by(mut command: Command) -> Relay {
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let log = Arc::new(Log::default());
        let (stderr, shared) = (child.stderr.take().unwrap(), log.clone());
        std::thread::spawn(move || {
            for line in BufReader::new(stderr).lines().map_while(Result::ok) {
                let line = serde_json::from_str(&line).unwrap_or(serde_json::Value::String(line));
                shared.lines().0.push(line);
                shared.more.notify_all();
            }
            shared.lines().1 = true;
            shared.more.notify_all();
        });
        let mut relay = Relay { child, log, admin: String::new() };
        let open = relay.wait_for("admin address is open");
        open["address"].as_str().unwrap().clone_into(&mut relay.admin);
        relay
    }

    pub fn id(&self) -> u32 {
        self.child.id()
    }

    /// Waits for a log line that contains `text` anywhere, and returns it.
    pub fn wait_for(&self, text: &str) -> serde_json::Value {
        self.wait_for_nth(text, 1)
    }

    /// The same for the line that is the `nth` of its kind.
    pub fn wait_for_nth(&self, text: &str, nth: usize) -> serde_json::Value {
        let deadline = Instant::now() + SOON;
        let mut lines = self.log.lines();
        loop {
            if let Some(line) = lines.0.iter().filter(|line| line.to_string().contains(text)).nth(nth - 1) {
                return line.clone();
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero() && !lines.1, "no line with {text:?} in:\n{}", render(&lines.0));
            lines = self.log.more.wait_timeout(lines, left).unwrap().0;
        }
    }

    pub fn log(&self) -> String {
        render(&self.log.lines().0)
    }

    /// GET of the admin address: status code and body.
    pub fn get(&self, path: &str) -> (u16, String) {
        get(&self.admin, path)
    }

    pub fn status(&self) -> serde_json::Value {
        serde_json::from_str(&self.get("/status").1).unwrap()
    }

    /// Waits until the status has this at a JSON pointer: the board is written once in a while.
    pub async fn until_status(&self, pointer: &str, expected: impl Into<serde_json::Value>) {
        let expected = expected.into();
        self.until(|status| status.pointer(pointer) == Some(&expected)).await;
    }

    pub async fn until(&self, good: impl Fn(&serde_json::Value) -> bool) {
        let deadline = Instant::now() + SOON;
        loop {
            let status = self.status();
            if good(&status) {
                return;
            }
            assert!(Instant::now() < deadline, "not after {SOON:?}: {status}");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Runs an operator's verb as a user would; what it printed as JSON.
    pub fn operate(&self, world: &World, arguments: &[&str]) -> serde_json::Value {
        let output = self.try_to(world, arguments);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{arguments:?}: {said}");
        serde_json::from_slice(&output.stdout).unwrap()
    }

    pub fn try_to(&self, world: &World, arguments: &[&str]) -> std::process::Output {
        let token = world.folder.path().join("token").display().to_string();
        let common = ["--json", "--admin", &self.admin, "--token-file", &token];
        whippet(&[arguments, &common[..]].concat())
    }

    /// POST to the admin address: status code and body.
    pub fn post(&self, path: &str, token: Option<&str>, body: &str) -> (u16, String) {
        self.post_as("application/json", path, token, body)
    }

    pub fn post_as(&self, media: &str, path: &str, token: Option<&str>, body: &str) -> (u16, String) {
        let authorization = token.map_or(String::new(), |token| format!("Authorization: Bearer {token}\r\n"));
        let length = body.len();
        request(
            &self.admin,
            &format!(
                "POST {path} HTTP/1.1\r\nHost: {}\r\nConnection: close\r\n{authorization}\
                 Content-Type: {media}\r\nContent-Length: {length}\r\n\r\n{body}",
                self.admin
            ),
        )
    }

    /// The sum of a metric's samples whose labels contain `labels`.
    pub fn metric(&self, name: &str, labels: &str) -> f64 {
        let text = self.get("/metrics").1;
        let samples = text.lines().filter(|line| {
            line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(labels)
        });
        samples.map(|line| line.rsplit(' ').next().unwrap().parse::<f64>().unwrap()).sum()
    }

    pub fn signal(&self, name: &str) {
        let id = self.child.id().to_string();
        let sent = Command::new("kill").args(["-s", name, &id]).status().unwrap();
        assert!(sent.success());
    }

    /// Whether the process has ended by itself, and how.
    pub fn has_ended(&mut self) -> Option<std::process::ExitStatus> {
        self.child.try_wait().unwrap()
    }

    /// Waits until the process has ended by itself.
    pub fn ended(mut self) -> std::process::ExitStatus {
        let deadline = Instant::now() + SOON;
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(Instant::now() < deadline, "it did not end; its log:\n{}", self.log());
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The most memory that the process has had, in MiB (proc(5), VmHWM), with the mapped code of the release, as measured,
    /// in place of this build's. Its own crate is not optimised, so that it maps some 10 MiB more, which nobody ships.
    pub fn peak_mib(&self) -> f64 {
        const CODE_OF_THE_RELEASE: f64 = 25.0;
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.id())).unwrap();
        let mib = |name: &str| {
            let line = status.lines().find(|line| line.starts_with(name)).unwrap();
            line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1024.0
        };
        mib("VmHWM") - (mib("RssFile") - CODE_OF_THE_RELEASE).max(0.0)
    }

    /// SIGKILL.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// SIGTERM, then the exit code and everything it logged.
    pub fn stop(mut self) -> (Option<i32>, String) {
        self.signal("TERM");
        let code = self.child.wait().unwrap().code();
        let mut lines = self.log.lines();
        while !lines.1 {
            lines = self.log.more.wait(lines).unwrap();
        }
        (code, render(&lines.0))
    }
}

fn render(lines: &[serde_json::Value]) -> String {
    lines.iter().fold(String::new(), |mut text, line| {
        let _ = writeln!(text, "{line}");
        text
    })
}

impl Drop for Relay {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|ended| ended.is_none()) {
            self.child.kill().ok();
            self.child.wait().ok();
        }
        if std::thread::panicking() {
            eprintln!("the relay's log:\n{}", self.log());
        }
    }
}

pub fn get(address: &str, path: &str) -> (u16, String) {
    request(address, &format!("GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n"))
}

fn request(address: &str, request: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(address).unwrap();
    // A server that has refused already need not read the rest.
    stream.write_all(request.as_bytes()).ok();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}
