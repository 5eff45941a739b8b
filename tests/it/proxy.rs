//! Network faults, by Toxiproxy between the relay and its services.

use serde_json::{Value, json};

use crate::harness::service;

/// One of the proxies; whole again when it is dropped.
pub struct Proxy(&'static str);

impl Proxy {
    pub fn kafka() -> Proxy {
        Proxy::whole("kafka")
    }

    pub fn postgres() -> Proxy {
        Proxy::whole("postgres")
    }

    /// To MariaDB or MySQL, by their services' names.
    pub fn to(server: &str) -> Proxy {
        Proxy::whole(if server == "mysql" { "mysql" } else { "mariadb" })
    }

    /// To the object store.
    pub fn minio() -> Proxy {
        Proxy::whole("minio")
    }

    /// To PostgreSQL 17.
    pub fn pg17() -> Proxy {
        let proxy = Proxy::whole("pg17");
        proxy.lead_to(&service("WHIPPET_TEST_PG17"));
        proxy
    }

    /// Connections go to this server of PostgreSQL from now on.
    pub fn lead_to(&self, url: &str) {
        let (_, address) = url.rsplit_once('@').unwrap();
        let (upstream, _) = address.split_once('/').unwrap();
        post(&format!("/proxies/{}", self.0), &json!({ "upstream": upstream, "enabled": true }));
    }

    fn whole(name: &'static str) -> Proxy {
        reset();
        Proxy(name)
    }

    /// Refuses connections and closes those that are open.
    pub fn cut(&self) {
        post(&format!("/proxies/{}", self.0), &json!({ "enabled": false }));
    }

    /// Nothing comes through, and nothing is closed.
    pub fn blackhole(&self) {
        self.toxic("timeout", &json!({ "timeout": 0 }));
    }

    /// What the service answers comes to nobody.
    pub fn deaf(&self) {
        self.toxic_on("downstream", "timeout", &json!({ "timeout": 0 }));
    }

    pub fn latency(&self, ms: u64) {
        self.toxic("latency", &json!({ "latency": ms, "jitter": ms / 2 }));
    }

    /// Connections are closed late.
    pub fn slow_close(&self, ms: u64) {
        self.toxic("slow_close", &json!({ "delay": ms }));
    }

    /// A TCP reset in the middle of whatever is being said.
    pub fn reset_peer(&self, after_ms: u64) {
        self.toxic("reset_peer", &json!({ "timeout": after_ms }));
    }

    /// Every connection ends after so many bytes one way: `upstream` or `downstream`.
    pub fn cut_after(&self, stream: &str, bytes: usize) {
        self.toxic_on(stream, "limit_data", &json!({ "bytes": bytes }));
    }

    /// So many bytes a second on every connection, towards the service.
    pub fn limit_to(&self, bytes: usize) {
        self.toxic_on("upstream", "bandwidth", &json!({ "rate": bytes >> 10 }));
    }

    /// The same from the service.
    pub fn limit_from(&self, bytes: usize) {
        self.toxic_on("downstream", "bandwidth", &json!({ "rate": bytes >> 10 }));
    }

    /// As if nothing had been.
    pub fn heal(&self) {
        reset();
    }

    fn toxic(&self, kind: &str, attributes: &Value) {
        for stream in ["upstream", "downstream"] {
            self.toxic_on(stream, kind, attributes);
        }
    }

    fn toxic_on(&self, stream: &str, kind: &str, attributes: &Value) {
        let path = format!("/proxies/{}/toxics", self.0);
        post(&path, &json!({ "type": kind, "stream": stream, "attributes": attributes }));
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            reset();
            if self.0 == "pg17" {
                self.lead_to(&service("WHIPPET_TEST_PG17"));
            }
        }
    }
}

fn reset() {
    post("/reset", &json!({}));
}

fn post(path: &str, body: &Value) {
    let url = format!("{}{path}", service("WHIPPET_TEST_TOXIPROXY"));
    ureq::post(&url).send(body.to_string()).unwrap_or_else(|error| panic!("{url}: {error}"));
}
