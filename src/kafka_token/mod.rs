//! Tokens of OAUTHBEARER that somebody else makes: taken as they are from a file, or printed by a command.
//!
//! All clients of the process share what comes from one origin. A thread of its own has a fresh token before the old one
//! ends, and hands it to each of them, so that none ever waits for a command.

mod hand_over;
mod parse;

use std::{
    collections::BTreeMap,
    fmt,
    ops::Deref,
    path::PathBuf,
    sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant, SystemTime},
};

use rdkafka::{ClientContext, client::Client};
use tracing::{debug, error, info, warn};

use self::{hand_over::hand_over, parse::Token};
use crate::command::{ANSWER_WITHIN, ask};

/// How often a file is looked at, and how soon at most, and how seldom, a command is asked again.
const LOOK_EVERY: Duration = Duration::from_secs(1);
const AT_LAST: Duration = Duration::from_secs(30);
/// A command is not asked because of refusals more often than this.
const AFTER_REFUSAL: Duration = Duration::from_secs(10);
/// A command is asked again after this share of a token's life: well before a broker wants another one.
const SHARE: f64 = 0.6;

/// Where tokens come from.
#[derive(Clone, PartialEq, Eq)]
pub enum TokenFrom {
    File(PathBuf),
    /// A program and its arguments.
    Command(Vec<String>),
}

impl TokenFrom {
    fn read(&self) -> Result<Token, String> {
        let text = match self {
            TokenFrom::File(file) => std::fs::read_to_string(file).map_err(|error| error.to_string()),
            TokenFrom::Command(command) => ask(command, ANSWER_WITHIN),
        };
        let token = text.and_then(|text| Token::parse(&text, SystemTime::now()));
        token.map_err(|why| format!("{self}: {why}"))
    }
}

impl fmt::Display for TokenFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            TokenFrom::File(file) => write!(f, "kafka.token_file {}", file.display()),
            // Its arguments may have a secret among them.
            TokenFrom::Command(command) => {
                write!(f, "kafka.token_command {}", command.first().map_or("", String::as_str))
            }
        }
    }
}

impl fmt::Debug for TokenFrom {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Hands a token to a client.
type Take = Box<dyn Fn(&Token) -> Result<(), String> + Send + Sync>;

/// The tokens of one origin.
pub struct Tokens {
    from: TokenFrom,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    current: Option<Token>,
    clients: BTreeMap<u64, Take>,
    last_client: u64,
    has_thread: bool,
    /// When the origin is looked at next, and when it was last.
    due: Instant,
    looked: Option<Instant>,
    /// In a row.
    failures: u32,
    /// The last that the log has of them.
    said: Option<String>,
}

static ORIGINS: Mutex<Vec<Arc<Tokens>>> = Mutex::new(Vec::new());

impl fmt::Debug for Tokens {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.from, f)
    }
}

impl Tokens {
    /// The same ones for whoever names the same origin.
    pub fn of(from: TokenFrom) -> Arc<Tokens> {
        let mut origins = ORIGINS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = origins.iter().find(|known| known.from == from) {
            return known.clone();
        }
        let tokens = Arc::new(Tokens::new(from));
        origins.push(tokens.clone());
        tokens
    }

    fn new(from: TokenFrom) -> Tokens {
        let state = State {
            current: None,
            clients: BTreeMap::new(),
            last_client: 0,
            has_thread: false,
            due: Instant::now(),
            looked: None,
            failures: 0,
            said: None,
        };
        Tokens { from, state: Mutex::new(state), changed: Condvar::new() }
    }

    /// Until when the token is good that there is now. Waits for the origin, unless a client has it already.
    pub fn look(&self) -> Result<SystemTime, String> {
        if let Some(token) = self.state().good() {
            return Ok(token.until);
        }
        let read = self.from.read();
        let until = read.as_ref().map(|token| token.until).map_err(String::clone);
        self.state().take(&self.from, read);
        until
    }

    /// A broker refuses what a client has: there may be another one before this one's time.
    pub fn refused(&self) {
        let mut state = self.state();
        if matches!(self.from, TokenFrom::Command(_)) && state.failures == 0 {
            let soonest = state.looked.map_or_else(Instant::now, |looked| looked + AFTER_REFUSAL);
            state.due = state.due.min(soonest);
            self.changed.notify_all();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn join(self: &Arc<Self>, take: Take) -> Place {
        let mut state = self.state();
        if let Some(token) = state.good() {
            hand(&take, token);
        }
        state.last_client += 1;
        let number = state.last_client;
        state.clients.insert(number, take);
        if !std::mem::replace(&mut state.has_thread, true) {
            let tokens = self.clone();
            std::thread::spawn(move || tokens.keep());
        }
        Place { tokens: self.clone(), number }
    }

    /// For as long as there is a client.
    fn keep(&self) {
        let mut state = self.state();
        while !state.clients.is_empty() {
            let wait = state.due.saturating_duration_since(Instant::now());
            if !wait.is_zero() {
                state = self.changed.wait_timeout(state, wait).unwrap_or_else(PoisonError::into_inner).0;
                continue;
            }
            drop(state);
            let read = self.from.read();
            state = self.state();
            state.take(&self.from, read);
        }
        state.has_thread = false;
    }
}

impl State {
    fn good(&self) -> Option<&Token> {
        self.current.as_ref().filter(|token| token.until > SystemTime::now())
    }

    /// What the origin had just now.
    fn take(&mut self, from: &TokenFrom, read: Result<Token, String>) {
        let now = Instant::now();
        self.looked = Some(now);
        let is_file = matches!(from, TokenFrom::File(_));
        let token = match read {
            Ok(token) => token,
            Err(why) => {
                let later = if is_file { LOOK_EVERY } else { LOOK_EVERY * 2_u32.pow(self.failures.min(5)) };
                self.due = now + later.min(AT_LAST);
                self.failures = self.failures.saturating_add(1);
                self.say(is_file, &why);
                return;
            }
        };
        let life = token.until.duration_since(SystemTime::now()).unwrap_or_default();
        self.due = now + if is_file { LOOK_EVERY } else { life.mul_f64(SHARE).max(LOOK_EVERY) };
        self.failures = 0;
        let until = humantime::format_rfc3339_seconds(token.until);
        if self.said.take().is_some() {
            info!(%until, "there is a token for kafka again");
        }
        if self.current.as_ref().is_none_or(|current| current.text != token.text) {
            debug!(%until, "another token for kafka");
            self.clients.values().for_each(|take| hand(take, &token));
        }
        self.current = Some(token);
    }

    /// Once, and once more when the old one has ended.
    fn say(&mut self, is_file: bool, why: &str) {
        let until = self.good().map(|token| humantime::format_rfc3339_seconds(token.until));
        // One that is just being replaced.
        if is_file && until.is_some() && self.failures < 2 {
            return;
        }
        let saying = if until.is_some() { why.to_owned() } else { format!("{why} (none is left)") };
        if self.said.as_ref() == Some(&saying) {
            return;
        }
        match until {
            Some(until) => warn!(error = why, %until, "there is no new token for kafka; the old one goes on"),
            None => {
                error!(error = why, "there is no token for kafka: clients cannot log in until there is one");
            }
        }
        self.said = Some(saying);
    }
}

fn hand(take: &Take, token: &Token) {
    if let Err(error) = take(token) {
        warn!(error, "a client of kafka does not take its token");
    }
}

/// A client's place among those that get tokens.
struct Place {
    tokens: Arc<Tokens>,
    number: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let taken = self.tokens.state().clients.remove(&self.number);
        drop(taken);
        self.tokens.changed.notify_all();
    }
}

/// A client that is given tokens, if it wants any, for as long as it is there.
pub struct Fed<C> {
    /// Goes first: then nobody else has the client, and it is closed where it is dropped.
    _place: Option<Place>,
    client: Arc<C>,
}

impl<C: Send + Sync + 'static> Fed<C> {
    pub fn new<X: ClientContext + 'static>(
        tokens: Option<&Arc<Tokens>>,
        client: C,
        inner: fn(&C) -> &Client<X>,
    ) -> Fed<C> {
        let client = Arc::new(client);
        let place = tokens.map(|tokens| {
            let client = client.clone();
            tokens.join(Box::new(move |token| hand_over(inner(&client), token)))
        });
        Fed { _place: place, client }
    }
}

impl<C> Deref for Fed<C> {
    type Target = C;

    fn deref(&self) -> &C {
        &self.client
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Clone, Default)]
    struct Taken(Arc<Mutex<Vec<String>>>);

    impl Taken {
        fn take(&self) -> Take {
            let taken = self.clone();
            Box::new(move |token| {
                taken.0.lock().unwrap().push(token.text.clone());
                Ok(())
            })
        }

        fn until(&self, expected: &[&str]) {
            let deadline = Instant::now() + Duration::from_secs(10);
            while *self.0.lock().unwrap() != expected {
                assert!(Instant::now() < deadline, "{:?}", self.0.lock().unwrap());
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    fn command(script: &str) -> TokenFrom {
        TokenFrom::Command(["sh", "-c", script].map(str::to_owned).to_vec())
    }

    #[test]
    fn a_command_is_asked_once_for_all_clients() {
        let folder = tempfile::tempdir().unwrap();
        let calls = folder.path().join("calls");
        let origin = || command(&format!("echo >> {0}; echo token-$(wc -l < {0})", calls.display()));
        let taken = Taken::default();
        let tokens = Tokens::of(origin());
        let first = [tokens.join(taken.take()), tokens.join(taken.take())];
        taken.until(&["token-1", "token-1"]);
        // It outlives its clients.
        drop(first);
        let third = Tokens::of(origin()).join(taken.take());
        taken.until(&["token-1", "token-1", "token-1"]);
        // One that is refused at once is not asked for at once again.
        tokens.refused();
        let until_due = tokens.state().due.saturating_duration_since(Instant::now());
        assert!(!until_due.is_zero() && until_due <= AFTER_REFUSAL, "{until_due:?}");
        tokens.state().looked = Some(Instant::now().checked_sub(AFTER_REFUSAL).unwrap());
        tokens.refused();
        taken.until(&["token-1", "token-1", "token-1", "token-2"]);
        drop(third);
    }

    #[test]
    fn a_file_is_followed() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("token");
        let tokens = Arc::new(Tokens::new(TokenFrom::File(file.clone())));
        assert!(tokens.look().unwrap_err().ends_with("No such file or directory (os error 2)"));
        let taken = Taken::default();
        let _client = tokens.join(taken.take());
        std::fs::write(&file, "one\n").unwrap();
        taken.until(&["one"]);
        std::fs::remove_file(&file).unwrap();
        std::fs::write(&file, "two\n").unwrap();
        taken.until(&["one", "two"]);
    }

    /// Told when it matters, once, and again when it is worse.
    #[test]
    fn failures_are_told_once_and_tried_again_ever_later() {
        let tokens = Tokens::new(TokenFrom::File("token".into()));
        let mut state = tokens.state();
        let token =
            |seconds| Token { text: "t".into(), until: SystemTime::now() + Duration::from_secs(seconds) };
        state.take(&tokens.from, Ok(token(60)));
        let away = || Err("away".to_owned());
        state.take(&tokens.from, away());
        assert_eq!(state.said, None, "it may be just being replaced");
        state.take(&tokens.from, away());
        assert_eq!(state.said.as_deref(), Some("away"));
        state.current = Some(token(0));
        state.take(&tokens.from, away());
        assert_eq!(state.said.as_deref(), Some("away (none is left)"));
        state.take(&tokens.from, Ok(token(60)));
        assert_eq!(state.said, None);

        let command = TokenFrom::Command(vec!["x".into()]);
        let mut pauses = Vec::new();
        for _ in 0..7 {
            state.take(&command, away());
            pauses.push(state.due.duration_since(state.looked.unwrap()).as_secs());
        }
        assert_eq!(pauses, [1, 2, 4, 8, 16, 30, 30]);
        state.take(&command, Ok(token(100)));
        assert_eq!(state.due.duration_since(state.looked.unwrap()).as_secs_f64().round(), 60.0);
    }

    #[test]
    fn arguments_are_not_shown() {
        let from = TokenFrom::Command(vec!["aws".into(), "s3cret".into()]);
        assert_eq!(format!("{from} {from:?}"), "kafka.token_command aws kafka.token_command aws");
    }
}
