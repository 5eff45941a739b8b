//! How a session asks for TLS.

use bytes::BytesMut;
use postgres_protocol::message::frontend;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::client::TlsStream;

use super::{Error, Settings};
use crate::{config::TlsMode, source::tls};

/// Whether TLS comes next. As with sqlx, `prefer` goes without only if the server has none.
pub(super) async fn offers_tls(socket: &mut TcpStream, mode: TlsMode) -> Result<bool, Error> {
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

pub(super) async fn handshake(socket: TcpStream, settings: &Settings) -> Result<TlsStream<TcpStream>, Error> {
    tls::handshake(socket, &settings.host, &settings.tls).await.map_err(Error::Tls)
}
