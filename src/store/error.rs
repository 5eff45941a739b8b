//! What went wrong at the object store, as what is to be done about it.
//!
//! Only what is known not to pass by itself is more than [`StoreError::Away`]: nothing is lost by
//! trying again, and a stall shows in the metrics.

use std::{borrow::Cow, error::Error};

use object_store::client::{HttpError, HttpErrorKind};

/// Its Display says what to do next, and never has a credential.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// Not reached, cut off, busy or failing: passes by itself.
    #[error("the object store is away: {0}; it is tried again")]
    Away(String),
    /// Reached, and refused: 401 or 403.
    #[error("the object store does not allow it: {0}; check the credentials and what they may do there")]
    Denied(String),
    #[error("there is no bucket, container or folder {uri}; create it, or correct object_store.url")]
    NoSuchBucket { uri: String },
    #[error("there is no object {uri}; it was deleted, or a lifecycle rule took it")]
    NotFound { uri: String },
    #[error("the object {uri} has {size} bytes, and {at_most} are taken at most")]
    TooLarge { uri: String, size: u64, at_most: u64 },
    /// A reference to a store that this one is not.
    #[error("{uri} is not in {store}; only objects there are read")]
    Foreign { uri: String, store: String },
    /// Will not work until an operator has changed something.
    #[error("{0}")]
    Misconfigured(String),
}

impl StoreError {
    /// Whether it passes by itself, so that trying again is enough.
    pub fn is_transient(&self) -> bool {
        matches!(self, StoreError::Away(_))
    }

    /// `error` is about the object `uri`.
    pub(super) fn of(error: &object_store::Error, uri: &str) -> StoreError {
        if let Some(answer) = Answer::of(error) {
            return answer.classify(uri);
        }
        if let Some(error) = in_chain::<HttpError>(error) {
            return StoreError::of_connection(error);
        }
        if let object_store::Error::NotFound { .. } = error {
            return StoreError::NotFound { uri: uri.into() };
        }
        match in_chain::<std::io::Error>(error) {
            Some(error) => of_file(error),
            None => StoreError::Away(innermost(error)),
        }
    }

    /// No answer came, or not all of it.
    pub(super) fn of_connection(error: &HttpError) -> StoreError {
        let why = innermost(error);
        if why.contains("certificate") {
            return StoreError::Misconfigured(format!(
                "the object store's certificate is not trusted: {why}; add its authority to those of this \
                 machine, or name a file with them in the variable SSL_CERT_FILE"
            ));
        }
        let what = match error.kind() {
            HttpErrorKind::Connect => "cannot connect",
            HttpErrorKind::Timeout => "no answer in time",
            _ => "the connection broke",
        };
        StoreError::Away(if why.is_empty() { what.into() } else { format!("{what}: {why}") })
    }

    /// An answer that says no, to a request about `uri`.
    pub(super) fn of_answer(status: u16, body: &str, uri: &str) -> StoreError {
        Answer::new(status, body).classify(uri)
    }
}

/// What the store answered.
#[derive(Debug)]
struct Answer {
    status: u16,
    /// As S3 names it, such as `NoSuchBucket`; empty where the answer had none.
    code: String,
    message: String,
}

impl Answer {
    fn new(status: u16, body: &str) -> Answer {
        Answer { status, code: element(body, "Code"), message: element(body, "Message") }
    }

    /// `object_store` keeps the answer to itself and shows it in its message only. The form is checked
    /// by the tests against a real store.
    fn of(error: &object_store::Error) -> Option<Answer> {
        let text = error.to_string();
        if let Some((_, rest)) = text.split_once("non-2xx status code: ") {
            return Some(Answer::new(rest.get(..3)?.parse().ok()?, rest));
        }
        // A 200 that has failed after all, and one object of many that were to be deleted.
        if let Some((_, body)) = text.split_once("Server returned error response: ") {
            return Some(Answer::new(500, body));
        }
        if let Some((message, code)) = text.split_once(" (code: ")
            && text.contains("DeleteObjects")
        {
            let code = code.trim_end_matches(')').to_owned();
            let status = match code.as_str() {
                "AccessDenied" => 403,
                "InternalError" | "SlowDown" => 503,
                _ => 400,
            };
            let message = message.rsplit(": ").next().unwrap_or_default().to_owned();
            return Some(Answer { status, code, message });
        }
        text.contains("redirect without LOCATION").then(|| Answer {
            status: 301,
            code: "PermanentRedirect".into(),
            message: String::new(),
        })
    }

    fn classify(&self, uri: &str) -> StoreError {
        let bucket = || bucket_of(uri);
        match (self.status, self.code.as_str()) {
            (_, "NoSuchBucket" | "ContainerNotFound") => StoreError::NoSuchBucket { uri: bucket() },
            // The upload was aborted by somebody else: a new one is made.
            (_, "NoSuchUpload") => StoreError::Away(self.to_string()),
            (_, "RequestTimeTooSkewed") => StoreError::Misconfigured(format!(
                "the object store says {self}; set the clock of this machine right"
            )),
            (_, "ExpiredToken" | "InvalidToken" | "TokenRefreshRequired") | (401 | 403, _) => {
                StoreError::Denied(format!("{self}, about {uri}"))
            }
            (404, "" | "NoSuchKey" | "BlobNotFound" | "NoSuchLifecycleConfiguration") => {
                StoreError::NotFound { uri: uri.into() }
            }
            (300..=399, _) | (_, "AuthorizationHeaderMalformed" | "IllegalLocationConstraintException") => {
                StoreError::Misconfigured(format!(
                    "the object store says {self}: {} is in another region or at another endpoint; set the \
                     options region and endpoint",
                    bucket()
                ))
            }
            // Somebody else writes the same object, or it was overwritten while it was read.
            (408 | 409 | 412 | 429, _) => StoreError::Away(self.to_string()),
            (501 | 400..=499, _) => StoreError::Misconfigured(format!(
                "the object store refuses the request: {self}, about {uri}; check object_store.url and \
                 object_store.options"
            )),
            _ => StoreError::Away(self.to_string()),
        }
    }
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}", self.status)?;
        if !self.code.is_empty() {
            write!(f, " {}", self.code)?;
        }
        if !self.message.is_empty() {
            write!(f, " ({})", self.message.trim_end_matches('.'))?;
        }
        Ok(())
    }
}

/// The text of the first element `name` of an XML answer.
fn element(body: &str, name: &str) -> String {
    let inside = body.split_once(&format!("<{name}>")).and_then(|(_, rest)| rest.split_once('<'));
    let text = inside.map_or("", |(text, _)| text.trim());
    quick_xml::escape::unescape(text).map_or_else(|_| text.to_owned(), Cow::into_owned)
}

/// `s3://bucket` of `s3://bucket/prefix/key`.
fn bucket_of(uri: &str) -> String {
    let authority = uri.split_once("://").map_or(0, |(scheme, _)| scheme.len() + 3);
    let end = uri[authority..].find('/').map_or(uri.len(), |slash| authority + slash);
    uri[..end].to_owned()
}

/// A folder.
fn of_file(error: &std::io::Error) -> StoreError {
    use std::io::ErrorKind;
    match error.kind() {
        ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => StoreError::Denied(error.to_string()),
        ErrorKind::NotADirectory | ErrorKind::IsADirectory | ErrorKind::InvalidFilename => {
            StoreError::Misconfigured(format!("the folder cannot take it: {error}"))
        }
        _ => StoreError::Away(error.to_string()),
    }
}

fn chain<'a>(error: &'a (dyn Error + 'static)) -> impl Iterator<Item = &'a (dyn Error + 'static)> {
    let mut next = Some(error);
    std::iter::from_fn(move || {
        let this = next?;
        next = this.source();
        Some(this)
    })
}

fn in_chain<'a, E: Error + 'static>(error: &'a (dyn Error + 'static)) -> Option<&'a E> {
    chain(error).find_map(|error| error.downcast_ref())
}

/// What began it; the errors around it repeat it, with URLs.
fn innermost(error: &(dyn Error + 'static)) -> String {
    chain(error).last().map(ToString::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generic(text: &str) -> StoreError {
        let error = object_store::Error::Generic { store: "S3", source: text.to_owned().into() };
        StoreError::of(&error, "s3://bucket/prefix/key")
    }

    fn answer(status: &str, code: &str) -> StoreError {
        generic(&format!(
            "Error performing PUT http://minio:9000/bucket/key in 1ms - Server returned non-2xx status code: \
             {status}: <Error><Code>{code}</Code><Message>As it says.</Message></Error>"
        ))
    }

    #[test]
    fn what_passes_by_itself_is_told_from_what_does_not() {
        for (status, code) in [
            ("500 Internal Server Error", "InternalError"),
            ("503 Service Unavailable", "SlowDown"),
            ("503 Service Unavailable", ""),
            ("429 Too Many Requests", ""),
            ("408 Request Timeout", ""),
            ("507 Insufficient Storage", "XMinioStorageFull"),
            ("409 Conflict", "OperationAborted"),
            ("404 Not Found", "NoSuchUpload"),
        ] {
            assert!(answer(status, code).is_transient(), "{status} {code}");
        }
        let denied = answer("403 Forbidden", "AccessDenied");
        assert_eq!(
            denied.to_string(),
            "the object store does not allow it: 403 AccessDenied (As it says), about \
             s3://bucket/prefix/key; check the credentials and what they may do there"
        );
        assert!(matches!(answer("400 Bad Request", "ExpiredToken"), StoreError::Denied(_)));
        assert_eq!(
            answer("404 Not Found", "NoSuchBucket"),
            StoreError::NoSuchBucket { uri: "s3://bucket".into() }
        );
        assert_eq!(
            answer("404 Not Found", "NoSuchKey"),
            StoreError::NotFound { uri: "s3://bucket/prefix/key".into() }
        );
        for (status, code) in [
            ("400 Bad Request", "AuthorizationHeaderMalformed"),
            ("400 Bad Request", "KeyTooLongError"),
            ("403 Forbidden", "RequestTimeTooSkewed"),
            ("301 Moved Permanently", "PermanentRedirect"),
            ("501 Not Implemented", "NotImplemented"),
        ] {
            assert!(matches!(answer(status, code), StoreError::Misconfigured(_)), "{status} {code}");
        }
        assert!(matches!(
            generic("Received redirect without LOCATION, this normally indicates …"),
            StoreError::Misconfigured(_)
        ));
    }

    #[test]
    fn answers_without_a_status_are_told_apart_too() {
        let body = "<Error><Code>SlowDown</Code><Message>Later.</Message></Error>";
        assert!(generic(&format!("Server returned error response: {body}")).is_transient());
        let one = |code: &str| {
            generic(&format!("DeleteObjects request failed for key a/b: Access Denied. (code: {code})"))
        };
        assert!(matches!(one("AccessDenied"), StoreError::Denied(why) if why.contains("Access Denied")));
        assert!(one("InternalError").is_transient());
    }

    #[test]
    fn what_nobody_has_read_yet_is_tried_again() {
        assert_eq!(generic("something new"), StoreError::Away("something new".into()));
    }
}
