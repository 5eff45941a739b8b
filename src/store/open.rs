//! A URL and options become a store.

use std::{collections::BTreeMap, path::PathBuf, str::FromStr, sync::Arc, time::Duration};

use object_store::{
    BackoffConfig, ClientConfigKey, ObjectStore, RetryConfig,
    aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey},
    azure::{AzureConfigKey, MicrosoftAzureBuilder},
    gcp::{GoogleCloudStorageBuilder, GoogleConfigKey},
    local::LocalFileSystem,
    path::Path,
};
use url::{Host, Url};

use super::{
    Store, StoreError,
    bucket::Bucket,
    checked::{Connector, Objects},
    client::Client,
    crypto::Crypto,
    key,
};

pub(super) type Options = BTreeMap<String, String>;

/// How long a request may take, where no option says it. It carries 16 MiB at most.
const TIMEOUTS: [(ClientConfigKey, &str); 2] =
    [(ClientConfigKey::ConnectTimeout, "5s"), (ClientConfigKey::Timeout, "60s")];

/// Options that a user is likely to mean, for messages: of every store, and of each.
const COMMON: &[&str] =
    &["allow_http", "connect_timeout", "timeout", "proxy_url", "proxy_ca_certificate", "proxy_excludes"];
const S3_OPTIONS: &[&str] = &[
    "access_key_id",
    "secret_access_key",
    "session_token",
    "region",
    "endpoint",
    "virtual_hosted_style_request",
    "unsigned_payload",
    "checksum_algorithm",
    "web_identity_token_file",
    "role_arn",
    "role_session_name",
    "endpoint_url_sts",
    "container_credentials_full_uri",
    "container_authorization_token_file",
    "metadata_endpoint",
    "imdsv1_fallback",
    "skip_signature",
    "disable_bulk_delete",
    "request_payer",
    "server_side_encryption",
    "sse_kms_key_id",
    "sse_bucket_key_enabled",
    "sse_customer_key_base64",
];
const GCS_OPTIONS: &[&str] =
    &["service_account", "service_account_key", "application_credentials", "base_url", "skip_signature"];
const AZURE_OPTIONS: &[&str] = &[
    "account_name",
    "access_key",
    "sas_token",
    "client_id",
    "client_secret",
    "tenant_id",
    "authority_host",
    "federated_token_file",
    "msi_endpoint",
    "endpoint",
    "use_emulator",
    "skip_signature",
];

/// `now` has the options as they are when it is called.
pub(super) fn open(
    url: &str,
    now: impl Fn() -> Options + Send + Sync + 'static,
) -> Result<Store, StoreError> {
    let url = Url::parse(url).map_err(|error| wrong("url", format!("not a URL: {error}")))?;
    if url.password().is_some() || (url.scheme() != "abfss" && !url.username().is_empty()) {
        return Err(wrong("url", "it has credentials in it; put them into object_store.options"));
    }
    if url.query().is_some() || url.fragment().is_some() {
        return Err(wrong("url", "more than a bucket and a prefix; leave out ? and #"));
    }
    let base = match (url.scheme(), url.host_str()) {
        ("file", None) => "file://".to_owned(),
        (scheme @ ("s3" | "gs" | "az" | "abfss"), Some(host)) => match url.username() {
            "" => format!("{scheme}://{host}"),
            container => format!("{scheme}://{container}@{host}"),
        },
        _ => {
            return Err(wrong(
                "url",
                "expected s3://bucket/prefix, gs://bucket/prefix, az://container/prefix, \
                 abfss://container@account.dfs.core.windows.net/prefix or file:///folder",
            ));
        }
    };
    let prefix = key::decode(url.path().trim_matches('/')).and_then(|path| Path::parse(path).ok());
    let prefix = prefix.ok_or_else(|| wrong("url", "the prefix has a segment that is empty or dots"))?;
    let options = with_files_read(&now())?;
    let scheme = url.scheme().to_owned();
    let (objects, bucket) = connect(&scheme, &base, &prefix, &options)?;
    let folder = (scheme == "file").then(|| PathBuf::from(format!("/{prefix}")));
    let again = {
        let (base, prefix) = (base.clone(), prefix.clone());
        move |options: &Options| connect(&scheme, &base, &prefix, options).map(|(objects, _)| objects)
    };
    let read = move || with_files_read(&now());
    let client = Arc::new(Client::new(objects, options, Box::new(read), Box::new(again)));
    Ok(Store { client, base, prefix, folder, bucket })
}

type Connected = (Objects, Option<Arc<Bucket>>);

fn connect(scheme: &str, base: &str, prefix: &Path, options: &Options) -> Result<Connected, StoreError> {
    Ok(match scheme {
        "s3" => {
            let S3 { signed, unsigned, connector } = s3(base, options)?;
            let bucket = Bucket::new(signed.clone(), &connector, base);
            let objects = Objects::new(Arc::new(signed));
            let objects = match unsigned {
                Some(unsigned) => objects.with_unsigned(Arc::new(unsigned), connector.checks),
                None => objects,
            };
            (objects, Some(Arc::new(bucket)))
        }
        "gs" => (Objects::new(gcs(base, options)?), None),
        "az" | "abfss" => (Objects::new(azure(base, options)?), None),
        _ => (Objects::new(folder(prefix, options)?), None),
    })
}

struct S3 {
    signed: AmazonS3,
    /// The same for what is sent with its sha256 as a checksum, unless an option says how that is to be.
    unsigned: Option<AmazonS3>,
    connector: Connector,
}

fn s3(base: &str, options: &Options) -> Result<S3, StoreError> {
    type Key = AmazonS3ConfigKey;
    let connector = Connector::default();
    let mut builder = AmazonS3Builder::from_env()
        .with_retry(retry())
        .with_http_connector(connector.clone())
        .with_crypto_provider(Arc::new(Crypto));
    for (key, value) in TIMEOUTS {
        builder = builder.with_config(Key::Client(key), value);
    }
    // The digest of a payload is made for its signature anyway. As a checksum it costs nothing more, the
    // store keeps it, and looks at the parts of large objects too.
    if builder.get_config_value(&Key::Checksum).is_none() {
        builder = builder.with_config(Key::Checksum, "sha256");
    }
    let mut says_what_is_signed = false;
    for (key, value) in keys::<Key>(options, S3_OPTIONS)? {
        match key {
            Key::Bucket => return Err(wrong("options", "the bucket stands in object_store.url")),
            // What the environment says for S3 alone would win over the option.
            Key::Endpoint => builder = builder.with_config(Key::S3Endpoint, value.clone()),
            Key::UnsignedPayload | Key::SkipSignature => says_what_is_signed = true,
            _ => {}
        }
        builder = builder.with_config(key, value);
    }
    let endpoint = builder.get_config_value(&Key::S3Endpoint).or(builder.get_config_value(&Key::Endpoint));
    let allowed = builder.get_config_value(&Key::Client(ClientConfigKey::AllowHttp));
    if is_plain(endpoint.as_deref(), allowed.as_deref(), options)? {
        builder = builder.with_allow_http(true);
    }
    let builder = builder.with_url(base);
    let has_sha256 =
        builder.get_config_value(&Key::Checksum).is_some_and(|name| name.eq_ignore_ascii_case("sha256"));
    let signed = built(builder.clone().build(), options)?;
    let unsigned = (has_sha256 && !says_what_is_signed).then(|| {
        let builder = builder.with_unsigned_payload(true).with_credentials(signed.credentials().clone());
        built(builder.build(), options)
    });
    Ok(S3 { signed, unsigned: unsigned.transpose()?, connector })
}

fn gcs(base: &str, options: &Options) -> Result<Arc<dyn ObjectStore>, StoreError> {
    type Key = GoogleConfigKey;
    let mut builder = GoogleCloudStorageBuilder::from_env().with_retry(retry());
    for (key, value) in TIMEOUTS {
        builder = builder.with_config(Key::Client(key), value);
    }
    let mut allowed = None;
    for (key, value) in keys::<Key>(options, GCS_OPTIONS)? {
        match key {
            Key::Bucket => return Err(wrong("options", "the bucket stands in object_store.url")),
            Key::Client(ClientConfigKey::AllowHttp) => allowed = Some(value.clone()),
            _ => {}
        }
        builder = builder.with_config(key, value);
    }
    if is_plain(builder.get_config_value(&Key::BaseUrl).as_deref(), allowed.as_deref(), options)? {
        builder = builder.with_config(Key::Client(ClientConfigKey::AllowHttp), "true");
    }
    Ok(Arc::new(built(builder.with_url(base).build(), options)?))
}

fn azure(base: &str, options: &Options) -> Result<Arc<dyn ObjectStore>, StoreError> {
    type Key = AzureConfigKey;
    let mut builder = MicrosoftAzureBuilder::from_env().with_retry(retry());
    for (key, value) in TIMEOUTS {
        builder = builder.with_config(Key::Client(key), value);
    }
    for (key, value) in keys::<Key>(options, AZURE_OPTIONS)? {
        if key == Key::ContainerName {
            return Err(wrong("options", "the container stands in object_store.url"));
        }
        builder = builder.with_config(key, value);
    }
    let endpoint = builder.get_config_value(&Key::Endpoint);
    let allowed = builder.get_config_value(&Key::Client(ClientConfigKey::AllowHttp));
    if is_plain(endpoint.as_deref(), allowed.as_deref(), options)? {
        builder = builder.with_allow_http(true);
    }
    Ok(Arc::new(built(builder.with_url(base).build(), options)?))
}

fn folder(path: &Path, options: &Options) -> Result<Arc<dyn ObjectStore>, StoreError> {
    if path.as_ref().is_empty() {
        return Err(wrong("url", "expected a folder, such as file:///var/lib/whippet/payloads"));
    }
    match options.keys().next() {
        Some(name) => Err(wrong(&format!("options.{name}"), "a folder takes no options")),
        // The record that refers to the object is there for good; so shall be the object.
        None => Ok(Arc::new(LocalFileSystem::new().with_fsync(true))),
    }
}

/// Hides a blip; whatever is longer is for the caller.
fn retry() -> RetryConfig {
    let backoff = BackoffConfig { max_backoff: Duration::from_secs(2), ..BackoffConfig::default() };
    RetryConfig { backoff, max_retries: 2, retry_timeout: Duration::from_secs(10) }
}

/// Whether what goes to this URL can be read by anybody on the way: plain HTTP to another machine.
pub fn is_in_the_clear(url: &str) -> bool {
    let Ok(url) = Url::parse(url) else { return false };
    let is_loopback = match url.host() {
        Some(Host::Domain(name)) => name == "localhost",
        Some(Host::Ipv4(ip)) => ip.is_loopback(),
        Some(Host::Ipv6(ip)) => ip.is_loopback(),
        None => false,
    };
    url.scheme() == "http" && !is_loopback
}

/// The options as `object_store` knows them; `likely` are the names for messages.
fn keys<Key: FromStr>(options: &Options, likely: &[&str]) -> Result<Vec<(Key, String)>, StoreError> {
    let key = |(name, value): (&String, &String)| match name.parse() {
        Ok(key) => Ok((key, value.clone())),
        Err(_) => Err(wrong(&format!("options.{name}"), unknown(name, likely))),
    };
    options.iter().map(key).collect()
}

fn unknown(name: &str, likely: &[&str]) -> String {
    let score = |known: &str| {
        let bare = |name: &str| name.trim_start_matches("aws_").replace('_', "").to_lowercase();
        strsim::jaro_winkler(&bare(name), &bare(known))
    };
    let mut near: Vec<(f64, &str)> = likely
        .iter()
        .chain(COMMON)
        .map(|known| (score(known), *known))
        .filter(|(score, _)| *score > 0.8)
        .collect();
    near.sort_by(|a, b| b.0.total_cmp(&a.0));
    match near.iter().take(3).map(|(_, name)| format!("`{name}`")).collect::<Vec<_>>() {
        near if near.is_empty() => {
            let all: Vec<&str> = likely.iter().chain(COMMON).copied().collect();
            format!("unknown option; expected one of {}", all.join(", "))
        }
        near => format!("unknown option; did you mean {}?", near.join(" or ")),
    }
}

/// `NAME_file: PATH` becomes `NAME: what the file has`, unless it is an option of its own.
fn with_files_read(options: &Options) -> Result<Options, StoreError> {
    let its_own = |name: &str| {
        name.parse::<AmazonS3ConfigKey>().is_ok()
            || name.parse::<AzureConfigKey>().is_ok()
            || name.parse::<GoogleConfigKey>().is_ok()
    };
    let read = |(name, value): (&String, &String)| match name.strip_suffix("_file") {
        Some(plain) if !its_own(name) => match std::fs::read_to_string(value) {
            // An editor or `echo` ends the file with a newline that is no part of the secret.
            Ok(text) => Ok((plain.to_owned(), text.trim_end_matches(['\r', '\n']).to_owned())),
            Err(error) => Err(wrong(&format!("options.{name}"), format!("{value} cannot be read: {error}"))),
        },
        _ => Ok((name.clone(), value.clone())),
    };
    options.iter().map(read).collect()
}

/// Whether requests go out in the clear, because the endpoint says so.
fn is_plain(endpoint: Option<&str>, allowed: Option<&str>, options: &Options) -> Result<bool, StoreError> {
    let Some(endpoint) = endpoint else { return Ok(false) };
    let url = Url::parse(endpoint).ok().filter(Url::has_host);
    let url = url.ok_or_else(|| wrong("options.endpoint", "not a URL such as https://host"))?;
    if !url.username().is_empty() || url.password().is_some() {
        return Err(wrong("options.endpoint", "it has credentials in it; use options for them"));
    }
    let is_allowed = allowed.is_some_and(|value| matches!(value, "true" | "1" | "on" | "yes" | "y"));
    let is_forbidden = !is_allowed && options.keys().any(|name| name.ends_with("allow_http"));
    match url.scheme() {
        "https" => Ok(false),
        "http" if is_forbidden => Err(wrong("options.endpoint", "it is http://, and allow_http is false")),
        "http" => Ok(true),
        _ => Err(wrong("options.endpoint", "not a URL such as https://host")),
    }
}

/// Its sentences may repeat the value of an option, which may be a secret.
fn built<T>(built: object_store::Result<T>, options: &Options) -> Result<T, StoreError> {
    built.map_err(|error| {
        let mut text = error.to_string();
        let mut named = String::new();
        for (name, value) in options {
            if text.contains(&format!("{value:?}")) || (value.len() > 3 && text.contains(value)) {
                named = format!(".{name}");
                text = text.replace(value, "…");
            }
        }
        wrong(&format!("options{named}"), text)
    })
}

/// `key` is one below `object_store` in the configuration.
fn wrong(key: &str, text: impl std::fmt::Display) -> StoreError {
    StoreError::Misconfigured(format!("object_store.{key}: {text}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn opened(url: &str, options: &[(&str, &str)]) -> Result<Store, String> {
        let options: Options = options.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        open(url, move || options.clone()).map_err(|error| error.to_string())
    }

    #[test]
    fn every_likely_option_is_one() {
        let common = COMMON.iter().copied();
        for name in S3_OPTIONS.iter().copied().chain(common.clone()) {
            assert!(name.parse::<AmazonS3ConfigKey>().is_ok(), "{name}");
        }
        for name in GCS_OPTIONS.iter().copied().chain(common.clone()) {
            assert!(name.parse::<GoogleConfigKey>().is_ok(), "{name}");
        }
        for name in AZURE_OPTIONS.iter().copied().chain(common) {
            assert!(name.parse::<AzureConfigKey>().is_ok(), "{name}");
        }
    }

    #[test]
    fn every_kind_of_store_opens_without_connecting() {
        let azure = [("account_name", "shop"), ("access_key", "c2VjcmV0")];
        for (url, options, uri) in [
            ("s3://bucket/a/b", &[("region", "eu-west-1")][..], "s3://bucket/a/b/k"),
            ("s3://bucket", &[("aws_endpoint", "http://127.0.0.1:9000")], "s3://bucket/k"),
            ("s3://bucket/", &[("endpoint", "http://minio:9000"), ("allow_http", "true")], "s3://bucket/k"),
            ("s3://bucket/", &[("endpoint", "http://minio:9000")], "s3://bucket/k"),
            ("s3://bucket/t=1/", &[("checksum_algorithm", "CRC64NVME")], "s3://bucket/t%3D1/k"),
            ("gs://bucket/a", &[("skip_signature", "true")], "gs://bucket/a/k"),
            ("gs://bucket", &[("base_url", "http://gcs:1"), ("skip_signature", "true")], "gs://bucket/k"),
            ("az://container/a", &azure, "az://container/a/k"),
            (
                "abfss://files@shop.dfs.core.windows.net/a",
                &azure,
                "abfss://files@shop.dfs.core.windows.net/a/k",
            ),
            ("file:///var/lib/payloads", &[], "file:///var/lib/payloads/k"),
        ] {
            let store = opened(url, options).unwrap_or_else(|error| panic!("{url}: {error}"));
            assert_eq!(store.uri("k"), uri);
            assert_eq!(store.key_of(uri).as_deref(), Some("k"));
        }
    }

    #[test]
    fn only_what_is_below_the_prefix_has_a_key() {
        let store = opened("s3://bucket/a/b", &[]).unwrap();
        for uri in [
            "s3://bucket/a/b",
            "s3://bucket/a/b/",
            "s3://bucket/a/bc/k",
            "s3://bucket/a/b/../../k",
            "s3://bucket/a/b/%2E%2E/k",
            "s3://bucket/a/b//k",
            "s3://buckets/a/b/k",
            "s3://other/a/b/k",
            "gs://bucket/a/b/k",
            "file:///a/b/k",
            "s3://bucket/a/b/%FF",
            "",
        ] {
            assert_eq!(store.key_of(uri), None, "{uri}");
        }
        assert_eq!(store.key_of("s3://bucket/a/b/c/d%20e").as_deref(), Some("c/d e"));
    }

    #[test]
    fn what_cannot_work_is_refused_with_what_to_do() {
        for (url, options, expected) in [
            ("minio/bucket", &[][..], "object_store.url: not a URL: relative URL without a base"),
            ("http://minio/bucket", &[], "object_store.url: expected s3://bucket/prefix"),
            ("file://host/folder", &[], "object_store.url: expected s3://bucket/prefix"),
            ("file:///", &[], "object_store.url: expected a folder"),
            ("s3://key:hunter2@bucket/", &[], "object_store.url: it has credentials in it; put them into"),
            ("s3://bucket/a?b", &[], "leave out ? and #"),
            ("s3://bucket/a//b", &[], "the prefix has a segment that is empty"),
            ("s3://bucket", &[("acess_key", "x")], "unknown option; did you mean `access_key_id`"),
            ("s3://bucket", &[("aws_secret_key", "x")], "did you mean `secret_access_key`"),
            (
                "s3://bucket",
                &[("flavour", "x")],
                "object_store.options.flavour: unknown option; expected one of",
            ),
            ("s3://bucket", &[("bucket", "x")], "the bucket stands in object_store.url"),
            (
                "s3://bucket",
                &[("endpoint", "http://minio:9000"), ("allow_http", "false")],
                "it is http://, and allow_http is false",
            ),
            ("s3://bucket", &[("endpoint", "minio:9000")], "object_store.options.endpoint: not a URL"),
            ("s3://bucket", &[("endpoint", "https://a:hunter2@minio")], "has credentials in it"),
            ("s3://bucket", &[("timeout", "hunter2")], "object_store.options.timeout: "),
            ("s3://bucket", &[("access_key_id", "hunter2")], "Missing SecretAccessKey"),
            ("s3://bucket", &[("secret_access_key_file", "/nowhere")], "/nowhere cannot be read"),
            ("file:///tmp/x", &[("region", "x")], "object_store.options.region: a folder takes no options"),
        ] {
            let error = opened(url, options).unwrap_err();
            assert!(error.contains(expected), "{url} {options:?}: {error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }

    #[test]
    fn a_store_never_shows_its_options() {
        let options = [("access_key_id", "hunter1"), ("secret_access_key", "hunter2")];
        let store = opened("s3://bucket/prefix", &options).unwrap();
        assert_eq!(format!("{store:?} {store}"), "Store(s3://bucket/prefix) s3://bucket/prefix");
    }

    #[test]
    fn a_secret_comes_from_a_file() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("secret");
        std::fs::write(&file, "hunter2\n").unwrap();
        let options = BTreeMap::from([
            ("secret_access_key_file".to_owned(), file.display().to_string()),
            ("web_identity_token_file".to_owned(), "/its/own".to_owned()),
        ]);
        let read = with_files_read(&options).unwrap();
        assert_eq!(read["secret_access_key"], "hunter2");
        assert_eq!(read["web_identity_token_file"], "/its/own");
    }
}
