//! Another configuration for a relay that runs: whole, or not at all.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::roster::Reload;
use crate::{
    admin::metrics::Metrics,
    config::{Config, Difference},
};

/// Hands a relay that runs another configuration.
pub struct Reloader {
    pub(super) running: Arc<Config>,
    /// To the part that has the tables; `None` where there is none.
    pub(super) part: Option<mpsc::Sender<Reload>>,
    pub(super) metrics: Arc<Metrics>,
}

/// Why the old configuration goes on.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error(
        "a running relay cannot take up a change of {}: restart it to apply the file. Nothing of it is applied yet",
        .0.join(", ")
    )]
    NeedsRestart(Vec<String>),
    #[error("{0:#}")]
    Failed(anyhow::Error),
}

impl Reloader {
    /// Takes up what has changed. Returns when the tables that changed have stopped and started.
    pub async fn take_up(&mut self, next: Config) -> Result<Difference, Refused> {
        let next = Arc::new(next);
        let taken = self.try_to(&next).await;
        self.metrics.reloaded(taken.is_ok());
        if taken.is_ok() {
            self.running = next;
        }
        taken
    }

    /// The file was not one that can be taken up.
    pub fn refuse(&self) {
        self.metrics.reloaded(false);
    }

    pub fn running(&self) -> &Config {
        &self.running
    }

    async fn try_to(&self, next: &Arc<Config>) -> Result<Difference, Refused> {
        let difference = self.running.difference(next);
        if !difference.needs_restart.is_empty() {
            return Err(Refused::NeedsRestart(difference.needs_restart));
        }
        if let Some(part) = &self.part {
            let (done, answered) = oneshot::channel();
            let stops = || Refused::Failed(anyhow::anyhow!("the relay stops"));
            let reload = Reload { to: next.clone(), difference: difference.clone(), done };
            part.send(reload).await.map_err(|_| stops())?;
            answered.await.map_err(|_| stops())?.map_err(Refused::Failed)?;
        }
        Ok(difference)
    }
}
