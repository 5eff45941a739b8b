//! `java.util.Properties` text, in which Debezium's `tracingspancontext` carries a span's context.

use super::Rejection;

/// The entries of a column, in order.
pub(super) fn parse(bytes: &[u8], column: &str) -> Result<Vec<(String, String)>, Rejection> {
    let mut entries = Vec::new();
    java_properties::PropertiesIter::new_with_encoding(bytes, encoding_rs::UTF_8)
        .read_into(|name, value| entries.push((name, value)))
        .map_err(|_| {
            Rejection::new(format!("column {column} is not text of java.util.Properties: mend the row"))
        })?;
    Ok(entries)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_separators_and_escapes_are_those_of_java() {
        let text = b"#Mon Jan 01\ntraceparent=00-a\\:b\n tracestate : x\\u00e9\nempty=\n";
        let entries = parse(text, "tracingspancontext").unwrap();
        let expected = [("traceparent", "00-a:b"), ("tracestate", "x\u{e9}"), ("empty", "")];
        assert_eq!(entries, expected.map(|(name, value)| (name.to_owned(), value.to_owned())));
    }

    #[test]
    fn a_broken_escape_is_refused() {
        assert!(parse(b"a=\\uZZZZ", "c").unwrap_err().to_string().contains("column c"));
    }
}
