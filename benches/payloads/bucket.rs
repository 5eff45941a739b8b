//! A bucket on MinIO, for the relay's store, for the crate beneath it, and for a configuration.

use std::collections::BTreeMap;

use anyhow::{Context as _, ensure};
use object_store::{
    ClientOptions,
    aws::{AmazonS3, AmazonS3Builder, AwsAuthorizer, AwsCredential},
    client::{HttpConnector as _, HttpRequest, HttpRequestBody, ReqwestConnector},
};
use whippet::store::Store;

const BUCKET: &str = "whippet-bench";
const REGION: &str = "us-east-1";

fn service(variable: &str) -> anyhow::Result<String> {
    std::env::var(variable).with_context(|| format!("{variable} is not set: run scripts/bench payloads"))
}

fn options() -> anyhow::Result<BTreeMap<String, String>> {
    Ok(BTreeMap::from([
        ("endpoint".to_owned(), service("WHIPPET_TEST_S3")?),
        ("region".to_owned(), REGION.to_owned()),
        ("access_key_id".to_owned(), service("WHIPPET_TEST_S3_KEY")?),
        ("secret_access_key".to_owned(), service("WHIPPET_TEST_S3_SECRET")?),
    ]))
}

/// The key `object_store` of a configuration.
pub fn config() -> anyhow::Result<String> {
    let options = serde_json::to_string(&options()?)?;
    Ok(format!("object_store: {{ url: 's3://{BUCKET}/', options: {options} }}\n"))
}

/// The relay's store, with other options than the needed ones.
pub fn open(other: &[(&str, &str)]) -> anyhow::Result<Store> {
    let mut options = options()?;
    options.extend(other.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())));
    Ok(Store::open(&format!("s3://{BUCKET}/"), &options)?)
}

/// The bound: the crate, as its documentation has it.
pub fn raw() -> anyhow::Result<AmazonS3> {
    Ok(AmazonS3Builder::new()
        .with_endpoint(service("WHIPPET_TEST_S3")?)
        .with_region(REGION)
        .with_access_key_id(service("WHIPPET_TEST_S3_KEY")?)
        .with_secret_access_key(service("WHIPPET_TEST_S3_SECRET")?)
        .with_bucket_name(BUCKET)
        .with_allow_http(true)
        .build()?)
}

pub async fn make() -> anyhow::Result<()> {
    let credential = AwsCredential {
        key_id: service("WHIPPET_TEST_S3_KEY")?,
        secret_key: service("WHIPPET_TEST_S3_SECRET")?,
        token: None,
    };
    let mut request = HttpRequest::new(HttpRequestBody::empty());
    *request.method_mut() = "PUT".parse()?;
    *request.uri_mut() = format!("{}/{BUCKET}", service("WHIPPET_TEST_S3")?).parse()?;
    AwsAuthorizer::new(&credential, "s3", REGION).try_authorize(&mut request, None)?;
    let client = ReqwestConnector::default().connect(&ClientOptions::new().with_allow_http(true))?;
    let status = client.execute(request).await?.status().as_u16();
    // 409: it is there.
    ensure!(matches!(status, 200 | 409), "cannot make bucket {BUCKET}: {status}");
    Ok(())
}
