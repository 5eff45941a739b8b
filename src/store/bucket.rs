//! What S3 says of the bucket itself, which `object_store` does not ask for: lifecycle rules and versions.

use std::time::Duration;

use object_store::{
    aws::AmazonS3,
    client::{HttpClient, HttpRequest, HttpRequestBody},
    path::Path,
    signer::{Method, SignedUrlOptions, Signer as _},
};
use serde::{Deserialize, de::DeserializeOwned};

use super::{StoreError, checked::Connector};

#[derive(Debug)]
pub(super) struct Bucket {
    signer: AmazonS3,
    client: Option<HttpClient>,
    uri: String,
}

/// A rule that deletes objects by themselves.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    pub name: String,
    /// Of the keys that it is about, in the whole bucket.
    pub prefix: String,
    /// How old an object becomes; zero where the rule names a date.
    pub days: u64,
}

/// What the bucket does by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Rules {
    pub expiring: Vec<Rule>,
    /// Whether a rule takes the parts of uploads that nobody finished.
    pub takes_unfinished: bool,
}

impl Bucket {
    /// `connector` is the one that `signer` was built with.
    pub fn new(signer: AmazonS3, connector: &Connector, uri: &str) -> Bucket {
        Bucket { signer, client: connector.client(), uri: uri.to_owned() }
    }

    pub async fn rules(&self) -> Result<Rules, StoreError> {
        match self.ask::<Lifecycle>("lifecycle").await {
            Ok(found) => Ok(found.rules()),
            // NoSuchLifecycleConfiguration
            Err(StoreError::NotFound { .. }) => Ok(Rules::default()),
            Err(error) => Err(error),
        }
    }

    /// Whether a deleted object leaves an old version behind.
    pub async fn keeps_versions(&self) -> Result<bool, StoreError> {
        let found: Versioning = self.ask("versioning").await?;
        Ok(found.status.is_some())
    }

    async fn ask<T: DeserializeOwned>(&self, what: &str) -> Result<T, StoreError> {
        let unclear = |why: String| StoreError::Away(format!("{} said of its {what}: {why}", self.uri));
        let options = SignedUrlOptions::new().with_query([(what, "")]);
        let root = Path::default();
        let signed = self.signer.signed_url_opts(Method::GET, &root, Duration::from_mins(1), &options);
        let url = signed.await.map_err(|error| StoreError::of(&error, &self.uri))?;
        let client = self.client.as_ref().ok_or_else(|| unclear("nothing".into()))?;
        let mut request = HttpRequest::new(HttpRequestBody::empty());
        *request.uri_mut() = url.as_str().parse().map_err(|_| unclear("no URL".into()))?;
        let answer = client.execute(request).await.map_err(|error| StoreError::of_connection(&error))?;
        let status = answer.status();
        let body = answer.into_body().bytes().await.map_err(|error| StoreError::of_connection(&error))?;
        let body = String::from_utf8_lossy(&body);
        match status.is_success() {
            true => quick_xml::de::from_str(&body).map_err(|error| unclear(error.to_string())),
            false => Err(StoreError::of_answer(status.as_u16(), &body, &self.uri)),
        }
    }
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Versioning {
    /// `Enabled` or `Suspended`: then there may be old versions; absent where it never was.
    status: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Lifecycle {
    #[serde(default, rename = "Rule")]
    rules: Vec<LifecycleRule>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct LifecycleRule {
    #[serde(default, rename = "ID")]
    id: String,
    status: String,
    /// As it was written before there were filters.
    #[serde(default)]
    prefix: String,
    #[serde(default)]
    filter: Filter,
    expiration: Option<Expiration>,
    abort_incomplete_multipart_upload: Option<serde::de::IgnoredAny>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Filter {
    #[serde(default)]
    prefix: String,
    #[serde(default, rename = "Tag")]
    tags: Vec<serde::de::IgnoredAny>,
    and: Option<Box<Filter>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Expiration {
    days: Option<u64>,
    date: Option<String>,
}

impl Lifecycle {
    fn rules(self) -> Rules {
        let mut rules = Rules::default();
        for mut rule in self.rules.into_iter().filter(|rule| rule.status == "Enabled") {
            rules.takes_unfinished |= rule.abort_incomplete_multipart_upload.is_some();
            let filter = rule.filter.and.take().map_or(rule.filter, |and| *and);
            // Ours have no tags.
            let Some(expiration) = rule.expiration.filter(|_| filter.tags.is_empty()) else { continue };
            let days = expiration.days.or(expiration.date.map(|_| 0));
            let prefix = if filter.prefix.is_empty() { rule.prefix } else { filter.prefix };
            rules.expiring.extend(days.map(|days| Rule { name: rule.id, prefix, days }));
        }
        rules
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_that_take_our_objects_are_told_from_the_others() {
        let text = r#"<?xml version="1.0" encoding="UTF-8"?>
            <LifecycleConfiguration xmlns="http://s3.amazonaws.com/doc/2006-03-01/">
              <Rule><ID>all</ID><Status>Enabled</Status><Filter/><Expiration><Days>7</Days></Expiration></Rule>
              <Rule><ID>off</ID><Status>Disabled</Status><Expiration><Days>1</Days></Expiration></Rule>
              <Rule><ID>tagged</ID><Status>Enabled</Status>
                <Filter><And><Prefix>a/</Prefix><Tag><Key>k</Key><Value>v</Value></Tag>
                  <Tag><Key>l</Key><Value>v</Value></Tag></And></Filter>
                <Expiration><Days>1</Days></Expiration></Rule>
              <Rule><ID>old</ID><Status>Enabled</Status><Prefix>b/</Prefix>
                <Expiration><Date>2030-01-01T00:00:00Z</Date></Expiration></Rule>
              <Rule><ID>marker</ID><Status>Enabled</Status><Filter><Prefix>c</Prefix></Filter>
                <Expiration><ExpiredObjectDeleteMarker>true</ExpiredObjectDeleteMarker></Expiration></Rule>
              <Rule><ID>parts</ID><Status>Enabled</Status><Filter><Prefix></Prefix></Filter>
                <AbortIncompleteMultipartUpload><DaysAfterInitiation>3</DaysAfterInitiation>
                </AbortIncompleteMultipartUpload></Rule>
              <Rule><ID>sized</ID><Status>Enabled</Status>
                <Filter><And><Prefix>d/</Prefix><ObjectSizeGreaterThan>1</ObjectSizeGreaterThan></And></Filter>
                <Transition><Days>3</Days><StorageClass>GLACIER</StorageClass></Transition>
                <Expiration><Days>30</Days></Expiration></Rule>
            </LifecycleConfiguration>"#;
        let found = quick_xml::de::from_str::<Lifecycle>(text).unwrap().rules();
        let rule = |name: &str, prefix: &str, days| Rule { name: name.into(), prefix: prefix.into(), days };
        let expiring = vec![rule("all", "", 7), rule("old", "b/", 0), rule("sized", "d/", 30)];
        assert_eq!(found, Rules { expiring, takes_unfinished: true });
    }

    #[test]
    fn versions_are_kept_where_they_ever_were() {
        let keeps = |inner: &str| {
            let text = format!("<VersioningConfiguration>{inner}</VersioningConfiguration>");
            quick_xml::de::from_str::<Versioning>(&text).unwrap().status.is_some()
        };
        assert!(keeps("<Status>Enabled</Status>") && keeps("<Status>Suspended</Status>") && !keeps(""));
    }
}
