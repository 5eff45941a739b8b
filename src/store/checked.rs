//! Who checks what arrives at S3. A content's sha256 goes with it as a checksum, in a header that the signature covers; a
//! store that checks that says so in its answer. Where the content is signed as well, the store hashes it once more, to
//! compare the same hash with another header: a store that has shown that it checks is no longer asked for that.

use std::{
    fmt,
    pin::Pin,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
};

use bytes::Bytes;
use object_store::{
    ClientOptions, Error, ObjectStore, PutOptions, PutResult, Result,
    client::{
        HttpClient, HttpConnector, HttpError, HttpRequest, HttpResponse, HttpService, ReqwestConnector,
    },
    path::Path,
};

const CHECKSUM: &str = "x-amz-checksum-sha256";

/// What a store is used by.
#[derive(Clone)]
pub(super) struct Objects {
    pub all: Arc<dyn ObjectStore>,
    /// The same without signing what it sends.
    unsigned: Option<(Arc<dyn ObjectStore>, Checks)>,
}

impl Objects {
    pub fn new(all: Arc<dyn ObjectStore>) -> Objects {
        Objects { all, unsigned: None }
    }

    /// `unsigned` may send what has a checksum, once the store has shown that it checks that.
    pub fn with_unsigned(self, unsigned: Arc<dyn ObjectStore>, checks: Checks) -> Objects {
        Objects { unsigned: Some((unsigned, checks)), ..self }
    }

    /// An object in one request.
    pub async fn put(&self, path: &Path, content: Bytes, options: PutOptions) -> Result<PutResult> {
        if let Some((unsigned, checks)) = &self.unsigned
            && checks.are_made()
        {
            let put = unsigned.put_opts(path, content.clone().into(), options.clone()).await;
            match put {
                // A policy of the bucket may ask for signed contents.
                Err(Error::PermissionDenied { .. } | Error::Unauthenticated { .. }) => {
                    checks.do_not_suffice();
                }
                put => return put,
            }
        }
        self.all.put_opts(path, content.into(), options).await
    }
}

/// What the store's answers have shown.
#[derive(Clone, Debug, Default)]
pub(super) struct Checks {
    /// The last one to a content with a checksum had that checksum.
    made: Arc<AtomicBool>,
    /// What was not signed was denied.
    denied: Arc<AtomicBool>,
}

impl Checks {
    fn are_made(&self) -> bool {
        self.made.load(Ordering::Relaxed) && !self.denied.load(Ordering::Relaxed)
    }

    fn do_not_suffice(&self) {
        self.denied.store(true, Ordering::Relaxed);
    }
}

/// Keeps the client that a store is built with, so that whatever else asks it connects in the same way; and hears what the
/// store answers.
#[derive(Clone, Debug, Default)]
pub(super) struct Connector {
    client: Arc<Mutex<Option<HttpClient>>>,
    pub checks: Checks,
}

impl Connector {
    pub fn client(&self) -> Option<HttpClient> {
        self.client.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl HttpConnector for Connector {
    fn connect(&self, options: &ClientOptions) -> Result<HttpClient> {
        let client = ReqwestConnector::default().connect(options)?;
        let client = HttpClient::new(Listening { client, checks: self.checks.clone() });
        *self.client.lock().unwrap_or_else(PoisonError::into_inner) = Some(client.clone());
        Ok(client)
    }
}

struct Listening {
    client: HttpClient,
    checks: Checks,
}

impl fmt::Debug for Listening {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Listening")
    }
}

type Answer<'a> = Pin<Box<dyn Future<Output = Result<HttpResponse, HttpError>> + Send + 'a>>;

impl HttpService for Listening {
    fn call<'a, 'b>(&'a self, request: HttpRequest) -> Answer<'b>
    where
        'a: 'b,
        Self: 'b,
    {
        Box::pin(async move {
            let sent = request.headers().get(CHECKSUM).cloned();
            let answer = self.client.execute(request).await?;
            if let Some(sent) = sent.filter(|_| answer.status().is_success()) {
                self.checks.made.store(answer.headers().get(CHECKSUM) == Some(&sent), Ordering::Relaxed);
            }
            Ok(answer)
        })
    }
}
