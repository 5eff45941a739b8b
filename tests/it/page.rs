//! The status page, in a real browser.

use crate::{
    browser::Browser,
    harness::{Relay, World, whippet},
    stream::streamed,
};

/// A key that is HTML, one with no place to be broken, and one that is no text.
const MARKUP: &str = "<img src=x onerror=\"document.body.remove()\">&amp;<script>alert(1)</script>";

/// Elements with text whose contrast with what is behind them is below what WCAG 2 asks of small text (AA).
const TOO_FAINT: &str = r#"(() => {
  const parts = text => text.match(/[\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map(c => c / 255)
    .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = e => { for (; e; e = e.parentElement) {
    const c = parts(getComputedStyle(e).backgroundColor); if (c.length < 4 || c[3] > 0) return c; } return [255, 255, 255]; };
  const own = e => [...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim());
  return [...document.querySelectorAll("body *")].filter(e => own(e) && e.checkVisibility() && e.tagName !== "SCRIPT").filter(e => {
    const [a, b] = [light(parts(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
    return (a + 0.05) / (b + 0.05) < 4.5;
  }).map(e => e.outerHTML.slice(0, 80));
})()"#;

/// In light, dark and on a phone it is as wide as the window, and can be read. Leaves screenshots.
fn looks_well(browser: &mut Browser, name: &str) {
    for (look, width, height, scheme) in [
        ("light", 1280, 900, "light"),
        ("dark", 1280, 900, "dark"),
        ("phone-light", 390, 844, "light"),
        ("phone-dark", 390, 844, "dark"),
    ] {
        let name = format!("{name}-{look}.png");
        browser.look(width, height, scheme);
        let wide =
            browser.value("document.documentElement.scrollWidth - document.documentElement.clientWidth");
        assert_eq!(wide, 0, "{name}: it is wider than the window");
        assert_eq!(browser.value(TOO_FAINT), serde_json::json!([]), "{name}");
        let ground = browser.value("getComputedStyle(document.body).backgroundColor");
        let is_dark = ground.as_str().unwrap() == "rgb(15, 20, 25)";
        assert_eq!(is_dark, scheme == "dark", "{name}: {ground}");
        browser.screenshot(&name);
    }
    browser.look(1280, 900, "light");
}

/// What the page says of a table, once it says this.
fn card(browser: &mut Browser, table: &str, expected: &str) -> String {
    let card = format!(
        "[...document.querySelectorAll('article')].find(e => e.querySelector('h3').innerText === '{table}')"
    );
    let expected = serde_json::json!(expected);
    browser.until(&format!("({card})?.innerText.includes({expected}) === true"));
    browser.value(&format!("({card}).innerText")).as_str().unwrap().to_owned()
}

async fn with_parked_keys(world: &World) -> Relay {
    let topic = world.create_topic("orders", 3, &[]).await;
    let config = world.config("[{ name: outbox, after_publish: delete }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    let long = "kunde-ü".repeat(30);
    let mut values =
        vec![format!("('{topic}', 'fine', '{{}}', NULL)"), format!("('{topic}', NULL, '{{}}', '[3]')")];
    for (key, count) in [(MARKUP, 3), (long.as_str(), 1), ("", 1)] {
        values.extend((0..count).map(|_| format!("('{topic}', '{key}', '{{}}', '[1]')")));
    }
    world
        .sql(&format!("INSERT INTO outbox (topic, key, payload, headers) VALUES {}", values.join(",")))
        .await;
    relay.until_status("/tables/0/parked_events", 6).await;
    relay.until_status("/tables/0/published_events", 1).await;
    relay
}

#[tokio::test]
async fn the_page_shows_tables_and_parked_keys_and_says_when_it_cannot() {
    let world = World::new("page").await;
    let relay = with_parked_keys(&world).await;

    // Reading is open; what is listed is no payload, no header and no id.
    let (code, listed) = relay.get("/parked");
    assert_eq!(code, 200);
    let listed: serde_json::Value = serde_json::from_str(&listed).unwrap();
    let keys = listed["keys"].as_array().unwrap();
    assert_eq!((keys.len(), &listed["more"]), (4, &false.into()), "{listed}");
    let markup = keys.iter().find(|key| key["key"] == MARKUP).unwrap();
    assert_eq!((&markup["events"], &markup["table"]), (&3.into(), &"outbox".into()));
    let mut members: Vec<&str> = markup.as_object().unwrap().keys().map(String::as_str).collect();
    members.sort_unstable();
    assert_eq!(members, ["events", "key", "reason", "since", "table", "topic"]);

    let mut browser = Browser::start();
    browser.look(1280, 900, "light");
    browser.open(&format!("http://{}/", relay.admin));
    browser.until("document.querySelectorAll('#keys tr').length === 4");
    // A second answer, so that there is a rate.
    browser.until("document.querySelector('.rate b').textContent === '0'");
    let text = browser.value("document.body.innerText");
    let text = text.as_str().unwrap();
    for expected in [
        "outbox",
        "running",
        "by polling: configured",
        "6 events",
        "events/s",
        "owner",
        MARKUP,
        "no key",
        "the empty key",
        "column headers is not a JSON object",
        &world.topic("orders"),
        "whippet redrive",
    ] {
        assert!(text.contains(expected), "{expected} in {text}");
    }
    assert_eq!(browser.value("document.querySelectorAll('img, #keys script').length"), 0);
    assert_eq!(browser.value("document.title"), "6 parked events – Whippet");

    looks_well(&mut browser, "parked");
    assert!(browser.complaints.is_empty(), "{:#?}", browser.complaints);

    // What it shows is what is: released events go, and a relay that is gone is said to be.
    let token = world.folder.path().join("token");
    world.sql("UPDATE outbox SET headers = NULL").await;
    let released = relay.operate(&world, &["redrive", "--all"]);
    assert_eq!(released["events"], 6, "{token:?}");
    browser.until("parseFloat(document.querySelector('.rate b').textContent) > 0");
    browser.until("document.querySelector('#parked').hidden && document.title === 'Whippet'");
    relay.kill();
    browser.until("document.title === 'unreachable – Whippet'");
    let text = browser.value("document.querySelector('#alerts').innerText");
    assert!(text.as_str().unwrap().starts_with("The relay cannot be reached ("), "{text}");
    assert!(text.as_str().unwrap().contains("What is below is from then"), "{text}");
    let was = "getComputedStyle(document.querySelector('.state'), '::before').content";
    assert_eq!(browser.value(was), "\"was \"");
    browser.look(390, 844, "light");
    browser.screenshot("unreachable.png");
}

/// Nothing may be loaded from elsewhere, and no script runs that is not the page's.
#[tokio::test]
async fn the_page_has_a_strict_policy() {
    let world = World::new("page_policy").await;
    let config = world.config("[{ name: outbox }]", "");
    world.install(&config).await;
    let relay = world.relay(&config);
    let mut browser = Browser::start();
    browser.open(&format!("http://{}/", relay.admin));
    browser.until("document.querySelectorAll('article').length === 1");
    assert!(browser.complaints.is_empty(), "{:#?}", browser.complaints);
    let policy = "fetch('/').then(answer => answer.headers.get('content-security-policy'))";
    let policy = browser.value(policy);
    assert!(policy.as_str().unwrap().starts_with("default-src 'none'; style-src 'sha256-"), "{policy}");
    let injected = "(() => { const script = document.createElement('script'); script.textContent = 'window.ran = 1'; \
                    document.body.append(script); return typeof window.ran })()";
    assert_eq!(browser.value(injected), "undefined");
    assert!(browser.complaints[0].contains("Content Security Policy"), "{:#?}", browser.complaints);
}

const NOWHERE: &str = "object_store: { url: 's3://none/x', options: { endpoint: 'http://127.0.0.1:1', region: r, \
                       access_key_id: a, secret_access_key: b } }\nlimits: { in_flight_bytes: 256KiB }\n";
const LONG_NAME: &str = "customer_notifications_of_the_billing_department_outbox_2026";

/// Tables that do not run, each for a reason of its own.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_says_why_a_table_does_not_run() {
    let world = World::new("page_states").await;
    let mut topics = Vec::new();
    for name in ["paused", "held", "halted", "documents"] {
        topics.push(world.create_topic(name, 1, &[]).await);
    }
    let nowhere = world.topic("nowhere");
    let tables = format!(
        "[{{ name: invoices, topic: '{}' }}, {{ name: held, topic: '{}' }}, {{ name: halting, topic: '{}', on_failure: halt }},
          {{ name: documents, topic: '{}', payload: {{ inline_max: 1KiB }} }}, {{ name: lost, topic: '{nowhere}' }}]",
        topics[0], topics[1], topics[2], topics[3]
    );
    let config = world.config(&tables, NOWHERE);
    world.install(&config).await;
    let relay = world.relay(&config);
    relay.until_status("/tables/0/state", "running").await;
    relay.operate(&world, &["pause", "--table", "invoices"]);
    relay.operate(&world, &["pause", "--table", "held", "--topic", &topics[1]]);
    world
        .sql(
            "INSERT INTO invoices (key, payload) VALUES ('k', 'x'); INSERT INTO held (key, payload) VALUES ('k', 'x'), ('l', 'x');
             INSERT INTO halting (key, payload, headers) VALUES ('order-7', 'x', '[7]'), ('order-7', 'y', NULL);
             INSERT INTO documents (key, payload) VALUES ('d', convert_to(repeat('x', 100000), 'UTF8'));
             INSERT INTO lost (key, payload) VALUES ('m', convert_to(repeat('x', 100000), 'UTF8'))",
        )
        .await;
    let mut browser = Browser::start();
    browser.look(1280, 900, "light");
    browser.open(&format!("http://{}/", relay.admin));
    let text = card(&mut browser, "invoices", "Paused: table. Goes on with whippet resume.");
    assert!(text.contains("paused"), "{text}");
    let text = card(&mut browser, "held", "2 for a pause");
    assert!(text.contains(&format!("Paused: topic {}", topics[1])) && text.contains("running"), "{text}");
    let text = card(&mut browser, "halting", "halted");
    assert!(
        text.contains(
            "An event cannot be published and on_failure is halt: mend it and release it (whippet redrive)"
        ),
        "{text}"
    );
    card(&mut browser, "documents", "Held until it is over: 1 for the object store, which is away.");
    card(&mut browser, "lost", "Held until it is over: 1 for a topic that cannot be written to.");
    browser.until("document.querySelectorAll('#keys tr').length === 1");
    let text = browser.value("document.querySelector('#keys').innerText");
    assert!(
        text.as_str().unwrap().contains("order-7") && text.as_str().unwrap().contains("not a JSON object"),
        "{text}"
    );
    let text = browser.value("document.querySelector('#alerts').innerText");
    assert_eq!(text, format!("Topics that cannot be written to: {nowhere}"));
    looks_well(&mut browser, "states");
    assert!(browser.complaints.is_empty(), "{:#?}", browser.complaints);
}

/// Kafka is away, and somebody has changed the file for the worse.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_says_that_nothing_goes_out_and_that_a_file_is_refused() {
    let world = World::new("page_stalled").await;
    let config = |tables: &str| world.config_for(&world.url, "127.0.0.1:1", &format!("[{tables}]"), "");
    world.install(&config("{ name: outbox, topic: orders }")).await;
    let config = config(&format!("{{ name: outbox, topic: orders }}, {{ name: {LONG_NAME} }}"));
    let relay = world.relay(&config);
    world
        .sql("INSERT INTO outbox (key, payload, created_at) VALUES ('k', 'x', now() - interval '3 hours')")
        .await;
    let mut browser = Browser::start();
    browser.look(1280, 900, "light");
    browser.open(&format!("http://{}/", relay.admin));
    let text = card(&mut browser, "outbox", "stalled");
    assert!(
        text.contains("Rows wait, and none was published for 30 s: look whether Kafka, a topic or the object store is away."),
        "{text}"
    );
    assert!(text.contains("3 h") && text.contains("never"), "{text}");
    let text = card(&mut browser, LONG_NAME, "failing");
    assert!(text.contains("Last error, ") && text.contains("does not exist"), "{text}");

    let alerts = "document.querySelector('#alerts').innerText";
    world.write(
        "whippet.yaml",
        &config.replace("topic: orders", "topc: orders").replace("replicas", "replica"),
    );
    browser.until(&format!("{alerts}.includes('did you mean')"));
    let text = browser.value(alerts);
    let text = text.as_str().unwrap();
    assert!(text.starts_with("The configuration file is refused, and the old one goes on:\n"), "{text}");
    assert!(text.contains("topc") && text.contains("replica") && text.contains(":5:"), "{text}");
    let said = whippet(&["status", "--admin", &format!("http://{}", relay.admin)]);
    let said = String::from_utf8(said.stdout).unwrap();
    assert!(
        said.contains("the configuration file is refused") && said.contains("outbox: stalled: rows wait"),
        "{said}"
    );
    looks_well(&mut browser, "refused");
    world.write("whippet.yaml", &config);
    browser.until(&format!("!{alerts}.includes('configuration file')"));
    assert!(browser.complaints.is_empty(), "{:#?}", browser.complaints);
}

/// Who works on what, and how a table is read.
#[tokio::test(flavor = "multi_thread")]
async fn the_page_shows_the_group_and_how_tables_are_read() {
    let world = World::new("page_group").await;
    let topic = world.create_topic("orders", 1, &[]).await;
    let tables = format!(
        "{{ name: outbox, topic: '{topic}' }}, {{ name: steps, topic: '{topic}', order: table, capture: poll }}"
    );
    let config = streamed(&world, &tables);
    world.install(&config).await;
    let first = world.relay(&config);
    first.until_status("/tables/0/capture_reason", "the log is read").await;
    let second = world.relay(&config);
    second.until(|status| status["group"].as_array().is_some_and(|group| group.len() == 2)).await;
    let mut browser = Browser::start();
    browser.look(1280, 900, "light");
    browser.open(&format!("http://{}/", first.admin));
    card(&mut browser, "outbox", "from the log");
    card(&mut browser, "steps", "by polling: configured");
    browser.until("document.querySelectorAll('#members tr').length === 2");
    looks_well(&mut browser, "group");
    browser.open(&format!("http://{}/", second.admin));
    let text = card(&mut browser, "outbox", "standby");
    assert!(
        text.contains("Another relay works on this table; this one takes over when that is gone."),
        "{text}"
    );
    looks_well(&mut browser, "standby");
    drop(second);

    // The log cannot be read: the page says why it is polled.
    first.kill();
    let name = &world.name;
    let config = config.replace(&format!("publication: {name}"), "publication: nowhere, create: false");
    let relay = world.relay(&config);
    browser.open(&format!("http://{}/", relay.admin));
    let text = card(&mut browser, "outbox", "nowhere");
    assert!(text.contains("by polling: ") && text.contains("running"), "{text}");
    looks_well(&mut browser, "polling");
    assert!(browser.complaints.is_empty(), "{:#?}", browser.complaints);
}
