//! The token that Kafka's clients log in with, where it comes from a file or a command.

use super::{Finding, Fix};
use crate::{config::Config, kafka_token::Tokens};

const CHECK: &str = "kafka: token";

pub(super) async fn examine(config: &Config) -> Option<Finding> {
    let from = config.kafka.token_from()?;
    let tokens = Tokens::of(from.clone());
    // A command may take its time.
    let looked = tokio::task::spawn_blocking(move || tokens.look()).await;
    Some(match looked.unwrap_or_else(|error| Err(error.to_string())) {
        Ok(until) => {
            Finding::ok(CHECK, format!("{from}: good until {}", humantime::format_rfc3339_seconds(until)))
        }
        Err(why) => Finding::fail(CHECK, why).mended_by(Fix::Config(
            "kafka.token_file, kafka.token_command: (what has, or prints, a token of the relay's that is good now)"
                .into(),
        )),
    })
}
