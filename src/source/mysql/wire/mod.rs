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
    packets::{
        AuthPlugin, AuthSwitchRequest, ComBinlogDumpGtid, GnoInterval, HandshakePacket, HandshakeResponse,
        Sid, SslRequest, Tag,
    },
    proto::MySerialize,
};

pub use self::packets::{Packet, Parts, Reader};
use self::packets::{Socket, Writer};
use crate::{
    config::{Tls, TlsMode},
    source::{dial::dial, log::gtids::GtidSet, tls::handshake},
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
        connection.login(settings, flags, plugin, &greeting.nonce(), secure).await?;
        Ok(connection)
    }

    async fn login(
        &mut self,
        settings: &Settings,
        flags: CapabilityFlags,
        mut plugin: AuthPlugin<'static>,
        nonce: &[u8],
        secure: bool,
    ) -> Result<(), Error> {
        let password = settings.password.as_deref();
        let answer = scramble(&plugin, password, nonce)?;
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
                    let answer = scramble(&plugin, password, switch.plugin_data())?;
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

    /// Asks for the binlog. Events above `limit` bytes are not kept.
    pub async fn dump(mut self, server_id: u32, from: From<'_>, limit: usize) -> Result<Reader, Error> {
        // COM_REGISTER_SLAVE, so that it is in the server's list of replicas: no name, user or password,
        // port, rank or master.
        let register = [&server_id.to_le_bytes()[..], &[0; 3 + 2 + 4 + 4]].concat();
        self.writer.command(0x15, &register).await?;
        self.done().await?;
        match from {
            From::Place { file, at } => {
                let dump =
                    [&at.to_le_bytes()[..], &[0; 2], &server_id.to_le_bytes(), file.as_bytes()].concat();
                self.writer.command(0x12, &dump).await?;
            }
            From::Gtids(set) => {
                let sids = set.sources().map(|(source, intervals)| sid(source, intervals));
                let sids = sids.collect::<Option<Vec<Sid<'_>>>>();
                let sids = sids.ok_or(Error::Protocol("a set of GTIDs that cannot be asked for"))?;
                let mut dump = Vec::new();
                ComBinlogDumpGtid::new(server_id).with_pos(4).with_sids(sids).serialize(&mut dump);
                let (command, content) = dump.split_first().ok_or(Error::Protocol("nothing to be sent"))?;
                self.writer.command(*command, content).await?;
            }
        }
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

/// From where a binlog is sent.
#[derive(Clone, Copy, Debug)]
pub enum From<'a> {
    Place {
        file: &'a str,
        at: u32,
    },
    /// What is not in this set.
    Gtids(&'a GtidSet),
}

fn sid(source: &str, intervals: &[(u64, u64)]) -> Option<Sid<'static>> {
    let (uuid, tag) = source.split_once(':').map_or((source, None), |(uuid, tag)| (uuid, Some(tag)));
    let intervals = intervals.iter().map(|(first, last)| GnoInterval::new(*first, last + 1)).collect();
    let sid = Sid::new(*uuid::Uuid::parse_str(uuid).ok()?.as_bytes()).with_intervals(intervals);
    match tag {
        Some(tag) => Some(sid.with_tag(Tag::new(tag.to_owned()).ok()?)),
        None => Some(sid),
    }
}

/// The answer to a nonce. A zero at its end may have been cut as a terminator, or be one: it is as long as the plugin
/// has it.
fn scramble(plugin: &AuthPlugin<'_>, password: Option<&str>, nonce: &[u8]) -> Result<Vec<u8>, Error> {
    let length = match plugin {
        AuthPlugin::CachingSha2Password | AuthPlugin::MysqlNativePassword => 20,
        AuthPlugin::Ed25519 => 32,
        other => {
            let name = String::from_utf8_lossy(other.as_bytes());
            return Err(Error::Auth(format!("{name} is not supported")));
        }
    };
    let mut nonce = nonce.to_vec();
    nonce.resize(length, 0);
    Ok(plugin.gen_data(password, &nonce).map(|data| data.to_vec()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_nonce_that_ends_in_zero_is_answered_as_any_other() {
        for (plugin, length) in [
            (AuthPlugin::Ed25519, 32),
            (AuthPlugin::CachingSha2Password, 20),
            (AuthPlugin::MysqlNativePassword, 20),
        ] {
            let whole = [&vec![7; length - 1][..], &[0]].concat();
            let right = plugin.gen_data(Some("secret"), &whole).unwrap().to_vec();
            // As it is, without its zero, and with a terminator.
            for nonce in [&whole[..], &whole[..length - 1], &[&whole[..], &[0]].concat()] {
                assert_eq!(scramble(&plugin, Some("secret"), nonce).unwrap(), right, "{plugin:?} {nonce:?}");
            }
        }
    }
}
