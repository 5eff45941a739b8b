//! Who may do something: the bearer tokens of `admin.token_file` and `ingest.token_file`.

use std::path::Path;

use axum::http::{HeaderMap, header};
use subtle::ConstantTimeEq as _;

/// The name of a token that has none.
const NAMELESS: &str = "admin";

/// The bearer token that came with a request.
pub fn presented(headers: &HeaderMap) -> Option<&str> {
    let (scheme, token) = headers.get(header::AUTHORIZATION)?.to_str().ok()?.split_once(' ')?;
    scheme.eq_ignore_ascii_case("bearer").then(|| token.trim())
}

/// The name of the token that was presented, if it is one of the file's. Every token of the file is
/// compared, in a time that depends on lengths only.
///
/// A line is a token, or a name and a token; empty lines and lines with `#` in front are left out. The
/// file is read for each request, so that it can be rotated.
pub fn name_of(file: &Path, presented: &str) -> std::io::Result<Option<String>> {
    Ok(find(&std::fs::read_to_string(file)?, presented))
}

fn find(text: &str, presented: &str) -> Option<String> {
    let mut found = None;
    for line in text.lines().map(str::trim).filter(|line| !line.is_empty() && !line.starts_with('#')) {
        let (name, token) = line.split_once(char::is_whitespace).unwrap_or((NAMELESS, line));
        if bool::from(token.trim_start().as_bytes().ct_eq(presented.as_bytes())) {
            found = Some(name.to_owned());
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_found_whole_and_with_its_name() {
        let file = "# tokens\n\nalone\nalice  a-token\nbob b-token\n";
        for (presented, name) in [
            ("alone", Some("admin")),
            ("a-token", Some("alice")),
            ("b-token", Some("bob")),
            ("a-toke", None),
            ("a-token2", None),
            ("alice", None),
            ("# tokens", None),
            ("", None),
        ] {
            assert_eq!(find(file, presented).as_deref(), name, "{presented}");
        }
        assert_eq!(find("", ""), None, "an empty file lets nobody in");
    }
}
