//! Logins: of a connection of its own, and of a pool's. Whoever connects does so here.
//!
//! mysql_common 0.37 takes a zero at the end of a nonce for its terminator, which MariaDB's ed25519 does not have: one
//! login of 256 is refused, with the right password. So the first refusal is not believed. The next nonce is another
//! one, and two refusals in a row by chance are one of 65,536.

use futures_util::FutureExt as _;
use mysql_async::{Conn, Error, Opts, ToConnectionResult, Transaction, TxOpts, prelude::ToConnection};

/// ER_ACCESS_DENIED_ERROR.
const ACCESS_DENIED: u16 = 1045;

/// A connection of its own.
pub(super) async fn connect(options: &Opts) -> Result<Conn, Error> {
    logged_in(|| Conn::new(options.clone())).await
}

/// What `log_in` brings, or what it says the second time it is refused.
async fn logged_in<T, F>(log_in: impl Fn() -> F) -> Result<T, Error>
where
    F: Future<Output = Result<T, Error>>,
{
    match log_in().await {
        Err(Error::Server(error)) if error.code == ACCESS_DENIED => log_in().await,
        done => done,
    }
}

/// The driver's pool, which logs in whenever it has no connection at hand.
#[derive(Clone, Debug)]
pub struct Pool(mysql_async::Pool);

impl Pool {
    pub fn new(options: Opts) -> Pool {
        Pool(mysql_async::Pool::new(options))
    }

    pub async fn get_conn(&self) -> Result<Conn, Error> {
        logged_in(|| self.0.get_conn()).await
    }

    /// No statement that begins a transaction is denied with a login's code.
    pub async fn start_transaction(&self, options: TxOpts) -> Result<Transaction<'static>, Error> {
        logged_in(|| self.0.start_transaction(options.clone())).await
    }
}

impl<'a> ToConnection<'a, 'static> for &'a Pool {
    fn to_connection(self) -> ToConnectionResult<'a, 'static> {
        ToConnectionResult::Mediate(async { Ok(self.get_conn().await?.into()) }.boxed())
    }
}

#[cfg(test)]
mod tests {
    use std::{cell::Cell, future::ready};

    use mysql_async::{OptsBuilder, ServerError, prelude::Query as _};
    use tokio::{
        io::{AsyncReadExt as _, AsyncWriteExt as _},
        net::{TcpListener, TcpStream},
    };

    use super::*;

    fn server(code: u16) -> Error {
        Error::Server(ServerError { code, message: "no".into(), state: "28000".into() })
    }

    #[tokio::test]
    async fn a_login_that_is_refused_is_tried_once_more_and_nothing_else_is() {
        for (answers, tries, wanted) in [
            (vec![Ok(())], 1, None),
            (vec![Err(ACCESS_DENIED), Ok(())], 2, None),
            (vec![Err(ACCESS_DENIED), Err(ACCESS_DENIED)], 2, Some(ACCESS_DENIED)),
            // ER_CON_COUNT_ERROR
            (vec![Err(ACCESS_DENIED), Err(1040)], 2, Some(1040)),
            (vec![Err(1040)], 1, Some(1040)),
        ] {
            let tried = Cell::new(0);
            let log_in = || {
                let answer = answers[tried.replace(tried.get() + 1)];
                ready(answer.map_err(server))
            };
            let refused = match logged_in(log_in).await {
                Ok(()) => None,
                Err(Error::Server(error)) => Some(error.code),
                Err(error) => panic!("{error}"),
            };
            assert_eq!((refused, tried.get()), (wanted, tries), "{answers:?}");
        }
    }

    const DONE: &[u8] = b"\0\0\0\x02\0\0\0";
    const DENIED: &[u8] = b"\xff\x15\x04#28000Access denied";
    /// As MySQL 8 says hello: what it can do is of protocol 4.1, with a plugin for passwords.
    const HELLO: &[u8] = b"\x0a8.0.0\0\x01\0\0\0noncenon\0\x00\xa2\x2d\x02\0\x08\0\x15\0\0\0\0\0\0\0\0\0\0\
        cenoncenonce\0mysql_native_password\0";

    async fn say(stream: &mut TcpStream, number: u8, packet: &[u8]) {
        let length = u8::try_from(packet.len()).unwrap();
        stream.write_all(&[&[length, 0, 0, number], packet].concat()).await.unwrap();
    }

    /// The number of a packet that came. `None` where the client is gone.
    async fn hear(stream: &mut TcpStream) -> Option<u8> {
        let mut head = [0; 4];
        stream.read_exact(&mut head).await.ok()?;
        let length = u32::from_le_bytes([head[0], head[1], head[2], 0]);
        stream.read_exact(&mut vec![0; length as usize]).await.ok()?;
        Some(head[3])
    }

    /// A server that denies the first of every two logins, and to whom any statement is all right.
    async fn denies_the_first_of_two(listener: TcpListener) {
        for nth in 0.. {
            let (mut stream, _) = listener.accept().await.unwrap();
            say(&mut stream, 0, HELLO).await;
            let mut answer = if nth % 2 == 0 { DENIED } else { DONE };
            tokio::spawn(async move {
                while let Some(number) = hear(&mut stream).await {
                    say(&mut stream, number + 1, std::mem::replace(&mut answer, DONE)).await;
                }
            });
        }
    }

    #[tokio::test]
    async fn every_way_to_connect_believes_the_second_refusal_only() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let options: Opts = OptsBuilder::default()
            .ip_or_hostname("127.0.0.1")
            .tcp_port(listener.local_addr().unwrap().port())
            .prefer_socket(false)
            .max_allowed_packet(Some(1 << 20))
            .wait_timeout(Some(60))
            .into();
        tokio::spawn(denies_the_first_of_two(listener));
        let pool = || Pool::new(options.clone());

        let plain = Conn::new(options.clone()).await.map(drop);
        assert!(matches!(&plain, Err(Error::Server(error)) if error.code == ACCESS_DENIED), "{plain:?}");
        Conn::new(options.clone()).await.unwrap();

        connect(&options).await.unwrap();
        pool().get_conn().await.unwrap();
        "DO 1".ignore(&pool()).await.unwrap();
        pool().start_transaction(TxOpts::default()).await.unwrap().commit().await.unwrap();
    }
}
