//! The status page, in a real browser.

use crate::{
    browser::Browser,
    harness::{Relay, World},
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

    for (name, width, height, scheme) in [
        ("light.png", 1280, 900, "light"),
        ("dark.png", 1280, 900, "dark"),
        ("phone-light.png", 390, 844, "light"),
        ("phone-dark.png", 390, 844, "dark"),
    ] {
        browser.look(width, height, scheme);
        let wide =
            browser.value("document.documentElement.scrollWidth - document.documentElement.clientWidth");
        assert_eq!(wide, 0, "{name}: it is wider than the window");
        assert_eq!(browser.value(TOO_FAINT), serde_json::json!([]), "{name}");
        let ground = browser.value("getComputedStyle(document.body).backgroundColor");
        let is_dark = ground.as_str().unwrap() == "rgb(15, 20, 25)";
        assert_eq!(is_dark, scheme == "dark", "{name}: {ground}");
        browser.screenshot(name);
    }
    assert!(browser.complaints.is_empty(), "{:#?}", browser.complaints);

    // What it shows is what is: released events go, and a relay that is gone is said to be.
    let token = world.folder.path().join("token");
    world.sql("UPDATE outbox SET headers = NULL").await;
    let released = relay.operate(&world, &["redrive", "--all"]);
    assert_eq!(released["events"], 6, "{token:?}");
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
