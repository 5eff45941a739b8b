//! What `kafka.delivery: exactly_once` asks of the rest.

use super::{AfterPublish, Capture, Config, Delivery, Rows, error::Problems};
use crate::record::is_legal_topic;

pub(super) fn check(config: &Config, problems: &mut Problems) {
    if !is_legal_topic(&config.kafka.position_topic) {
        problems.add("kafka.position_topic", "not a legal name of a Kafka topic");
    }
    if config.kafka.delivery != Delivery::ExactlyOnce {
        return;
    }
    if config.ingest.is_some() {
        problems.add(
            "kafka.delivery",
            "exactly_once is for tables: run `ingest` in a relay of its own, with delivery: at_least_once",
        );
    }
    for (index, table) in config.tables.iter().enumerate() {
        let at = |key: &str| format!("tables[{index}].{key}");
        if table.capture == Capture::Auto {
            problems.add_key(
                &at("capture"),
                "with kafka.delivery: exactly_once, auto cannot be chosen; expected poll or stream",
            );
        }
        if table.message_prefix().is_some() {
            problems.add_key(
                &at("name"),
                "with kafka.delivery: exactly_once, logical messages cannot be chosen: events need rows that \
                 stay until they are recorded. Use a table, or a relay of its own with delivery: at_least_once",
            );
        } else if table.rows == Rows::Transient {
            problems.add_key(
                &at("rows"),
                "with kafka.delivery: exactly_once, transient cannot be chosen: events need rows that stay \
                 until they are recorded. Expected rows: stay, or delivery: at_least_once for this table in a relay of its own",
            );
        }
        if table.after_publish == AfterPublish::Keep {
            problems.add_key(
                &at("after_publish"),
                "with kafka.delivery: exactly_once, keep cannot be chosen: nothing in the table says what is \
                 recorded; expected delete or mark",
            );
        }
    }
}
