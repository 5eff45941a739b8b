//! The example application: an order and its event, in one transaction.

use std::time::{Duration, Instant};

use base64::{Engine as _, prelude::BASE64_STANDARD};
use sqlx::{AssertSqlSafe, Sqlite, SqlitePool, Transaction};
use uuid::Uuid;

use super::{CONTRACTS, ORDERS, Outbox, Shared, lock};

const CUSTOMERS: usize = 100;
/// One transaction in so many is rolled back: its events must never be seen.
const ROLLED_BACK: usize = 20;
/// How long the writing takes, so that there is something to watch.
const WRITING: Duration = Duration::from_secs(3);
/// What is attached to one order, in bytes: it goes through a claim check.
const SCAN: usize = 5 << 20;
/// And to another one, which goes in chunks. The broker inside this process keeps 5 MiB of a partition.
const CONTRACT: usize = 3 << 20;

/// An event that was committed, as a consumer has to see it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Expected {
    pub id: String,
    pub topic: &'static str,
    pub key: String,
    /// How it has to travel, by its name.
    pub travels: &'static str,
    pub payload: Vec<u8>,
    /// The request context that the application wrote into the row.
    pub context: Vec<(String, String)>,
    pub committed: Instant,
}

/// Writes `events` events that are committed, and some that are not.
pub async fn run(database: SqlitePool, events: usize, shared: Shared) -> anyhow::Result<()> {
    sqlx::raw_sql(
        "CREATE TABLE orders (id TEXT PRIMARY KEY, customer TEXT NOT NULL, cents INTEGER NOT NULL)",
    )
    .execute(&database)
    .await?;
    let begin = Instant::now();
    let (mut written, mut transactions) = (0, 0);
    while written < events {
        let orders = fastrand::usize(1..=3).min(events - written);
        transactions += 1;
        let mut transaction = database.begin_with("BEGIN IMMEDIATE").await?;
        let mut placed = Vec::with_capacity(orders);
        for _ in 0..orders {
            let number = written + placed.len();
            placed.push(place_order(&mut transaction, number, Kind::of(number, events)).await?);
        }
        if transactions % ROLLED_BACK == 0 {
            transaction.rollback().await?;
            lock(&shared).rolled_back += placed.len();
        } else {
            // Before the commit returns, the relay may have published it.
            let mut progress_at_commit = placed;
            transaction.commit().await?;
            let committed = Instant::now();
            progress_at_commit.iter_mut().for_each(|order| order.committed = committed);
            written += progress_at_commit.len();
            lock(&shared).expected.extend(progress_at_commit);
        }
        let due = begin + WRITING.mul_f64(written as f64 / events as f64);
        tokio::time::sleep_until(due.into()).await;
    }
    lock(&shared).writing -= 1;
    Ok(())
}

/// What is said about an order.
struct Kind {
    name: &'static str,
    outbox: Outbox,
    travels: &'static str,
    /// The size of what is attached to it, as text.
    attached: usize,
}

impl Kind {
    /// Two of all events are large.
    fn of(number: usize, events: usize) -> Kind {
        if number == events / 3 {
            Kind { name: "OrderScanned", outbox: ORDERS, travels: "reference", attached: SCAN }
        } else if number == events * 2 / 3 {
            Kind { name: "ContractSigned", outbox: CONTRACTS, travels: "chunks", attached: CONTRACT }
        } else {
            Kind { name: "OrderPlaced", outbox: ORDERS, travels: "inline", attached: 0 }
        }
    }
}

/// The business row and the outbox row.
async fn place_order(
    transaction: &mut Transaction<'_, Sqlite>,
    number: usize,
    kind: Kind,
) -> anyhow::Result<Expected> {
    let (id, customer) = (Uuid::new_v4().to_string(), format!("customer-{}", fastrand::usize(..CUSTOMERS)));
    let cents = fastrand::i64(100..100_000);
    sqlx::query("INSERT INTO orders (id, customer, cents) VALUES (?1, ?2, ?3)")
        .bind(&id)
        .bind(&customer)
        .bind(cents)
        .execute(&mut **transaction)
        .await?;
    let mut payload =
        serde_json::json!({ "order": id, "number": number, "customer": customer, "cents": cents });
    if kind.attached > 0 {
        payload["attached"] = attachment(kind.attached).into();
    }
    let context = [
        ("x-request-id", Uuid::new_v4().to_string()),
        ("user-id", format!("user-{}", fastrand::u32(..1000))),
        ("traceparent", format!("00-{}-{:016x}-01", Uuid::new_v4().simple(), fastrand::u64(1..))),
    ];
    let context: Vec<(String, String)> =
        context.into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
    let headers: serde_json::Map<String, serde_json::Value> =
        context.iter().map(|(name, value)| (name.clone(), value.as_str().into())).collect();
    let order = Expected {
        id: Uuid::new_v4().to_string(),
        topic: kind.outbox.topic,
        key: customer,
        travels: kind.travels,
        payload: payload.to_string().into_bytes(),
        context,
        committed: Instant::now(),
    };
    let insert = format!(
        "INSERT INTO {} (id, topic, key, type, payload, headers) VALUES (?1, ?2, ?3, ?4, ?5, ?6)",
        kind.outbox.table
    );
    sqlx::query(AssertSqlSafe(insert))
        .bind(&order.id)
        .bind(order.topic)
        .bind(&order.key)
        .bind(kind.name)
        .bind(&order.payload)
        .bind(serde_json::Value::Object(headers).to_string())
        .execute(&mut **transaction)
        .await?;
    Ok(order)
}

/// Something that nothing makes smaller, as text.
fn attachment(bytes: usize) -> String {
    let mut scan = vec![0; bytes / 4 * 3];
    fastrand::fill(&mut scan);
    BASE64_STANDARD.encode(scan)
}
