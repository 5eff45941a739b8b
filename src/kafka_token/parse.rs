//! What a token says of its end.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use base64::{
    Engine as _, alphabet,
    engine::{DecodePaddingMode, GeneralPurpose, GeneralPurposeConfig},
};
use serde_json::Value;
use url::Url;

/// How long one is good for that says nothing.
pub(super) const ASSUMED: Duration = Duration::from_mins(5);
/// No longer than this is planned ahead, whatever a token says.
const AT_MOST: Duration = Duration::from_hours(24 * 30);

/// With and without the padding at the end.
const BASE64: GeneralPurpose = GeneralPurpose::new(
    &alphabet::URL_SAFE,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

#[derive(Clone, PartialEq, Eq)]
pub(super) struct Token {
    pub text: String,
    pub until: SystemTime,
}

impl Token {
    /// From what a file has, or a command printed. Nothing of it is in the error.
    pub fn parse(text: &str, now: SystemTime) -> Result<Token, String> {
        let text = text.trim();
        // RFC 6750, section 2.1.
        let is_legal = |c: char| c.is_ascii_alphanumeric() || "-._~+/=".contains(c);
        if text.is_empty() {
            return Err("it has no token".into());
        }
        if !text.chars().all(is_legal) {
            return Err(
                "expected a token and nothing else: letters, digits and -._~+/= without a space".into()
            );
        }
        let until = of_jwt(text).or_else(|| of_msk(text)).unwrap_or(now + ASSUMED);
        if until <= now {
            return Err(format!("its token ended at {}", humantime::format_rfc3339_seconds(until)));
        }
        Ok(Token { text: text.to_owned(), until: until.min(now + AT_MOST) })
    }
}

/// `exp` of a JSON Web Token (RFC 7519): seconds, perhaps with a fraction.
fn of_jwt(text: &str) -> Option<SystemTime> {
    let claims = text.split('.').nth(1).filter(|_| text.split('.').count() == 3)?;
    let claims: Value = serde_json::from_slice(&BASE64.decode(claims).ok()?).ok()?;
    let seconds = claims.get("exp")?.as_f64()?;
    UNIX_EPOCH.checked_add(Duration::try_from_secs_f64(seconds).ok()?)
}

/// Amazon MSK: a URL that is signed, with when and for how many seconds.
fn of_msk(text: &str) -> Option<SystemTime> {
    let url = Url::parse(std::str::from_utf8(&BASE64.decode(text).ok()?).ok()?).ok()?;
    let value = |wanted| url.query_pairs().find(|(name, _)| name == wanted).map(|(_, value)| value);
    let signed = chrono::NaiveDateTime::parse_from_str(&value("X-Amz-Date")?, "%Y%m%dT%H%M%SZ").ok()?;
    let good_for = Duration::from_secs(value("X-Amz-Expires")?.parse().ok()?);
    SystemTime::from(signed.and_utc()).checked_add(good_for)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn jwt(claims: &str) -> String {
        format!("{}.{}.c2ln", BASE64.encode(r#"{"alg":"RS256"}"#), BASE64.encode(claims)).replace('=', "")
    }

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn until(text: &str, now: u64) -> u64 {
        let token = Token::parse(text, at(now)).unwrap();
        assert_eq!(token.text, text.trim());
        token.until.duration_since(UNIX_EPOCH).unwrap().as_secs()
    }

    #[test]
    fn a_jwt_ends_when_it_says() {
        assert_eq!(until(&jwt(r#"{"sub":"relay","exp":1000}"#), 900), 1000);
        assert_eq!(until(&jwt(r#"{"exp":1000.9}"#), 900), 1000);
        assert_eq!(until(&format!("{}\n", jwt(r#"{"exp":1000}"#)), 900), 1000, "the newline of an editor");
        // As some make them.
        assert_eq!(
            until(&format!("e30=.{}.c2ln", BASE64.encode(r#"{"exp": 1000}"#)), 900),
            1000,
            "with padding"
        );
        assert_eq!(until(&jwt(r#"{"exp":99999999999}"#), 900), 900 + AT_MOST.as_secs());
        let error = Token::parse(&jwt(r#"{"exp":1000}"#), at(1000)).err().unwrap();
        assert_eq!(error, "its token ended at 1970-01-01T00:16:40Z");
    }

    /// As aws-msk-iam-sasl-signer-python 1.0.2 made it of credentials that nobody has.
    #[test]
    fn a_token_of_msk_ends_when_its_url_does() {
        let url = "https://kafka.eu-central-1.amazonaws.com/?Action=kafka-cluster%3AConnect\
                   &X-Amz-Algorithm=AWS4-HMAC-SHA256\
                   &X-Amz-Credential=AKIAEXAMPLE%2F20261129%2Feu-central-1%2Fkafka-cluster%2Faws4_request\
                   &X-Amz-Date=20261129T090246Z&X-Amz-Expires=900&X-Amz-SignedHeaders=host\
                   &X-Amz-Signature=0fc1d6e1e6f64d71f2d4fa61d04f3835fe262d72ae2c0e368b5a50dfa4aa03f7\
                   &User-Agent=aws-msk-iam-sasl-signer-python%2F1.0.2";
        let token = BASE64.encode(url);
        let token = token.trim_end_matches('=');
        // What the signer itself says of its end.
        assert_eq!(until(token, 1_795_943_000), 1_795_943_866);
        let error = Token::parse(token, at(1_795_943_866)).err().unwrap();
        assert_eq!(error, "its token ended at 2026-11-29T09:17:46Z");
        // What its program prints has more in it.
        let printed = format!("('{token}', 1795943866000)");
        assert!(
            Token::parse(&printed, at(0)).err().unwrap().starts_with("expected a token and nothing else")
        );
    }

    #[test]
    fn one_that_says_nothing_is_good_for_a_while() {
        let assumed = 900 + ASSUMED.as_secs();
        for opaque in
            ["ya29.a0Af_B", "abcd", "a.b.c", &jwt(r#"{"sub":"x"}"#), &jwt(r#"{"exp":-1}"#), &jwt("[]")]
        {
            assert_eq!(until(opaque, 900), assumed, "{opaque}");
        }
        for (text, why) in [("", "it has no token"), (" \n", "it has no token"), ("a b", "expected a token")]
        {
            assert!(Token::parse(text, at(900)).err().unwrap().starts_with(why), "{text:?}");
        }
    }
}
