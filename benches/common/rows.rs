//! Many small rows, and what becomes of them.

use std::time::{Duration, Instant};

use rdkafka::{
    Message as _,
    consumer::BaseConsumer,
    producer::{BaseRecord, Producer as _},
};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection};

use crate::common::{Bench, Shape, next};

pub const KEYS: i64 = 1000;

impl Bench {
    /// The rows that every figure is about, so many in a transaction.
    pub async fn fill(&self, topic: &str, keys: i64, transaction: usize) -> anyhow::Result<()> {
        let Shape { rows, payload, text, .. } = self.shape;
        let padding: Vec<String> =
            (1..=payload.div_ceil(64)).map(|n| format!("md5((n + {n})::text)")).collect();
        let json = format!(
            "rpad('{{\"n\":' || n || ',\"pad\":\"' || md5(n::text), {payload}, {})",
            padding.join(" || ")
        );
        let value = if text { json } else { format!("convert_to({json}, 'UTF8')") };
        let insert = format!(
            "DO $$ BEGIN FOR low IN 0 .. {last} BY {transaction} LOOP
                 INSERT INTO outbox (topic, key, type, payload)
                 SELECT '{topic}', 'key-' || n % {keys}, 'Benched', {value}
                 FROM generate_series(low, least(low + {transaction} - 1, {last})) n;
                 COMMIT;
             END LOOP; END $$",
            last = rows - 1,
        );
        let mut db = PgConnection::connect(&self.url).await?;
        // What is checkpointed below need not be waited for at each COMMIT.
        sqlx::raw_sql("SET synchronous_commit = off").execute(&mut db).await?;
        sqlx::raw_sql(AssertSqlSafe(insert)).execute(&mut db).await?;
        db.close().await?;
        sqlx::raw_sql("VACUUM ANALYZE outbox").execute(&self.db).await?;
        sqlx::raw_sql("CHECKPOINT").execute(&self.db).await?;
        Ok(())
    }

    /// The rows of the outbox from memory, through the same client settings: records a second.
    pub async fn raw(&self, topic: &str) -> anyhow::Result<f64> {
        let value = if self.shape.text { "convert_to(payload, 'UTF8')" } else { "payload" };
        let rows: Vec<(String, Vec<u8>)> =
            sqlx::query_as(AssertSqlSafe(format!("SELECT key, {value} FROM outbox ORDER BY seq")))
                .fetch_all(&self.db)
                .await?;
        let producer = self.producer(crate::common::QUEUE_KIB)?;
        let begin = Instant::now();
        for (key, payload) in &rows {
            producer.send(BaseRecord::to(topic).key(key).payload(payload)).map_err(|(error, _)| error)?;
        }
        producer.flush(Duration::from_mins(1))?;
        Ok(rows.len() as f64 / begin.elapsed().as_secs_f64())
    }
}

/// Records a second, from the first one seen to the last.
pub fn count(consumer: &BaseConsumer, rows: usize, on_first: impl FnOnce(Instant)) -> anyhow::Result<f64> {
    let first = next(consumer, 0, rows)?.1;
    on_first(first);
    for seen in 1..rows {
        next(consumer, seen, rows)?;
    }
    Ok(rows as f64 / first.elapsed().as_secs_f64())
}

/// When each of the records came whose keys are the numbers below `total`.
pub fn arrivals(consumer: &BaseConsumer, total: usize) -> anyhow::Result<Vec<Option<Instant>>> {
    let mut seen = vec![None; total];
    let mut left = total;
    while left > 0 {
        let (message, at) = next(consumer, total - left, total)?;
        let number = message.key().and_then(|key| std::str::from_utf8(key).ok()?.parse::<usize>().ok());
        if let Some(slot) = number.and_then(|n| seen.get_mut(n)) {
            left -= usize::from(slot.replace(at).is_none());
        }
    }
    Ok(seen)
}

pub fn payload(n: usize, bytes: usize) -> String {
    format!("{{\"n\":{n:0>width$}}}", width = bytes - 6)
}

/// p50 and p99.
pub fn percentiles(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[((values.len() as f64 * share) as usize).min(values.len() - 1)];
    (at(0.5), at(0.99))
}
