//! Reading the settings again while mounts live.
//!
//! What concerns requests to come (who may do what, the idle time of new mounts, the log's level) changes at
//! once; what an agent is built on (its cache, its limits) with its next start. Where settings are read
//! from is not known here: whoever starts the agent says how.

use std::{sync::Arc, time::Duration};

use super::{Agent, AgentError, access::Rules, control::ReloadOutcome};

/// The settings as they are now.
#[derive(Debug, Default)]
pub struct Settings {
    /// Of an agent of many users.
    pub rules: Option<Rules>,
    pub idle_timeout: Option<Duration>,
    /// Names of settings that differ but wait for the next start.
    pub at_next_start: Vec<String>,
}

/// Reads them; an error changes nothing. Blocking.
pub type Reread = dyn Fn() -> Result<Settings, String> + Send + Sync;

impl Agent {
    /// How settings are read again. Said once, before the agent is asked.
    pub fn rereads(&self, reread: Box<Reread>) {
        *self.reread.lock() = Some(Arc::from(reread));
    }

    pub fn can_reload(&self) -> bool {
        self.reread.lock().is_some()
    }

    /// From the next request on the new settings count; what is mounted stays as it is.
    pub async fn reload(&self) -> Result<ReloadOutcome, AgentError> {
        let reread = self.reread.lock().clone();
        let Some(reread) = reread else {
            return Err(AgentError::Reload {
                reason: "this agent was started without them".into(),
            });
        };
        let settings = super::stored::blocking(move || reread())
            .await
            .map_err(|reason| {
                tracing::error!(reason, "the settings are not read again: the old ones stay");
                AgentError::Reload { reason }
            })?;
        let mut outcome = ReloadOutcome {
            catalogs: 0,
            origins: 0,
            endpoints: 0,
            idle_timeout: settings.idle_timeout.map(|time| time.as_secs()),
            at_next_start: settings.at_next_start,
        };
        if let Some(rules) = settings.rules {
            outcome.catalogs = rules.catalogs.len();
            outcome.origins = rules.origins.len();
            outcome.endpoints = rules.endpoints.len();
            self.access.replace(rules);
        }
        *self.idle_timeout.lock() = settings.idle_timeout;
        let waits = outcome.at_next_start.join(", ");
        tracing::info!(
            catalogs = outcome.catalogs,
            origins = outcome.origins,
            at_next_start = waits,
            "settings read again"
        );
        Ok(outcome)
    }
}
