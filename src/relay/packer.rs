//! Where payloads are packed: the work that must not stop the relay's loop, and the calls to the
//! object store. What to do was decided before, by [`Rules::packing`](crate::record::Rules::packing).

use std::sync::Arc;

use bytes::Bytes;
use tokio::sync::Semaphore;

use super::core::Job;
use crate::{
    record::{Form, Packed, Then, encode::Codec, wire},
    store::{Hashed, Store, StoreError},
};

/// Payloads that are worked on at once. The window bounds their bytes.
const AT_ONCE: usize = 32;
/// The object that shows whether the store takes anything.
const PROBE: &str = "whippet-probe";

/// Why a payload cannot travel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Unpacked {
    /// Not now: the object store is away.
    Away(String),
    Never {
        reason: String,
        /// It is too large, and nothing is wrong with the store.
        oversize: bool,
    },
}

#[derive(Clone, Debug)]
pub struct Packer {
    store: Option<Store>,
    at_once: Arc<Semaphore>,
}

impl Packer {
    pub fn new(store: Option<Store>) -> Packer {
        Packer { store, at_once: Arc::new(Semaphore::new(AT_ONCE)) }
    }

    /// Whether the store takes an object, and gives it back to be deleted. What it refuses for good is
    /// not this question's answer: the events say it.
    pub async fn probe(&self) -> Result<(), String> {
        let Some(store) = &self.store else { return Ok(()) };
        let put = store.put(PROBE, Bytes::from_static(b"whippet"), "text/plain").await;
        match put {
            Err(error) if error.is_transient() => return Err(error.to_string()),
            Ok(()) => {
                // The next one writes over it.
                store.delete(PROBE).await.ok();
            }
            Err(_) => {}
        }
        Ok(())
    }

    pub async fn pack(&self, job: Job) -> Result<Packed, Unpacked> {
        let _permit = self.at_once.acquire().await;
        let packing = job.packing;
        let (payload, inline) = (job.payload, packing.inline);
        let (content, encoding, hash) = on_a_thread(move || {
            let (content, encoding) = encoded(payload, packing.codec);
            let hash = (content.len() > inline).then(|| wire::sha256(&content));
            (content, encoding, hash)
        })
        .await?;
        let Some(hash) = hash else { return Ok(Packed { encoding, form: Form::Inline(content) }) };
        let size = content.len();
        let sha256 = wire::hex(&hash);
        let form = match packing.oversize {
            Then::Refuse { why } => {
                let encoded = encoding.map_or_else(String::new, |codec| format!(" after {codec}"));
                let reason = format!("the payload has {size} bytes{encoded}, and {why}");
                return Err(Unpacked::Never { reason, oversize: true });
            }
            Then::Chunk { event_id, bytes } => {
                let id = wire::chunk_id(&event_id, bytes, &hash);
                Form::Chunks { whole: content, each: bytes, id, sha256 }
            }
            Then::Refer { key, content_type } => {
                let Some(store) = &self.store else {
                    let reason = "no object_store is configured for its claim check".to_owned();
                    return Err(Unpacked::Never { reason, oversize: true });
                };
                let key = key.with(&sha256);
                fail::fail_point!("before-upload", |_| std::process::abort());
                let put = store.put_hashed(&key, Hashed { content, sha256: hash }, &content_type);
                put.await.map_err(|error| unpacked(&error))?;
                fail::fail_point!("uploaded", |_| std::process::abort());
                Form::Reference { uri: store.uri(&key), size, sha256 }
            }
        };
        Ok(Packed { encoding, form })
    }
}

/// Encoded, unless that does not make it smaller.
fn encoded(payload: Bytes, codec: Option<Codec>) -> (Bytes, Option<Codec>) {
    let Some(codec) = codec else { return (payload, None) };
    let content = codec.encode(&payload);
    if content.len() < payload.len() { (content.into(), Some(codec)) } else { (payload, None) }
}

/// Hashing and encoding take as long as the payload is large.
async fn on_a_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Unpacked> {
    tokio::task::spawn_blocking(work).await.map_err(|error| Unpacked::Away(error.to_string()))
}

fn unpacked(error: &StoreError) -> Unpacked {
    match error.is_transient() {
        true => Unpacked::Away(error.to_string()),
        false => Unpacked::Never { reason: error.to_string(), oversize: false },
    }
}
