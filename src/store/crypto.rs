//! The sha256 of a payload, which S3 signs and checks, without making it again: it is in the payload's key already.

use aws_lc_rs::{digest, hmac};
use bytes::Bytes;
use object_store::{
    Error, Result,
    client::{CryptoProvider, DigestAlgorithm, DigestContext, HmacContext, Signer, SigningAlgorithm},
};

/// What is signed beside contents is no longer: a request without its body.
#[cfg(feature = "failpoints")]
const SIGNED: usize = 16 << 10;

/// A content and its sha256.
#[derive(Clone, Debug)]
pub struct Hashed {
    pub content: Bytes,
    pub sha256: [u8; 32],
}

tokio::task_local! {
    /// What the request is made of that this task makes now.
    static KNOWN: Hashed;
}

/// The requests that `made` makes take the hash of this content as it is.
pub async fn knowing<T>(hashed: Hashed, made: impl Future<Output = T>) -> T {
    KNOWN.scope(hashed, made).await
}

/// As `object_store` has it by default, but for what is known.
#[derive(Debug)]
pub struct Crypto;

impl CryptoProvider for Crypto {
    fn digest(&self, algorithm: DigestAlgorithm) -> Result<Box<dyn DigestContext>> {
        let DigestAlgorithm::Sha256 = algorithm else { return Err(unsupported()) };
        Ok(Box::new(Digest { hashing: digest::Context::new(&digest::SHA256), state: State::New }))
    }

    fn hmac(&self, algorithm: DigestAlgorithm, secret: &[u8]) -> Result<Box<dyn HmacContext>> {
        let DigestAlgorithm::Sha256 = algorithm else { return Err(unsupported()) };
        let key = hmac::Key::new(hmac::HMAC_SHA256, secret);
        Ok(Box::new(Hmac { hashing: hmac::Context::with_key(&key), tag: None }))
    }

    fn sign(&self, _: SigningAlgorithm, _: &[u8]) -> Result<Box<dyn Signer>> {
        Err(unsupported())
    }
}

fn unsupported() -> Error {
    Error::NotSupported { source: "S3 signs with HMAC-SHA256 alone".into() }
}

struct Digest {
    hashing: digest::Context,
    state: State,
}

enum State {
    New,
    /// All that came so far is this.
    Known(Hashed),
    Hashing,
    Done([u8; 32]),
}

impl DigestContext for Digest {
    fn update(&mut self, data: &[u8]) {
        match std::mem::replace(&mut self.state, State::Hashing) {
            State::New => {
                // The very same bytes, not equal ones: to compare them would take as long as to hash them.
                let is_this = |known: &Hashed| std::ptr::eq(&raw const known.content[..], data);
                let known = KNOWN.try_with(|known| Some(known).filter(|known| is_this(known)).cloned());
                if let Ok(Some(known)) = known {
                    self.state = State::Known(known);
                    return;
                }
            }
            // There is more than that.
            State::Known(known) => self.hashing.update(&known.content),
            State::Hashing | State::Done(_) => {}
        }
        fail::fail_point!("hashed-again", data.len() > SIGNED, |_| std::process::abort());
        self.hashing.update(data);
    }

    fn finish(&mut self) -> Result<&[u8]> {
        let sha256 = match &self.state {
            State::Known(known) => known.sha256,
            State::Done(sha256) => *sha256,
            State::New | State::Hashing => {
                let mut sha256 = [0; 32];
                sha256.copy_from_slice(self.hashing.clone().finish().as_ref());
                sha256
            }
        };
        self.state = State::Done(sha256);
        match &self.state {
            State::Done(sha256) => Ok(sha256),
            _ => Err(unsupported()),
        }
    }
}

struct Hmac {
    hashing: hmac::Context,
    tag: Option<hmac::Tag>,
}

impl HmacContext for Hmac {
    fn update(&mut self, data: &[u8]) {
        self.hashing.update(data);
    }

    fn finish(&mut self) -> Result<&[u8]> {
        Ok(hmac::Tag::as_ref(self.tag.insert(self.hashing.clone().sign())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::record::wire::{self, hex};

    fn sha256(pieces: &[&[u8]]) -> Vec<u8> {
        let mut digest = Crypto.digest(DigestAlgorithm::Sha256).unwrap();
        pieces.iter().for_each(|piece| digest.update(piece));
        digest.finish().unwrap().to_vec()
    }

    #[tokio::test]
    async fn what_is_known_is_not_hashed_and_everything_else_is() {
        let content = Bytes::from_static(b"content");
        let truth = wire::sha256(&content);
        // A hash that is none shows where it comes from.
        let hashed = Hashed { content: content.clone(), sha256: [7; 32] };
        knowing(hashed, async {
            assert_eq!(sha256(&[&content]), [7; 32]);
            let equal = content.to_vec();
            assert_eq!(sha256(&[&equal]), truth, "equal, but not the same");
            assert_eq!(sha256(&[&content[..4], &content[4..]]), truth, "a part");
            let twice = wire::sha256(b"contentcontent");
            assert_eq!(sha256(&[&content, &content]), twice, "more than that");
            assert_eq!(sha256(&[]), wire::sha256(b""));
        })
        .await;
        assert_eq!(sha256(&[&content]), truth, "in another request");
    }

    #[test]
    fn requests_are_signed_with_hmac() {
        // RFC 4231, test case 2.
        let mut hmac = Crypto.hmac(DigestAlgorithm::Sha256, b"Jefe").unwrap();
        [&b"what do ya want "[..], b"for nothing?"].iter().for_each(|piece| hmac.update(piece));
        let tag: [u8; 32] = hmac.finish().unwrap().try_into().unwrap();
        assert_eq!(hex(&tag), "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843");
    }
}
