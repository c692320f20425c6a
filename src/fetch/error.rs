//! Why bytes could not be had. Cloneable: one failed request fails every reader that waited for it.

use std::{error::Error, sync::Arc, time::Duration};

use crate::origin::OriginError;

#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    #[error("{key}: no answer within {} s", after.as_secs())]
    Deadline { key: String, after: Duration },
    #[error("{0}")]
    Origin(#[source] Arc<OriginError>),
    #[error("{key}: block {block} is not what was published, twice; its owner can publish it again")]
    Damaged { key: String, block: u64 },
    #[error("the sums in {key} cannot be used")]
    Sums {
        key: String,
        #[source]
        source: Arc<dyn Error + Send + Sync>,
    },
    #[error("{key}: the cache loses blocks faster than they are read; give it more room (--cache-size)")]
    CacheThrash { key: String },
    #[error("the fetch ended early")]
    Ended,
}

impl From<OriginError> for FetchError {
    fn from(error: OriginError) -> Self {
        Self::Origin(Arc::new(error))
    }
}

impl FetchError {
    /// Credentials or permissions, rather than the network or the data.
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Origin(error) if matches!(**error, OriginError::Denied { .. } | OriginError::Credentials { .. }))
    }

    pub(super) fn in_words(&self) -> String {
        let mut text = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            let next = error.to_string();
            if !text.contains(&next) {
                text.push_str(": ");
                text.push_str(&next);
            }
            cause = error.source();
        }
        text
    }
}
