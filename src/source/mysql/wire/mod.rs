//! A connection that asks for the binlog: login, statements without rows, and the events, which are lent
//! from a buffer of a promised size.
//!
//! The driver of the other connections reads a binlog too. But it keeps an event whole, however long it is,
//! unpacks a compressed transaction into memory, whatever its size, and takes one that it cannot unpack for
//! an empty one. So only its packets of the login are used here. The format is from the MySQL
//! documentation, "Client/Server Protocol".

mod packets;

use std::io;

use mysql_common::{
    constants::CapabilityFlags,
    io::ParseBuf,
    packets::{AuthPlugin, AuthSwitchRequest, HandshakePacket, HandshakeResponse, SslRequest},
    proto::MySerialize,
};
use tokio::net::{TcpSocket, TcpStream, lookup_host};

pub use self::packets::{Packet, Parts, Reader};
use self::packets::{Socket, Writer};
use crate::{
    config::{Tls, TlsMode},
    source::tls::handshake,
};

/// The longest packet before the events.
const ANSWER: usize = 1 << 20;
/// What MySQL calls utf8mb4_general_ci.
const COLLATION: u8 = 45;

#[derive(Clone)]
pub struct Settings {
    pub host: String,
    pub port: u16,
    pub user: String,
    pub password: Option<String>,
    pub tls: Tls,
}

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("no connection to {server}: {io}")]
    Connect { server: String, io: io::Error },
    #[error("TLS with the server failed: {0}")]
    Tls(String),
    #[error("login at the server failed: {0}")]
    Auth(String),
    #[error("the server says: {message} (error {code})")]
    Server { code: u16, message: String },
    #[error("the connection to the server was lost")]
    Closed,
    #[error("the protocol was broken: {0}")]
    Protocol(&'static str),
}

impl Error {
    /// The content of an ERR packet: its number, perhaps a `#` and an SQL state, and a text.
    pub fn server(content: &[u8]) -> Error {
        let Some((code, text)) = content.split_first_chunk::<2>() else {
            return Error::Protocol("an error without a number");
        };
        let text = if text.first() == Some(&b'#') { text.get(6..).unwrap_or_default() } else { text };
        Error::Server { code: u16::from_le_bytes(*code), message: String::from_utf8_lossy(text).into_owned() }
    }
}

/// A connection before the events. A call that was cancelled leaves it unusable.
pub struct Connection {
    reader: Reader,
    writer: Writer,
}

impl Connection {
    pub async fn connect(settings: &Settings) -> Result<Connection, Error> {
        let mut socket = dial(&settings.host, settings.port).await.map_err(|io| {
            let server = format!("{}:{}", settings.host, settings.port);
            Error::Connect { server, io }
        })?;
        let greeting = packets::first(&mut socket).await?;
        if let [0xff, error @ ..] = &greeting[..] {
            return Err(Error::server(error));
        }
        let greeting: HandshakePacket<'_> =
            ParseBuf(&greeting).parse(()).map_err(|_| Error::Protocol("no greeting of a server"))?;
        let wanted = CapabilityFlags::CLIENT_LONG_PASSWORD
            | CapabilityFlags::CLIENT_PROTOCOL_41
            | CapabilityFlags::CLIENT_SECURE_CONNECTION
            | CapabilityFlags::CLIENT_PLUGIN_AUTH
            | CapabilityFlags::CLIENT_TRANSACTIONS;
        let mut flags = wanted & greeting.capabilities();
        let has_tls = greeting.capabilities().contains(CapabilityFlags::CLIENT_SSL);
        let secure = match settings.tls.mode {
            TlsMode::Disable => false,
            TlsMode::Prefer => has_tls,
            _ if has_tls => true,
            _ => return Err(Error::Tls("the server has it switched off".into())),
        };
        let socket: Box<dyn Socket> = if secure {
            flags |= CapabilityFlags::CLIENT_SSL;
            let mut request = Vec::new();
            SslRequest::new(flags, ANSWER as u32, COLLATION).serialize(&mut request);
            packets::send(&mut socket, &request, 1).await?;
            Box::new(handshake(socket, &settings.host, &settings.tls).await.map_err(Error::Tls)?)
        } else {
            Box::new(socket)
        };
        let (reader, writer) = packets::split(socket, ANSWER, if secure { 2 } else { 1 });
        let mut connection = Connection { reader, writer };
        let plugin = match greeting.auth_plugin() {
            Some(plugin @ AuthPlugin::CachingSha2Password) => plugin.into_owned(),
            _ => AuthPlugin::MysqlNativePassword,
        };
        let mut nonce = greeting.nonce();
        nonce.resize(20, 0);
        connection.login(settings, flags, plugin, nonce, secure).await?;
        Ok(connection)
    }

    async fn login(
        &mut self,
        settings: &Settings,
        flags: CapabilityFlags,
        mut plugin: AuthPlugin<'static>,
        mut nonce: Vec<u8>,
        secure: bool,
    ) -> Result<(), Error> {
        let password = settings.password.as_deref();
        let answer = scramble(&plugin, password, &nonce)?;
        let mut response = Vec::new();
        HandshakeResponse::new(
            Some(answer),
            (8, 0, 0),
            Some(settings.user.as_bytes()),
            None::<&[u8]>,
            Some(plugin.borrow()),
            flags,
            None,
            1 << 30,
        )
        .serialize(&mut response);
        self.writer.send(&response).await?;
        loop {
            let packet = self.packet().await?;
            match &packet[..] {
                [0, ..] => return Ok(()),
                [0xff, error @ ..] => return Err(Error::server(error)),
                [0xfe, _, ..] => {
                    let switch: AuthSwitchRequest<'_> =
                        ParseBuf(&packet).parse(()).map_err(|_| Error::Protocol("an unreadable login"))?;
                    plugin = switch.auth_plugin().into_owned();
                    nonce = switch.plugin_data().to_vec();
                    let answer = scramble(&plugin, password, &nonce)?;
                    self.writer.send(&answer).await?;
                }
                // caching_sha2_password: the server knows the password already.
                [1, 3] => {}
                // It wants it whole.
                [1, 4] if secure => {
                    let whole = [password.unwrap_or_default().as_bytes(), &[0]].concat();
                    self.writer.send(&whole).await?;
                }
                [1, 4] => {
                    // The pool's connections tell it, so that the server knows it the next time.
                    return Err(Error::Auth(
                        "the server does not have the password in its cache yet; a connection with TLS needs no \
                         cache"
                            .into(),
                    ));
                }
                _ => return Err(Error::Auth(format!("{plugin:?} is not supported"))),
            }
        }
    }

    /// A statement that returns no rows.
    pub async fn run(&mut self, statement: &str) -> Result<(), Error> {
        self.writer.command(0x03, statement.as_bytes()).await?;
        self.done().await
    }

    async fn done(&mut self) -> Result<(), Error> {
        match &self.packet().await?[..] {
            [0, ..] => Ok(()),
            [0xff, error @ ..] => Err(Error::server(error)),
            _ => Err(Error::Protocol("rows instead of an answer")),
        }
    }

    /// Asks for the binlog from this place on. Events above `limit` bytes are not kept.
    pub async fn dump(mut self, server_id: u32, file: &str, at: u32, limit: usize) -> Result<Reader, Error> {
        // COM_REGISTER_SLAVE, so that it is in the server's list of replicas: no name, user or password,
        // port, rank or master.
        let register = [&server_id.to_le_bytes()[..], &[0; 3 + 2 + 4 + 4]].concat();
        self.writer.command(0x15, &register).await?;
        self.done().await?;
        let dump = [&at.to_le_bytes()[..], &[0; 2], &server_id.to_le_bytes(), file.as_bytes()].concat();
        self.writer.command(0x12, &dump).await?;
        self.reader.keep(self.writer, limit);
        Ok(self.reader)
    }

    /// The next packet. It is copied: they are short before the events.
    async fn packet(&mut self) -> Result<Vec<u8>, Error> {
        loop {
            match self.reader.next_packet() {
                Some(Packet::Whole(packet)) => {
                    let packet = packet.to_vec();
                    self.writer.follow(self.reader.sequence());
                    return Ok(packet);
                }
                Some(Packet::Oversize { .. }) => {
                    return Err(Error::Protocol("a long packet before the events"));
                }
                None => self.reader.fill().await?,
            }
        }
    }
}

fn scramble(plugin: &AuthPlugin<'_>, password: Option<&str>, nonce: &[u8]) -> Result<Vec<u8>, Error> {
    match plugin {
        AuthPlugin::CachingSha2Password | AuthPlugin::MysqlNativePassword | AuthPlugin::Ed25519 => {
            let nonce = nonce.strip_suffix(&[0]).filter(|nonce| nonce.len() >= 20).unwrap_or(nonce);
            let data = plugin.gen_data(password, nonce);
            Ok(data.map(|data| data.to_vec()).unwrap_or_default())
        }
        other => Err(Error::Auth(format!("{} is not supported", String::from_utf8_lossy(other.as_bytes())))),
    }
}

async fn dial(host: &str, port: u16) -> io::Result<TcpStream> {
    let mut failed = io::Error::new(io::ErrorKind::NotFound, "the name has no address");
    let host = host.trim_start_matches('[').trim_end_matches(']');
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
