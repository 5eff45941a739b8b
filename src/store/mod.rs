//! Where payloads go that Kafka does not take: S3, Google Cloud Storage, Azure Blob Storage or a
//! folder, through the crate `object_store`.
//!
//! [`Store::put`] returns once the object is there as a whole, or not at all: the record that refers
//! to it is produced after that. Nothing here tries for ever: a [`StoreError`] says whether trying
//! again helps, and the relay decides when. `open` reads the configuration, `key` makes keys and URIs
//! that every reader takes, `crypto` is how requests are signed, `checked` whether
//! their content is, `multipart` uploads what is large, `purge` deletes what is below a prefix, `check`
//! tries everything and `bucket` asks S3 about its rules, `error` sorts what went wrong.

mod bucket;
mod check;
mod checked;
mod client;
mod crypto;
mod error;
mod key;
mod mend;
mod multipart;
mod open;
mod purge;

use std::{collections::BTreeMap, fmt, ops::Range, path::PathBuf, sync::Arc};

use bytes::{Bytes, BytesMut};
use futures_util::{StreamExt as _, TryStreamExt as _, stream, stream::BoxStream};
use object_store::{
    Attribute, Attributes, GetOptions, GetRange, ObjectMeta, ObjectStore, ObjectStoreExt as _, PutOptions,
    path::Path,
};

use self::{bucket::Bucket, client::Client};
pub use self::{
    check::{Topic, check},
    crypto::Hashed,
    error::StoreError,
    key::{is_safe_key, safe_key},
    open::is_in_the_clear,
    purge::Tally,
};

/// Up to here an object is put in one request.
const PUT_AT_ONCE: usize = 16 << 20;
/// What one request of a larger object carries, in either direction.
const PART: usize = 8 << 20;
/// Requests of one object at the same time.
const PARTS_IN_FLIGHT: usize = 4;

/// A bucket, a container or a folder, and the prefix in it. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    client: Arc<Client>,
    /// `s3://bucket`, without a slash at the end; `file://` for a folder.
    base: String,
    prefix: Path,
    /// The folder, which has to be there: the store would make it, on whatever disk is there instead.
    folder: Option<PathBuf>,
    /// S3 only: what `object_store` does not ask for.
    bucket: Option<Arc<Bucket>>,
}

/// An object of the store, as [`Store::list`] finds it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Object {
    pub key: String,
    pub size: u64,
}

impl fmt::Debug for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Store({self})")
    }
}

/// Its URL, as the configuration has it.
impl fmt::Display for Store {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base, key::encode(self.prefix.as_ref()))
    }
}

impl Store {
    /// `url` is s3://bucket/prefix, gs://bucket/prefix, az://container/prefix,
    /// abfss://container@account.dfs.core.windows.net/prefix or file:///folder. The options have the
    /// names of `object_store`; one that ends in `_file` names a file with the value of the option
    /// without that end. What no option says is taken from the environment (`AWS_*`, `GOOGLE_*`,
    /// `AZURE_*`) and, for credentials, from where the platform has them. Connects to nothing. Files that
    /// change while it is open are read again.
    pub fn open(url: &str, options: &BTreeMap<String, String>) -> Result<Store, StoreError> {
        let options = options.clone();
        open::open(url, move || options.clone())
    }

    /// The same with options that may change: `now` has them as they are when it is called.
    pub fn following(
        url: &str,
        now: impl Fn() -> BTreeMap<String, String> + Send + Sync + 'static,
    ) -> Result<Store, StoreError> {
        open::open(url, now)
    }

    /// Where the object of `key` is: what a record refers to.
    pub fn uri(&self, key: &str) -> String {
        format!("{}/{}", self.base, key::encode(&self.whole(key)))
    }

    /// The key of a URI that [`Store::uri`] made; `None` for one of another bucket or prefix.
    pub fn key_of(&self, uri: &str) -> Option<String> {
        let path = key::decode(uri.strip_prefix(&self.base)?.strip_prefix('/')?)?;
        let key = self.below(&path)?;
        self.path(key).ok().map(|_| key.to_owned())
    }

    /// Puts an object, over one of the same key. Once this returns it is there as a whole; where it
    /// fails, or is dropped, what was uploaded in parts is given up.
    pub async fn put(&self, key: &str, content: Bytes, content_type: &str) -> Result<(), StoreError> {
        let path = self.path(key)?;
        self.folder_is_there().await?;
        let attributes = match self.folder {
            // A file has no content type.
            Some(_) => Attributes::new(),
            None => Attributes::from_iter([(Attribute::ContentType, content_type.to_owned())]),
        };
        let done = if content.len() <= PUT_AT_ONCE {
            let options = PutOptions { attributes, ..PutOptions::default() };
            self.client.objects().put(&path, content, options).await.map(drop)
        } else {
            multipart::put(&self.objects(), &path, content, attributes).await
        };
        done.map_err(|error| StoreError::of(&error, &self.uri(key)))
    }

    /// The same for a content whose hash is known: what S3 is sent of it is not made once more.
    pub async fn put_hashed(&self, key: &str, hashed: Hashed, content_type: &str) -> Result<(), StoreError> {
        let content = hashed.content.clone();
        crypto::knowing(hashed, self.put(key, content, content_type)).await
    }

    /// The object that `uri` refers to, unless it has more than `at_most` bytes.
    pub async fn get(&self, uri: &str, at_most: u64) -> Result<Bytes, StoreError> {
        let path = self.path_of(uri)?;
        let failed = |error: object_store::Error| StoreError::of(&error, uri);
        let objects = self.objects();
        let found = objects.get(&path).await.map_err(failed)?;
        let (size, version) = (found.meta.size, found.meta.e_tag.clone());
        if size > at_most {
            return Err(StoreError::TooLarge { uri: uri.into(), size, at_most });
        }
        if size <= PUT_AT_ONCE as u64 {
            return found.bytes().await.map_err(failed);
        }
        drop(found);
        // In ranges, so that each request is short; of one version, or an overwrite would mix two.
        let mut parts = stream::iter(ranges(size))
            .map(|range| {
                let options = GetOptions {
                    range: Some(GetRange::Bounded(range)),
                    if_match: version.clone(),
                    ..GetOptions::default()
                };
                async { objects.get_opts(&path, options).await?.bytes().await }
            })
            .buffered(PARTS_IN_FLIGHT);
        let mut whole = BytesMut::with_capacity(size as usize);
        while let Some(part) = parts.try_next().await.map_err(failed)? {
            whole.extend_from_slice(&part);
        }
        Ok(whole.freeze())
    }

    /// How many bytes the object has that `uri` refers to.
    pub async fn size(&self, uri: &str) -> Result<u64, StoreError> {
        let found = self.objects().head(&self.path_of(uri)?).await;
        found.map(|meta| meta.size).map_err(|error| StoreError::of(&error, uri))
    }

    /// Deletes an object; that there is none is fine.
    pub async fn delete(&self, key: &str) -> Result<(), StoreError> {
        let path = self.path(key)?;
        match self.objects().delete(&path).await.map_err(|error| StoreError::of(&error, &self.uri(key))) {
            Err(StoreError::NotFound { .. }) => Ok(()),
            other => other,
        }
    }

    /// The objects in the folder `prefix`, at any depth; all of them where it is empty. A prefix is
    /// whole segments: `customer/4` does not find what is in `customer/42`.
    pub fn list(&self, prefix: &str) -> BoxStream<'_, Result<Object, StoreError>> {
        match self.folder_path(prefix) {
            Err(error) => stream::once(async { Err(error) }).boxed(),
            Ok(path) => {
                let uri = self.uri(prefix);
                let found =
                    self.objects().list(Some(&path)).map_err(move |error| StoreError::of(&error, &uri));
                found.try_filter_map(async |meta| Ok(self.object(&meta))).boxed()
            }
        }
    }

    fn objects(&self) -> Arc<dyn ObjectStore> {
        self.client.objects().all
    }

    fn object(&self, meta: &ObjectMeta) -> Option<Object> {
        Some(Object { key: self.below(meta.location.as_ref())?.to_owned(), size: meta.size })
    }

    /// The key with the prefix before it.
    fn whole(&self, key: &str) -> String {
        match self.prefix.as_ref() {
            "" => key.to_owned(),
            prefix => format!("{prefix}/{key}"),
        }
    }

    /// The key without the prefix before it.
    fn below<'a>(&self, path: &'a str) -> Option<&'a str> {
        match self.prefix.as_ref() {
            "" => Some(path),
            prefix => path.strip_prefix(prefix)?.strip_prefix('/'),
        }
    }

    fn path(&self, key: &str) -> Result<Path, StoreError> {
        let whole = self.whole(key);
        match Path::parse(&whole) {
            Ok(path) if !key.is_empty() && path.as_ref() == whole => Ok(path),
            _ => Err(StoreError::Misconfigured(format!("`{key}` cannot be the key of an object"))),
        }
    }

    fn folder_path(&self, prefix: &str) -> Result<Path, StoreError> {
        match prefix.trim_matches('/') {
            "" => Ok(self.prefix.clone()),
            prefix => self.path(prefix),
        }
    }

    fn path_of(&self, uri: &str) -> Result<Path, StoreError> {
        let foreign = || StoreError::Foreign { uri: uri.into(), store: self.to_string() };
        self.path(&self.key_of(uri).ok_or_else(foreign)?)
    }

    async fn folder_is_there(&self) -> Result<(), StoreError> {
        match &self.folder {
            Some(folder) if !tokio::fs::metadata(folder).await.is_ok_and(|found| found.is_dir()) => {
                Err(StoreError::NoSuchBucket { uri: self.to_string() })
            }
            _ => Ok(()),
        }
    }
}

/// The parts of an object of `size` bytes.
fn ranges(size: u64) -> impl Iterator<Item = Range<u64>> {
    (0..size).step_by(PART).map(move |start| start..(start + PART as u64).min(size))
}
