//! A PostgreSQL connection in replication mode, which sqlx does not have: login, simple queries, and the
//! stream of `START_REPLICATION`, whose messages are lent from one buffer of a promised size. And in the usual mode, for
//! values that are too large to be moved about.
//!
//! The format is from the PostgreSQL documentation, chapters "Frontend/Backend Protocol: Message Formats"
//! (and "Message Flow") and "Streaming Replication Protocol".

mod copy;
mod patience;
mod tls;
mod value;

use std::{fmt, io};

use postgres_protocol::{
    authentication::{
        md5_hash,
        sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256},
    },
    message::frontend,
};
use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::UnixStream,
};

pub use self::{
    copy::{HEAD, Message, Reader, Writer},
    value::Value,
};
use self::{
    patience::Patience,
    tls::{handshake, offers_tls},
};
use crate::{
    config::{Tls, TlsMode},
    source::dial::dial,
};

/// The longest message before the stream: nothing that is asked there has long answers.
const ANSWER: usize = 1024 * 1024;

#[derive(Clone)]
pub struct Settings {
    /// A name, an address, or an absolute path: the folder of a Unix socket.
    pub host: String,
    pub port: u16,
    pub user: String,
    pub password: Option<String>,
    pub database: String,
    pub tls: Tls,
    pub replication: bool,
    /// Startup parameters, such as ("TimeZone", "UTC").
    pub parameters: Vec<(String, String)>,
}

impl fmt::Debug for Settings {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Settings")
            .field("host", &self.host)
            .field("port", &self.port)
            .field("user", &self.user)
            .field("password", &self.password.as_ref().map(|_| "***"))
            .field("database", &self.database)
            .field("tls", &self.tls)
            .field("replication", &self.replication)
            .field("parameters", &self.parameters)
            .finish()
    }
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no connection to {server}: {io}")]
    Connect { server: String, io: io::Error },
    #[error("TLS with the server failed: {0}")]
    Tls(String),
    #[error("login at the server failed: {0}")]
    Auth(String),
    #[error("the server says: {message} (SQLSTATE {code})")]
    Server { code: String, message: String },
    #[error("the server has ended the connection: {0}")]
    Ended(String),
    #[error("the connection to the server was lost")]
    Closed,
    #[error("the replication protocol was broken: {0}")]
    Protocol(String),
}

impl Error {
    /// The SQLSTATE, of an error that the server reported.
    pub fn code(&self) -> Option<&str> {
        match self {
            Error::Server { code, .. } => Some(code),
            _ => None,
        }
    }

    /// An error of an established connection.
    fn lost(error: &io::Error) -> Error {
        match error.kind() {
            // Only rustls makes these, for example when the server refuses the client's certificate.
            io::ErrorKind::InvalidData => Error::Tls(error.to_string()),
            _ => Error::Closed,
        }
    }

    /// The content of an ErrorResponse, perhaps without its end: (field, text, NUL)*, NUL.
    fn server(content: &[u8]) -> Error {
        let field = |name: u8| {
            let found = content.split(|byte| *byte == 0).find(|field| field.first() == Some(&name));
            found.map(|field| String::from_utf8_lossy(&field[1..]).replace('\n', " "))
        };
        let mut message = field(b'M').unwrap_or_default();
        for more in [field(b'D'), field(b'H')].into_iter().flatten() {
            message.push_str(if message.ends_with('.') { " " } else { ". " });
            message.push_str(&more);
        }
        Error::Server { code: field(b'C').unwrap_or_default(), message }
    }

    fn unexpected(tag: u8, when: &str) -> Error {
        Error::Protocol(format!("unexpected message '{}' {when}", tag.escape_ascii()))
    }
}

/// A connection before the stream. A call that was cancelled leaves it unusable.
pub struct Connection {
    reader: Reader,
    writer: Writer,
}

impl Connection {
    pub async fn connect(settings: &Settings) -> Result<Connection, Error> {
        let (reader, writer): (Box<dyn AsyncRead + Send + Unpin>, Box<dyn AsyncWrite + Send + Unpin>);
        let mut patience = Patience::NONE;
        if settings.host.starts_with('/') {
            if !matches!(settings.tls.mode, TlsMode::Disable | TlsMode::Prefer) {
                return Err(Error::Tls("there is none on a Unix socket".to_owned()));
            }
            let path = format!("{}/.s.PGSQL.{}", settings.host.trim_end_matches('/'), settings.port);
            let socket = UnixStream::connect(&path).await;
            let (read, write) = socket.map_err(|io| Error::Connect { server: path, io })?.into_split();
            (reader, writer) = (Box::new(read), Box::new(write));
        } else {
            let mut socket = dial(&settings.host, settings.port).await.map_err(|io| {
                let server = format!("{}:{}", settings.host, settings.port);
                Error::Connect { server, io }
            })?;
            if offers_tls(&mut socket, settings.tls.mode).await? {
                let (read, write) = tokio::io::split(handshake(socket, settings).await?);
                (reader, writer) = (Box::new(read), Box::new(write));
            } else {
                patience = Patience::of(&socket);
                let (read, write) = socket.into_split();
                (reader, writer) = (Box::new(read), Box::new(write));
            }
        }
        let writer = Writer::new(writer);
        let mut connection = Connection { reader: Reader::new(reader, ANSWER), writer };
        connection.reader.patience = patience;
        connection.login(settings).await?;
        Ok(connection)
    }

    async fn login(&mut self, settings: &Settings) -> Result<(), Error> {
        let fixed =
            [("user", settings.user.as_str()), ("database", &settings.database), ("client_encoding", "UTF8")];
        let fixed = fixed.into_iter().chain(settings.replication.then_some(("replication", "database")));
        let more = settings.parameters.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        self.writer.write(|out| frontend::startup_message(fixed.chain(more), out)).await?;
        let password = || {
            let password = settings.password.as_deref().map(str::as_bytes);
            password.ok_or_else(|| Error::Auth("the server asks for a password, and none is set".to_owned()))
        };
        let failed = |error: io::Error| Error::Auth(error.to_string());
        let mut scram: Option<ScramSha256> = None;
        let mut welcome = false;
        loop {
            let (tag, content) = self.message().await?;
            let (kind, content) = match (tag, content.split_first_chunk::<4>()) {
                (b'R', Some((kind, content))) => (u32::from_be_bytes(*kind), content),
                (b'E', _) => return Err(Error::server(content)),
                (b'K', _) if welcome => continue,
                (b'Z', _) if welcome => return Ok(()),
                _ => return Err(Error::unexpected(tag, "at the login")),
            };
            match (kind, &mut scram) {
                // With SCRAM the server, too, has to prove that it knows the password.
                (0, Some(_)) => return Err(Error::Auth("the server did not prove itself".to_owned())),
                (0, None) => welcome = true,
                (3, _) => {
                    let password = password()?;
                    self.writer.write(|out| frontend::password_message(password, out)).await?;
                }
                (5, _) => {
                    let Some(salt) = content.first_chunk::<4>() else {
                        return Err(Error::Auth("there is no salt in the server's MD5 request".to_owned()));
                    };
                    let hash = md5_hash(settings.user.as_bytes(), password()?, *salt);
                    self.writer.write(|out| frontend::password_message(hash.as_bytes(), out)).await?;
                }
                (10, _) => {
                    if !content.split(|byte| *byte == 0).any(|name| name == SCRAM_SHA_256.as_bytes()) {
                        return Err(Error::Auth("the server does not offer SCRAM-SHA-256".to_owned()));
                    }
                    let begun = scram.insert(ScramSha256::new(password()?, ChannelBinding::unsupported()));
                    let first = begun.message();
                    self.writer
                        .write(|out| frontend::sasl_initial_response(SCRAM_SHA_256, first, out))
                        .await?;
                }
                (11, Some(begun)) => {
                    begun.update(content).map_err(failed)?;
                    self.writer.write(|out| frontend::sasl_response(begun.message(), out)).await?;
                }
                (12, Some(begun)) => {
                    begun.finish(content).map_err(failed)?;
                    scram = None;
                }
                _ => {
                    let text = format!("the server asks for method {kind}, which is not supported");
                    return Err(Error::Auth(text));
                }
            }
        }
    }

    /// The simple query protocol: the rows, as text, of the last statement that returned rows.
    pub async fn query(&mut self, sql: &str) -> Result<Vec<Vec<Option<String>>>, Error> {
        self.writer.write(|out| frontend::query(sql, out)).await?;
        let mut rows = Vec::new();
        let mut failed = None;
        loop {
            let (tag, content) = match (self.message().await, failed.take()) {
                // After a fatal error the server closes the connection; the error says more.
                (Err(Error::Closed), Some(error)) => return Err(error),
                (message, error) => {
                    failed = error;
                    message?
                }
            };
            match tag {
                b'T' => rows.clear(),
                b'D' => rows.push(row(content)?),
                b'C' | b'I' => {}
                b'E' => failed = Some(Error::server(content)),
                b'Z' => return failed.map_or(Ok(rows), Err),
                _ => return Err(Error::unexpected(tag, "in the answer to a query")),
            }
        }
    }

    /// Sends a statement such as `START_REPLICATION` and waits until the stream begins.
    pub async fn stream(mut self, sql: &str, frame_limit: usize) -> Result<(Reader, Writer), Error> {
        self.writer.write(|out| frontend::query(sql, out)).await?;
        match self.message().await? {
            (b'W', _) => {}
            (b'E', content) => return Err(Error::server(content)),
            (tag, _) => return Err(Error::unexpected(tag, "instead of the stream")),
        }
        self.reader.limit = frame_limit;
        Ok((self.reader, self.writer))
    }

    /// The next message that is not a notice: its tag and its content.
    async fn message(&mut self) -> Result<(u8, &[u8]), Error> {
        let (tag, content) = loop {
            match self.reader.header()? {
                Some((b'N' | b'S' | b'A', length)) => {
                    self.reader.take(0, length);
                    continue;
                }
                Some((tag, length)) if length > ANSWER => {
                    return Err(Error::unexpected(tag, &format!("of {length} bytes")));
                }
                Some((tag, length)) => {
                    if let Some(content) = self.reader.take(length, length) {
                        break (tag, content);
                    }
                }
                None => {}
            }
            self.reader.fill().await?;
        };
        Ok((tag, &self.reader.data[content]))
    }
}

/// The content of a DataRow: a count, and of each value its length (-1: NULL) and bytes.
fn row(content: &[u8]) -> Result<Vec<Option<String>>, Error> {
    let broken = || Error::Protocol("a row that does not fit its own lengths".to_owned());
    let (_, mut rest) = content.split_first_chunk::<2>().ok_or_else(broken)?;
    let mut values = Vec::new();
    while let Some((length, after)) = rest.split_first_chunk::<4>() {
        let length = i32::from_be_bytes(*length);
        rest = after;
        values.push(if length == -1 {
            None
        } else {
            let length = usize::try_from(length).map_err(|_| broken())?;
            let (value, after) = rest.split_at_checked(length).ok_or_else(broken)?;
            rest = after;
            let value = str::from_utf8(value);
            Some(value.map_err(|_| Error::Protocol("a value that is not UTF-8".to_owned()))?.to_owned())
        });
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_is_read_or_refused() {
        let good = b"\0\x03\0\0\0\x02ab\xff\xff\xff\xff\0\0\0\0";
        assert_eq!(row(good).unwrap(), [Some("ab".to_owned()), None, Some(String::new())]);
        for bad in [&b"\0"[..], b"\0\x01\0\0\0\x02a", b"\0\x01\xff\xff\xff\xfe", b"\0\x01\0\0\0\x01\xff"] {
            assert!(matches!(row(bad), Err(Error::Protocol(_))));
        }
    }

    #[test]
    fn the_password_is_not_shown() {
        let settings = Settings {
            host: "db".to_owned(),
            port: 5432,
            user: "u".to_owned(),
            password: Some("geheim".to_owned()),
            database: "d".to_owned(),
            tls: Tls::default(),
            replication: true,
            parameters: Vec::new(),
        };
        assert!(!format!("{settings:?}").contains("geheim"));
    }
}
