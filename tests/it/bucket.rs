//! A bucket of a test's own, on a real MinIO, and requests that no store of ours makes.

use std::collections::BTreeMap;

use base64::{Engine as _, prelude::BASE64_STANDARD};
use object_store::{
    ClientOptions,
    aws::{AwsAuthorizer, AwsCredential},
    client::{HttpConnector as _, HttpRequest, HttpRequestBody, ReqwestConnector},
};
use sha2::{Digest as _, Sha256};
use whippet::store::{Store, StoreError};

use crate::harness::service;

pub const REGION: &str = "us-east-1";

pub struct Bucket {
    pub name: String,
}

/// What MinIO answered.
#[derive(Debug)]
pub struct Answer {
    pub status: u16,
    pub headers: BTreeMap<String, String>,
    pub body: String,
}

impl Bucket {
    pub async fn new(name: &str) -> Bucket {
        let bucket = Bucket { name: format!("{name}-{}", uuid::Uuid::new_v4().simple()) };
        let made = bucket.call("PUT", "", "").await;
        assert_eq!(made.status, 200, "{made:?}");
        bucket
    }

    pub fn url(&self, prefix: &str) -> String {
        format!("s3://{}/{prefix}", self.name)
    }

    /// The options of an operator who may do everything.
    pub fn options() -> BTreeMap<String, String> {
        [
            ("endpoint", service("WHIPPET_TEST_S3")),
            ("region", REGION.to_owned()),
            ("access_key_id", service("WHIPPET_TEST_S3_KEY")),
            ("secret_access_key", service("WHIPPET_TEST_S3_SECRET")),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into()
    }

    /// The key `object_store` of a configuration, with other options than those.
    pub fn config(&self, prefix: &str, other: &[(&str, &str)]) -> String {
        let mut options = Bucket::options();
        options.extend(other.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        let options = serde_json::to_string(&options).unwrap();
        format!("object_store: {{ url: '{}', options: {options} }}\n", self.url(prefix))
    }

    /// A store in this bucket, with other options than those.
    pub fn open(&self, prefix: &str, other: &[(&str, &str)]) -> Result<Store, StoreError> {
        let mut options = Bucket::options();
        options.extend(other.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
        Store::open(&self.url(prefix), &options)
    }

    pub fn store(&self, prefix: &str) -> Store {
        self.open(prefix, &[]).unwrap()
    }

    /// By way of the proxy.
    pub fn proxied(&self, other: &[(&str, &str)]) -> Store {
        let endpoint = service("WHIPPET_TEST_S3_PROXIED");
        self.open("", &[&[("endpoint", endpoint.as_str())], other].concat()).unwrap()
    }

    /// A signed request about this bucket: `what` is a path and query below it.
    pub async fn call(&self, method: &str, what: &str, body: &str) -> Answer {
        self.call_with(method, what, body, &[]).await
    }

    pub async fn call_with(
        &self,
        method: &str,
        what: &str,
        body: &str,
        headers: &[(&'static str, &'static str)],
    ) -> Answer {
        let mut request = HttpRequest::new(HttpRequestBody::from(body.to_owned()));
        *request.method_mut() = method.parse().unwrap();
        *request.uri_mut() = format!("{}/{}{what}", service("WHIPPET_TEST_S3"), self.name).parse().unwrap();
        if !body.is_empty() {
            // Some requests are refused without one.
            let sum = BASE64_STANDARD.encode(Sha256::digest(body));
            request.headers_mut().insert("x-amz-checksum-sha256", sum.parse().unwrap());
        }
        for (name, value) in headers {
            request.headers_mut().insert(*name, value.parse().unwrap());
        }
        let credential = AwsCredential {
            key_id: service("WHIPPET_TEST_S3_KEY"),
            secret_key: service("WHIPPET_TEST_S3_SECRET"),
            token: None,
        };
        AwsAuthorizer::new(&credential, "s3", REGION).try_authorize(&mut request, None).unwrap();
        let client =
            ReqwestConnector::default().connect(&ClientOptions::new().with_allow_http(true)).unwrap();
        let (head, body) = client.execute(request).await.unwrap().into_parts();
        let headers = head.headers.iter();
        let headers = headers.map(|(name, value)| (name.to_string(), value.to_str().unwrap().to_owned()));
        Answer {
            status: head.status.as_u16(),
            headers: headers.collect(),
            body: String::from_utf8(body.bytes().await.unwrap().to_vec()).unwrap(),
        }
    }

    /// What anybody may do, without a signature: actions of S3 on all objects.
    pub async fn allow_anybody(&self, actions: &[&str]) {
        self.policy(&[(actions, "/*")]).await;
    }

    pub async fn allow_anybody_to_list(&self) {
        self.policy(&[(&["s3:ListBucket"], "")]).await;
    }

    async fn policy(&self, allowed: &[(&[&str], &str)]) {
        let statement = |(actions, what): &(&[&str], &str)| {
            serde_json::json!({
                "Effect": "Allow",
                "Principal": { "AWS": ["*"] },
                "Action": actions,
                "Resource": [format!("arn:aws:s3:::{}{what}", self.name)],
            })
        };
        let statements: Vec<_> = allowed.iter().map(statement).collect();
        let policy = serde_json::json!({ "Version": "2012-10-17", "Statement": statements });
        let set = self.call("PUT", "?policy=", &policy.to_string()).await;
        assert_eq!(set.status, 204, "{set:?}");
    }

    pub async fn keep_versions(&self) {
        let body = "<VersioningConfiguration><Status>Enabled</Status></VersioningConfiguration>";
        let set = self.call("PUT", "?versioning=", body).await;
        assert_eq!(set.status, 200, "{set:?}");
    }

    pub async fn expire_after(&self, days: u32, prefix: &str) {
        let body = format!(
            "<LifecycleConfiguration><Rule><ID>tidy</ID><Status>Enabled</Status><Filter><Prefix>{prefix}</Prefix>\
             </Filter><Expiration><Days>{days}</Days></Expiration></Rule></LifecycleConfiguration>"
        );
        let set = self.call("PUT", "?lifecycle=", &body).await;
        assert_eq!(set.status, 200, "{set:?}");
    }

    /// How many uploads of an object were begun and neither completed nor given up.
    pub async fn unfinished(&self, key: &str) -> usize {
        let listed = self.call("GET", &format!("?prefix={key}&uploads="), "").await;
        assert_eq!(listed.status, 200, "{listed:?}");
        listed.body.matches("<Upload>").count()
    }
}
