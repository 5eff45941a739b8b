//! A PostgreSQL connection in replication mode, which sqlx does not have: login, simple queries, and the
//! stream of `START_REPLICATION`, whose messages are lent from one buffer of a promised size.
//!
//! The format is from the PostgreSQL documentation, chapters "Frontend/Backend Protocol: Message Formats"
//! (and "Message Flow") and "Streaming Replication Protocol".

use std::{fmt, io, ops::Range, path::PathBuf, sync::Arc};

use bytes::BytesMut;
use postgres_protocol::{
    authentication::{
        md5_hash,
        sasl::{ChannelBinding, SCRAM_SHA_256, ScramSha256},
    },
    message::frontend,
};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, RootCertStore, SignatureScheme,
    client::{
        WebPkiServerVerifier,
        danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier},
    },
    crypto::{CryptoProvider, aws_lc_rs, verify_tls12_signature, verify_tls13_signature},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime, pem::PemObject},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpSocket, TcpStream, UnixStream, lookup_host},
};
use tokio_rustls::{TlsConnector, client::TlsStream};

use crate::config::{Tls, TlsMode};

/// What of a message that is too long is kept.
pub const HEAD: usize = 64 * 1024;
/// The buffer, except while a longer message is in it.
const NORMAL: usize = 256 * 1024;
/// Less room than this at the end of the buffer is not worth a read.
const READ: usize = 64 * 1024;
/// The longest message before the stream: nothing that is asked there has long answers.
const ANSWER: usize = 1024 * 1024;
/// A message's tag and length.
const HEADER: usize = 5;

#[derive(Clone)]
pub struct Settings {
    /// A name, an address, or an absolute path: the folder of a Unix socket.
    pub host: String,
    pub port: u16,
    pub user: String,
    pub password: Option<String>,
    pub database: String,
    pub tls: Tls,
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
                let (read, write) = socket.into_split();
                (reader, writer) = (Box::new(read), Box::new(write));
            }
        }
        let writer = Writer { socket: writer, out: BytesMut::new() };
        let mut connection = Connection { reader: Reader::new(reader, ANSWER), writer };
        connection.login(settings).await?;
        Ok(connection)
    }

    async fn login(&mut self, settings: &Settings) -> Result<(), Error> {
        let fixed = [
            ("user", settings.user.as_str()),
            ("database", &settings.database),
            ("replication", "database"),
            ("client_encoding", "UTF8"),
        ];
        let more = settings.parameters.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        self.writer.write(|out| frontend::startup_message(fixed.into_iter().chain(more), out)).await?;
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

pub enum Message<'a> {
    /// The content of one CopyData.
    Data(&'a [u8]),
    /// A CopyData of `bytes` bytes, more than the limit: its first [`HEAD`] bytes. The rest is thrown away as
    /// it comes.
    Oversize { head: &'a [u8], bytes: usize },
    /// CopyDone: the server has ended the stream.
    Done,
}

/// The receiving side of a stream.
pub struct Reader {
    socket: Box<dyn AsyncRead + Send + Unpin>,
    /// `data[start..]` was received and not yet taken. Never grows by itself, see `room`.
    data: Vec<u8>,
    start: usize,
    /// How much of what comes next is thrown away.
    skip: usize,
    /// What the message at `start` needs in the buffer, if that is known and not yet there.
    need: usize,
    limit: usize,
}

impl Reader {
    fn new(socket: Box<dyn AsyncRead + Send + Unpin>, limit: usize) -> Reader {
        Reader { socket, data: Vec::with_capacity(NORMAL), start: 0, skip: 0, need: 0, limit }
    }

    /// The next message that is completely in the buffer. Never waits.
    #[expect(clippy::should_implement_trait, reason = "an iterator cannot lend from itself")]
    pub fn next(&mut self) -> Result<Option<Message<'_>>, Error> {
        if self.data.capacity() > NORMAL && self.need == 0 {
            self.room();
        }
        while let Some((tag, length)) = self.header()? {
            match tag {
                b'd' if length > self.limit => {
                    let head = self.take(length.min(HEAD), length);
                    return Ok(head.map(|head| Message::Oversize { head: &self.data[head], bytes: length }));
                }
                b'd' => {
                    let content = self.take(length, length);
                    return Ok(content.map(|content| Message::Data(&self.data[content])));
                }
                b'c' => {
                    self.take(0, length);
                    return Ok(Some(Message::Done));
                }
                // However long it may be, its head is enough to say what it is.
                b'E' => match self.take(length.min(HEAD), length) {
                    Some(content) => return Err(Error::server(&self.data[content])),
                    None => return Ok(None),
                },
                // Notices; and after the end of the stream, that the statement is complete.
                b'N' | b'S' | b'A' | b'C' | b'Z' => {
                    self.take(0, length);
                }
                _ => return Err(Error::unexpected(tag, "in the stream")),
            }
        }
        Ok(None)
    }

    /// Reads more into the buffer. Cancel safe.
    pub async fn fill(&mut self) -> Result<(), Error> {
        self.room();
        if self.data.len() == self.data.capacity() {
            // Full of messages that the caller has not taken yet; a read would make it grow.
            return Ok(());
        }
        match self.socket.read_buf(&mut self.data).await {
            Ok(0) => Err(Error::Closed),
            Ok(_) => Ok(()),
            Err(error) => Err(Error::lost(&error)),
        }
    }

    /// The tag and the content's length of the message at `start`.
    fn header(&mut self) -> Result<Option<(u8, usize)>, Error> {
        let skipped = self.skip.min(self.data.len() - self.start);
        self.start += skipped;
        self.skip -= skipped;
        let Some([tag, length @ ..]) = self.data[self.start..].first_chunk::<HEADER>() else {
            return Ok(None);
        };
        let length = i32::from_be_bytes(*length);
        match usize::try_from(length).ok().and_then(|length| length.checked_sub(4)) {
            Some(content) => Ok(Some((*tag, content))),
            None => Err(Error::Protocol(format!("a message of {length} bytes"))),
        }
    }

    /// Takes the message at `start`, once the first `wanted` of the `length` bytes of its content are there:
    /// their place in the buffer. The others are thrown away.
    fn take(&mut self, wanted: usize, length: usize) -> Option<Range<usize>> {
        let content = self.start + HEADER;
        if self.data.len() < content + wanted {
            self.need = HEADER + wanted;
            return None;
        }
        self.need = 0;
        self.start = content + wanted;
        self.skip = length - wanted;
        Some(content..self.start)
    }

    /// Makes room for a read, and gives back what a long message needed.
    fn room(&mut self) {
        let size = self.need.max(NORMAL);
        let room = self.data.capacity() - self.data.len();
        let fits = self.start + self.need <= self.data.capacity();
        if self.start == self.data.len() {
            self.data.clear();
            self.start = 0;
        } else if self.start > 0 && (room < READ || !fits || self.data.capacity() > size) {
            // Moves less than one message, and no byte twice, if all whole messages were taken.
            self.data.drain(..self.start);
            self.start = 0;
        }
        if self.data.capacity() > size {
            self.data.shrink_to(size);
        } else if self.data.capacity() < size {
            // Not `reserve`, which doubles: the memory is promised.
            self.data.reserve_exact(size - self.data.len());
        }
    }
}

/// The sending side of a stream.
pub struct Writer {
    socket: Box<dyn AsyncWrite + Send + Unpin>,
    /// What a cancelled call has not sent; the next one sends it first, so that no message is torn.
    out: BytesMut,
}

impl Writer {
    /// One CopyData, flushed.
    pub async fn send(&mut self, content: &[u8]) -> Result<(), Error> {
        self.write(|out| {
            frontend::CopyData::new(content)?.write(out);
            Ok(())
        })
        .await
    }

    /// CopyDone, so that the server ends the stream in its turn.
    pub async fn finish(&mut self) -> Result<(), Error> {
        self.write(|out| {
            frontend::copy_done(out);
            Ok(())
        })
        .await
    }

    async fn write(&mut self, encode: impl FnOnce(&mut BytesMut) -> io::Result<()>) -> Result<(), Error> {
        let before = self.out.len();
        if let Err(error) = encode(&mut self.out) {
            self.out.truncate(before);
            return Err(Error::Protocol(format!("a message that cannot be sent: {error}")));
        }
        self.socket.write_all_buf(&mut self.out).await.map_err(|error| Error::lost(&error))?;
        self.socket.flush().await.map_err(|error| Error::lost(&error))
    }
}

async fn dial(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    for address in lookup_host((host, port)).await? {
        let socket = if address.is_ipv4() { TcpSocket::new_v4()? } else { TcpSocket::new_v6()? };
        socket.set_keepalive(true)?;
        socket.set_nodelay(true)?;
        match socket.connect(address).await {
            Ok(stream) => return Ok(stream),
            Err(error) => failed = error,
        }
    }
    Err(failed)
}

/// Whether TLS comes next. As with sqlx, `prefer` goes without only if the server has none.
async fn offers_tls(socket: &mut TcpStream, mode: TlsMode) -> Result<bool, Error> {
    if mode == TlsMode::Disable {
        return Ok(false);
    }
    let mut request = BytesMut::new();
    frontend::ssl_request(&mut request);
    socket.write_all(&request).await.map_err(|error| Error::lost(&error))?;
    // This byte and no more: what follows it has to come through TLS.
    match socket.read_u8().await.map_err(|error| Error::lost(&error))? {
        b'S' => Ok(true),
        b'N' if mode == TlsMode::Prefer => Ok(false),
        b'N' => Err(Error::Tls("the server has it switched off".to_owned())),
        tag => Err(Error::unexpected(tag, "instead of an answer about TLS")),
    }
}

async fn handshake(socket: TcpStream, settings: &Settings) -> Result<TlsStream<TcpStream>, Error> {
    let failed = |error: io::Error| Error::Tls(error.to_string());
    let name = ServerName::try_from(settings.host.clone()).map_err(|error| Error::Tls(error.to_string()))?;
    let config = client_config(&settings.tls).await?;
    TlsConnector::from(Arc::new(config)).connect(name, socket).await.map_err(failed)
}

/// The meaning of the modes is sqlx's, and so are the roots, except that a CA file replaces them.
async fn client_config(tls: &Tls) -> Result<ClientConfig, Error> {
    let failed = |error: rustls::Error| Error::Tls(error.to_string());
    let provider = Arc::new(aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider.clone());
    let builder = builder.with_safe_default_protocol_versions().map_err(failed)?;
    let chain = match tls.mode {
        TlsMode::VerifyCa | TlsMode::VerifyFull => {
            let mut roots = RootCertStore::empty();
            match &tls.ca_file {
                Some(file) => {
                    for certificate in certificates(file).await? {
                        let added = roots.add(certificate);
                        added.map_err(|error| Error::Tls(format!("{}: {error}", file.display())))?;
                    }
                }
                None => roots.extend(webpki_roots::TLS_SERVER_ROOTS.iter().cloned()),
            }
            let chain = WebPkiServerVerifier::builder_with_provider(roots.into(), provider.clone()).build();
            Some(chain.map_err(|error| Error::Tls(error.to_string()))?)
        }
        TlsMode::Disable | TlsMode::Prefer | TlsMode::Require => None,
    };
    let builder = match chain {
        Some(chain) if tls.mode == TlsMode::VerifyFull => builder.with_webpki_verifier(chain),
        chain => builder.dangerous().with_custom_certificate_verifier(Arc::new(Lenient { chain, provider })),
    };
    match (&tls.cert_file, &tls.key_file) {
        (Some(cert), Some(key)) => {
            let pem = read(key).await?;
            let key = PrivateKeyDer::from_pem_slice(&pem)
                .map_err(|error| Error::Tls(format!("{}: {error}", key.display())))?;
            builder.with_client_auth_cert(certificates(cert).await?, key).map_err(failed)
        }
        (None, None) => Ok(builder.with_no_client_auth()),
        _ => Err(Error::Tls("a client certificate and its key go together".to_owned())),
    }
}

async fn read(file: &PathBuf) -> Result<Vec<u8>, Error> {
    tokio::fs::read(file).await.map_err(|error| Error::Tls(format!("{}: {error}", file.display())))
}

async fn certificates(file: &PathBuf) -> Result<Vec<CertificateDer<'static>>, Error> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(&read(file).await?).collect();
    match found {
        Ok(found) if found.is_empty() => Err(Error::Tls(format!("{}: no certificate in it", file.display()))),
        Ok(found) => Ok(found),
        Err(error) => Err(Error::Tls(format!("{}: {error}", file.display()))),
    }
}

/// Verifies the chain, but not the name; or nothing, without a chain.
#[derive(Debug)]
struct Lenient {
    chain: Option<Arc<WebPkiServerVerifier>>,
    provider: Arc<CryptoProvider>,
}

impl ServerCertVerifier for Lenient {
    fn verify_server_cert(
        &self,
        certificate: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let Some(chain) = &self.chain else { return Ok(ServerCertVerified::assertion()) };
        match chain.verify_server_cert(certificate, intermediates, name, ocsp, now) {
            // The name is looked at last, after the chain was found good.
            Err(rustls::Error::InvalidCertificate(
                CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. },
            )) => Ok(ServerCertVerified::assertion()),
            result => result,
        }
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls12_signature(message, certificate, signature, algorithms)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        let algorithms = &self.provider.signature_verification_algorithms;
        verify_tls13_signature(message, certificate, signature, algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Cursor;

    use proptest::prelude::*;

    use super::*;

    const LIMIT: usize = 1000;

    fn frame(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = i32::try_from(content.len() + 4).unwrap();
        [&[tag][..], &length.to_be_bytes(), content].concat()
    }

    /// Everything that a reader says, and the largest buffer that it had.
    async fn read_all(socket: impl AsyncRead + Send + Unpin + 'static, limit: usize) -> (Vec<String>, usize) {
        let mut reader = Reader::new(Box::new(socket), limit);
        let (mut said, mut largest) = (Vec::new(), 0);
        loop {
            largest = largest.max(reader.data.capacity());
            match reader.next() {
                Ok(Some(Message::Data(content))) => said.push(format!("data {}", content.escape_ascii())),
                Ok(Some(Message::Oversize { head, bytes })) => {
                    let x = head.iter().take_while(|byte| **byte == b'x').count();
                    said.push(format!("oversize {x} x of {bytes}"));
                }
                Ok(Some(Message::Done)) => said.push("done".to_owned()),
                Ok(None) => match reader.fill().await {
                    Ok(()) => {}
                    Err(error) => {
                        said.push(error.to_string());
                        return (said, largest);
                    }
                },
                Err(error @ Error::Server { .. }) => said.push(error.to_string()),
                Err(error) => {
                    said.push(error.to_string());
                    return (said, largest);
                }
            }
        }
    }

    const LOST: &str = "the connection to the server was lost";

    #[tokio::test]
    async fn frames_may_be_split_anywhere() {
        let error = b"SERROR\0C42704\0Mno such slot\0DIt is gone.\0HMake one.\0\0";
        let bytes = [
            frame(b'd', b"one"),
            frame(b'N', b"notice"),
            frame(b'd', b""),
            frame(b'E', error),
            frame(b'S', b"a\0b\0"),
            frame(b'c', b""),
        ]
        .concat();
        let server = "the server says: no such slot. It is gone. Make one. (SQLSTATE 42704)";
        for split in 0..=bytes.len() {
            let (first, second) = bytes.split_at(split);
            let socket = Cursor::new(first.to_vec()).chain(Cursor::new(second.to_vec()));
            let (said, _) = read_all(socket, LIMIT).await;
            assert_eq!(said, ["data one", "data ", server, "done", LOST], "split at {split}");
        }
    }

    #[tokio::test]
    async fn what_is_too_long_is_not_stored() {
        let bytes =
            [frame(b'd', &vec![b'x'; 5_000_000]), frame(b'd', &[b'x'; LIMIT + 1]), frame(b'd', b"next")];
        let (said, largest) = read_all(Cursor::new(bytes.concat()), LIMIT).await;
        assert_eq!(said, ["oversize 65536 x of 5000000", "oversize 1001 x of 1001", "data next", LOST]);
        assert_eq!(largest, NORMAL);
    }

    #[tokio::test]
    async fn a_long_message_gets_what_it_needs_and_gives_it_back() {
        let long = vec![b'x'; 5_000_000];
        let bytes = [frame(b'd', b"one"), frame(b'd', &long), frame(b'd', b"two")].concat();
        let mut reader = Reader::new(Box::new(Cursor::new(bytes)), long.len());
        let mut lengths = Vec::new();
        while lengths.len() < 3 {
            if let Some(Message::Data(content)) = reader.next().unwrap() {
                lengths.push(content.len());
            } else {
                reader.fill().await.unwrap();
                assert!([NORMAL, long.len() + HEADER].contains(&reader.data.capacity()));
            }
        }
        assert_eq!((lengths, reader.data.capacity()), (vec![3, long.len(), 3], NORMAL));
    }

    #[tokio::test]
    async fn lengths_that_lie_are_errors() {
        for length in [-1, 0, 3, i32::MIN] {
            let (said, _) = read_all(Cursor::new([&b"d"[..], &length.to_be_bytes()].concat()), LIMIT).await;
            assert_eq!(said, [format!("the replication protocol was broken: a message of {length} bytes")]);
        }
        for (tag, limit) in [(b'd', LIMIT), (b'E', usize::MAX), (b'N', usize::MAX)] {
            let bytes = [&[tag][..], &i32::MAX.to_be_bytes(), b"xxx"].concat();
            let (said, largest) = read_all(Cursor::new(bytes), limit).await;
            assert_eq!((said, largest), (vec![LOST.to_owned()], NORMAL));
        }
    }

    #[tokio::test]
    async fn a_cancelled_call_does_not_tear_a_message() {
        let (near, mut far) = tokio::io::duplex(4);
        let mut writer = Writer { socket: Box::new(near), out: BytesMut::new() };
        tokio::select! {
            biased;
            _ = writer.send(b"first") => panic!("there was no room for it"),
            () = std::future::ready(()) => {}
        }
        let mut received = Vec::new();
        let send = async move { writer.send(b"second").await };
        let (sent, read) = tokio::join!(send, far.read_to_end(&mut received));
        assert!(sent.is_ok() && read.is_ok());
        assert_eq!(received, [frame(b'd', b"first"), frame(b'd', b"second")].concat());
    }

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
            parameters: Vec::new(),
        };
        assert!(!format!("{settings:?}").contains("geheim"));
    }

    fn run(bytes: Vec<u8>, pieces: usize, limit: usize) -> (Vec<String>, usize) {
        let (near, mut far) = tokio::io::duplex(pieces);
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let write = async move { drop(far.write_all(&bytes).await) };
            tokio::join!(read_all(near, limit), write).0
        })
    }

    proptest! {
        #[test]
        fn no_bytes_break_a_reader(
            bytes in prop::collection::vec(prop_oneof![Just(0), Just(b'd'), Just(b'x'), any::<u8>()], 0..400),
            pieces in 1..100_usize,
            limit in 0..50_usize,
        ) {
            drop(row(&bytes));
            drop(Error::server(&bytes));
            let (_, largest) = run(bytes, pieces, limit);
            prop_assert!(largest == NORMAL);
        }

        #[test]
        fn frames_come_out_as_they_went_in(
            frames in prop::collection::vec((prop_oneof![Just(b'd'), Just(b'N'), Just(b'c')], 0..600_000_usize), 0..8),
            pieces in 1..300_000_usize,
            limit in 0..600_000_usize,
        ) {
            let mut bytes = Vec::new();
            let mut expected = Vec::new();
            for (tag, length) in frames {
                bytes.extend(frame(tag, &vec![b'x'; length]));
                match tag {
                    b'd' if length > limit => expected.push(format!("oversize {} x of {length}", length.min(HEAD))),
                    b'd' => expected.push(format!("data {}", "x".repeat(length))),
                    b'c' => expected.push("done".to_owned()),
                    _ => {}
                }
            }
            expected.push(LOST.to_owned());
            let (said, largest) = run(bytes, pieces, limit);
            prop_assert!(said == expected);
            prop_assert!(largest <= NORMAL.max(limit + HEADER));
        }
    }
}
