//! What mends an object store that does not do what it is asked, for `whippet doctor`.

use super::{Store, StoreError};
use crate::doctor::Fix;

/// What each of the checks needs, as S3 calls it.
#[derive(Clone, Copy, Debug)]
pub(super) enum Action {
    Put,
    Get,
    Delete,
}

impl Action {
    fn on_s3(self) -> &'static [&'static str] {
        match self {
            Action::Put => &["s3:PutObject", "s3:AbortMultipartUpload"],
            Action::Get => &["s3:GetObject"],
            Action::Delete => &["s3:DeleteObject"],
        }
    }
}

/// `endpoint` is that of the options.
pub(super) fn mends(store: &Store, endpoint: Option<&str>, action: Action, error: &StoreError) -> Fix {
    let config = |text: &str| Fix::Config(text.to_owned());
    let (scheme, bucket) = store.base.split_once("://").unwrap_or(("", &store.base));
    match (error, &store.folder) {
        (StoreError::NoSuchBucket { .. }, Some(folder)) => {
            Fix::Shell(format!("mkdir -p '{}'", folder.display()))
        }
        (StoreError::Denied(_), Some(folder)) => Fix::Shell(format!("chmod u+rwx '{}'", folder.display())),
        (StoreError::NoSuchBucket { .. }, None) => match scheme {
            "s3" => {
                let at = endpoint.map(|endpoint| format!(" --endpoint-url {endpoint}")).unwrap_or_default();
                Fix::Shell(format!("aws s3 mb {}{at}", store.base))
            }
            "gs" => Fix::Shell(format!("gcloud storage buckets create {}", store.base)),
            _ => config("object_store.url: (a container that is there)"),
        },
        (StoreError::Denied(why), None) if is_about_who_asks(why) || scheme != "s3" => {
            config("object_store.options: (the credentials of an account that may use it)")
        }
        (StoreError::Denied(_), None) => Fix::Policy(statement(bucket, store.prefix.as_ref(), action)),
        (StoreError::Away(_), None) if endpoint.is_some() => {
            config("object_store.options.endpoint: (an address that can be reached from here)")
        }
        (StoreError::Misconfigured(why), None) if why.contains("SSL_CERT_FILE") => {
            Fix::Shell("export SSL_CERT_FILE=(the authority that signed its certificate)".into())
        }
        (StoreError::Misconfigured(why), None) if without_names(why).contains("region") => {
            config("object_store.options: { region: (the bucket's), endpoint: (the store's) }")
        }
        _ => config("object_store.url: (a bucket, container or folder that takes objects)"),
    }
}

/// Whether the store does not know the account, or does not believe that it is it: by the status and the code that it
/// answered. What it says behind them has names of objects.
fn is_about_who_asks(why: &str) -> bool {
    let mut words = without_names(why).split(' ');
    words.next() == Some("401")
        || words.next().is_some_and(|code| {
            matches!(
                code,
                "InvalidAccessKeyId"
                    | "SignatureDoesNotMatch"
                    | "ExpiredToken"
                    | "InvalidToken"
                    | "TokenRefreshRequired"
            )
        })
}

/// Without the object that it is about.
fn without_names(why: &str) -> &str {
    why.split_once(", about ").map_or(why, |(said, _)| said)
}

fn statement(bucket: &str, prefix: &str, action: Action) -> String {
    let below = if prefix.is_empty() { String::new() } else { format!("{prefix}/") };
    let resource = format!("arn:aws:s3:::{bucket}/{below}*");
    serde_json::json!({ "Effect": "Allow", "Action": action.on_s3(), "Resource": resource }).to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_status_and_the_code_tell_and_no_name_does() {
        for why in [
            "401",
            "401 Unauthorized (No)",
            "403 SignatureDoesNotMatch (No), about s3://a/b",
            "401, about s3://a/b",
            "403 InvalidAccessKeyId, about s3://a/b",
        ] {
            assert!(is_about_who_asks(why), "{why}");
        }
        for why in
            ["403 AccessDenied (Denied), about s3://a-401/InvalidToken/401", "403", "403 (401 InvalidToken)"]
        {
            assert!(!is_about_who_asks(why), "{why}");
        }
    }

    #[tokio::test]
    async fn a_bucket_that_is_called_region_is_in_the_right_one() {
        let options = [("region", "eu-west-1"), ("access_key_id", "a"), ("secret_access_key", "b")];
        let options = options.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        let store = Store::open("s3://by-region", &options).unwrap();
        let fix = |status| {
            let refused = StoreError::of_answer(status, "", "s3://by-region/a");
            let Fix::Config(text) = mends(&store, None, Action::Put, &refused) else { panic!("{refused}") };
            text
        };
        assert!(fix(501).starts_with("object_store.url: "), "{}", fix(501));
        assert!(fix(301).starts_with("object_store.options: { region: "), "{}", fix(301));
    }
}
