//! One value, however large, in a buffer of its own size: nothing of it is moved once it is there.

use std::io;

use postgres_protocol::{
    IsNull,
    message::frontend::{self, BindError},
};

use super::{Connection, Error, HEAD};

/// Of a row: how many columns it has (two bytes), and how long the first is (four; -1: NULL).
const ROW_HEAD: usize = 6;

/// What a statement found that returns one column of one row at most.
#[derive(Debug, PartialEq, Eq)]
pub enum Value {
    NoRow,
    Null,
    Bytes(Vec<u8>),
}

impl Value {
    pub fn bytes(&self) -> usize {
        match self {
            Value::NoRow | Value::Null => 0,
            Value::Bytes(bytes) => bytes.len(),
        }
    }
}

impl Connection {
    /// What a statement with one parameter finds, as the server sends it in binary. After an error without a code
    /// the connection cannot be used any more.
    pub async fn value(&mut self, sql: &str, parameter: &str) -> Result<Value, Error> {
        let text = |parameter: &str, out: &mut bytes::BytesMut| {
            out.extend_from_slice(parameter.as_bytes());
            Ok(IsNull::No)
        };
        self.writer
            .write(|out| {
                frontend::parse("", sql, [], out)?;
                let (as_text, in_binary) = ([0], [1]);
                frontend::bind("", "", as_text, [parameter], text, in_binary, out).map_err(|error| {
                    match error {
                        BindError::Conversion(error) => io::Error::other(error),
                        BindError::Serialization(error) => error,
                    }
                })?;
                frontend::execute("", 0, out)?;
                frontend::sync(out);
                Ok(())
            })
            .await?;
        let (mut value, mut failed) = (Value::NoRow, None::<Error>);
        loop {
            match self.reader.header()? {
                Some((b'D', length)) if length >= ROW_HEAD => {
                    if let Some(head) = self.reader.take(ROW_HEAD, length) {
                        let is_null = self.reader.data[head].ends_with(&(-1_i32).to_be_bytes());
                        let bytes = self.reader.rest().await?;
                        value = if is_null { Value::Null } else { Value::Bytes(bytes) };
                        continue;
                    }
                }
                Some((b'E', length)) => {
                    if let Some(content) = self.reader.take(length.min(HEAD), length) {
                        failed = Some(Error::server(&self.reader.data[content]));
                        continue;
                    }
                }
                Some((b'Z', length)) => {
                    self.reader.take(0, length);
                    return failed.map_or(Ok(value), Err);
                }
                // Parsed, bound, done; and notices.
                Some((b'1' | b'2' | b'C' | b'N' | b'S' | b'A', length)) => {
                    self.reader.take(0, length);
                    continue;
                }
                Some((tag, _)) => return Err(Error::unexpected(tag, "instead of a value")),
                None => {}
            }
            match (self.reader.fill().await, failed.take()) {
                // After a fatal error the server closes the connection; the error says why.
                (Err(Error::Closed), Some(why)) => return Err(Error::Ended(why.to_string())),
                (filled, before) => {
                    failed = before;
                    filled?;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncWriteExt as _;

    use super::*;
    use crate::source::postgres::wire::{ANSWER, Reader, Writer};

    fn frame(tag: u8, content: &[u8]) -> Vec<u8> {
        let length = i32::try_from(content.len() + 4).unwrap();
        [&[tag][..], &length.to_be_bytes(), content].concat()
    }

    fn row(value: Option<&[u8]>) -> Vec<u8> {
        let length = value.map_or(-1, |value| i32::try_from(value.len()).unwrap());
        frame(b'D', &[&[0, 1][..], &length.to_be_bytes(), value.unwrap_or_default()].concat())
    }

    /// What is made of these answers, one to each question, that come in pieces of so many bytes.
    async fn values(answers: &[Vec<u8>], pieces: usize) -> Vec<Result<Value, Error>> {
        let (near, far) = tokio::io::duplex(pieces);
        let (read, write) = tokio::io::split(near);
        let mut connection =
            Connection { reader: Reader::new(Box::new(read), ANSWER), writer: Writer::new(Box::new(write)) };
        let (mut questions, mut answering) = tokio::io::split(far);
        tokio::spawn(async move { tokio::io::copy(&mut questions, &mut tokio::io::sink()).await });
        let bytes = answers.concat();
        tokio::spawn(async move {
            answering.write_all(&bytes).await?;
            answering.shutdown().await
        });
        let mut found = Vec::new();
        for _ in answers {
            found.push(connection.value("SELECT", "1").await);
        }
        found
    }

    #[tokio::test]
    async fn a_value_of_any_size_comes_whole_and_the_next_one_after_it() {
        let (begin, end) = ([frame(b'1', b""), frame(b'2', b"")].concat(), frame(b'Z', b"I"));
        let done = [frame(b'C', b"SELECT 1\0"), end.clone()].concat();
        let large = vec![7; 700_000];
        let refused = frame(b'E', b"SERROR\0C57014\0Mcanceled\0\0");
        for pieces in [13, 4_096, 1 << 20] {
            let answers = [
                [begin.clone(), row(Some(&large)), done.clone()].concat(),
                [begin.clone(), row(None), done.clone()].concat(),
                [begin.clone(), frame(b'N', b"x\0"), row(Some(b"")), done.clone()].concat(),
                [begin.clone(), done.clone()].concat(),
                [begin.clone(), refused.clone(), end.clone()].concat(),
                [begin.clone(), row(Some(b"last")), done.clone()].concat(),
            ];
            let found = values(&answers, pieces).await;
            let [first, null, empty, none, error, last] = &found[..] else { panic!("{found:?}") };
            assert!(
                matches!(first, Ok(Value::Bytes(bytes)) if *bytes == large && bytes.capacity() == large.len())
            );
            assert!(matches!(null, Ok(Value::Null)) && matches!(none, Ok(Value::NoRow)), "{null:?} {none:?}");
            assert!(matches!(empty, Ok(Value::Bytes(bytes)) if bytes.is_empty()), "{empty:?}");
            assert_eq!(error.as_ref().unwrap_err().code(), Some("57014"));
            assert!(matches!(last, Ok(Value::Bytes(bytes)) if bytes == b"last"), "{last:?}");
        }
    }

    #[tokio::test]
    async fn a_connection_that_ends_within_a_value_has_none() {
        let whole = row(Some(&vec![7; 100_000]));
        for end in [3, 8, 50_000] {
            let found = values(&[whole[..end].to_vec()], 1 << 20).await;
            assert!(matches!(found[..], [Err(Error::Closed)]), "{found:?}");
        }
        let fatal = frame(b'E', b"SFATAL\0C57P05\0Mterminated for being idle\0\0");
        let found = values(&[fatal], 1 << 20).await;
        let [Err(error @ Error::Ended(_))] = &found[..] else { panic!("{found:?}") };
        let said = "the server has ended the connection: the server says: terminated for being idle (SQLSTATE 57P05)";
        assert_eq!((error.code(), error.to_string().as_str()), (None, said));
    }
}
