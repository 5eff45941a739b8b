use std::collections::BTreeMap;

use axum::http::HeaderValue;
use proptest::prelude::*;

use super::*;

fn rules() -> Rules {
    let text = "kafka: { bootstrap_servers: k }\n\
                ingest: { topics: [orders, \"audit.*\"], spool: /nowhere, max_bytes: 1MiB }\n\
                defaults: { headers: { max_bytes: 200 } }\n";
    let config = config::parse("w.yaml", text, &BTreeMap::new()).unwrap();
    Rules::new(&config.ingest.unwrap(), &config.spool.unwrap())
}

fn headers(pairs: &[(&str, &str)]) -> HeaderMap {
    pairs
        .iter()
        .map(|(name, value)| {
            (HeaderName::try_from(*name).unwrap(), HeaderValue::from_bytes(value.as_bytes()).unwrap())
        })
        .collect()
}

fn take(topic: &str, pairs: &[(&str, &str)], body: &str) -> Result<Vec<Event>, (u16, String)> {
    let rules = rules();
    let told = |problem: Problem| {
        (
            problem.code.as_u16(),
            serde_json::to_value(&problem).unwrap()["detail"].as_str().unwrap().to_owned(),
        )
    };
    let head = rules.head(topic.to_owned(), &headers(pairs)).map_err(told)?;
    rules.events(head, &Bytes::copy_from_slice(body.as_bytes())).map_err(told)
}

const LINES: (&str, &str) = ("content-type", "application/x-ndjson");

#[test]
fn every_refusal_says_what_is_wrong_and_no_content() {
    let long = "x".repeat(256);
    for (topic, pairs, body, code, said) in [
        ("a b", &[][..], "", 400, "the topic is not"),
        ("..", &[], "", 400, "the topic is not"),
        ("order", &[], "", 403, "topic order is not one of ingest.topics"),
        ("audit", &[], "", 403, "ingest.topics"),
        ("orders", &[("content-encoding", "gzip")], "", 415, "without Content-Encoding"),
        ("orders", &[("whippet-id", "a"), ("whippet-id", "b")], "", 400, "whippet-id is there twice"),
        ("orders", &[("whippet-id", "")], "", 400, "the id is not 1 to 255"),
        ("orders", &[("whippet-type", &long)], "", 400, "the type is not 1 to 255"),
        ("orders", &[("whippet-header-a", &long)], "", 400, "above headers.max_bytes, 200"),
        ("orders", &[LINES, ("whippet-key", "k")], "{}", 400, "each line says its own"),
        ("orders", &[LINES], "\n \r\n", 400, "the batch is empty"),
        ("orders", &[LINES], "{\"payload\":1}\nsecret", 400, "line 2: column 1: not JSON"),
        ("orders", &[LINES], "{\"secret\":1}", 400, "line 1: column 9: expected the members"),
        ("orders", &[LINES], "{\"key\":7,\"payload\":1}", 400, "line 1: column 8: expected the members"),
        ("orders", &[LINES], "{\"key\":\"secret\"}", 400, "line 1: expected payload (null for a tombstone)"),
        ("orders", &[LINES], "{\"payload\":1,\"payload_base64\":\"AA==\"}", 400, "expected payload"),
        ("orders", &[LINES], "{\"payload_base64\":\"secret\"}", 400, "payload_base64 is not base64"),
        ("orders", &[LINES], "{\"payload\":\"secret \\ud800\"}", 400, "line 1: the payload is not text"),
        ("orders", &[LINES], "{\"payload\":1,\"headers\":{\"a\":{}}}", 400, "a value of headers is not text"),
    ] {
        let (found, detail) = take(topic, pairs, body).expect_err(said);
        assert!(found == code && detail.contains(said), "{code} {said}: {found} {detail}");
        assert!(!detail.contains("secret"), "{detail}");
    }
    let latin =
        HeaderMap::from_iter([(HeaderName::from_static(KEY), HeaderValue::from_bytes(b"\xe9").unwrap())]);
    assert_eq!(rules().head("orders".into(), &latin).unwrap_err().code, StatusCode::BAD_REQUEST);
}

#[test]
fn sizes_are_bounded_by_the_payload_the_spool_and_the_batch() {
    let rules = rules();
    let head = |pairs: &[(&str, &str)]| rules.head("orders".into(), &headers(pairs)).unwrap();
    assert_eq!(rules.body_at_most(&head(&[])), 512 << 10, "half of the spool");
    assert_eq!(rules.body_at_most(&head(&[LINES])), 512 << 10);
    let many = "{\"payload\":1}\n".repeat(EVENTS_AT_MOST);
    assert_eq!(take("orders", &[LINES], &many).unwrap().len(), EVENTS_AT_MOST);
    let (code, said) = take("orders", &[LINES], &format!("{many}{{\"payload\":1}}")).unwrap_err();
    assert!(code == 413 && said.contains("10000 events at most"), "{code} {said}");
}

#[test]
fn a_line_has_the_headers_of_the_request_unless_it_says_otherwise() {
    let body = "{\"payload\":1,\"headers\":{\"tenant\":\"b\",\"x\":null}}\n{\"payload\":2}";
    let events = take("audit.log", &[LINES, ("whippet-header-tenant", "a")], body).unwrap();
    assert_eq!(events[0].headers.as_deref(), Some(r#"{"tenant":"b","x":null}"#));
    assert_eq!(events[1].headers.as_deref(), Some(r#"{"tenant":"a"}"#));
    assert!(!events[0].given && events[0].id != events[1].id);
}

proptest! {
    /// Whatever comes as a batch: an answer, and of what is taken only what can be a record.
    #[test]
    fn no_batch_is_too_strange(body in "[ -~\\n\"{}:,]{0,120}") {
        if let Ok(events) = take("orders", &[LINES], &body) {
            for event in events {
                prop_assert!(event.headers.is_none_or(|text| serde_json::from_str::<Map<String, Value>>(&text).is_ok()));
            }
        }
    }

    #[test]
    fn a_json_payload_goes_out_byte_for_byte(number in any::<f64>().prop_filter("JSON has finite numbers", |n| n.is_finite()), spaces in " {0,4}") {
        let payload = format!("{{\"n\":{spaces}{number:?}}}");
        let body = format!("{spaces}{{\"payload\":{payload}}}{spaces}");
        let events = take("orders", &[LINES], &body).unwrap();
        prop_assert_eq!(events[0].payload.as_deref(), Some(payload.as_bytes()));
    }
}
