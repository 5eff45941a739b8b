//! Another configuration for a relay that runs: whole, or not at all.

use std::sync::Arc;

use tokio::sync::{mpsc, oneshot};

use super::roster::Reload;
use crate::{
    admin::{metrics::Metrics, status::Board},
    config::{Config, Difference},
};

/// Hands a relay that runs another configuration.
pub struct Reloader {
    pub(super) running: Arc<Config>,
    /// To the part that has the tables; `None` where there is none.
    pub(super) part: Option<mpsc::Sender<Reload>>,
    pub(super) metrics: Arc<Metrics>,
    /// What the status says of it; the first is everybody's.
    pub(super) boards: Vec<Arc<Board>>,
}

/// Why the old configuration goes on.
#[derive(Debug, thiserror::Error)]
pub enum Refused {
    #[error(
        "a running relay cannot take up a change of {}: restart it to apply the file. Nothing of it is applied yet",
        .0.join(", ")
    )]
    NeedsRestart(Vec<String>),
    /// Found before anything stopped.
    #[error("{0:#}")]
    Failed(anyhow::Error),
    #[error("the relay stops")]
    Stops,
}

impl Reloader {
    /// Takes up what has changed. Returns when the tables that changed have stopped and started.
    pub async fn take_up(&mut self, next: Config) -> Result<Difference, Refused> {
        let next = Arc::new(next);
        let taken = self.try_to(&next).await;
        match &taken {
            Ok(_) => {
                self.running = next;
                self.tell(None);
            }
            Err(refused) => self.refuse(refused.to_string()),
        }
        taken
    }

    /// The file was not one that can be taken up.
    pub fn refuse(&self, why: String) {
        self.tell(Some(why));
    }

    fn tell(&self, refused: Option<String>) {
        self.metrics.reloaded(refused.is_none());
        if let Some(board) = self.boards.first() {
            board.config(refused);
        }
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
            let reload = Reload { to: next.clone(), difference: difference.clone(), done };
            part.send(reload).await.map_err(|_| Refused::Stops)?;
            answered.await.map_err(|_| Refused::Stops)??;
        }
        Ok(difference)
    }
}
