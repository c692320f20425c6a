//! Why bytes could not be had.

use std::{sync::Arc, time::Duration};

use crate::origin::OriginError;

/// Cloneable: one failed GET fails every reader that waited for it.
#[derive(Clone, Debug, thiserror::Error)]
#[non_exhaustive]
pub enum FetchError {
    #[error("no answer within {0:?}")]
    Deadline(Duration),
    #[error("{}", .0.chain())]
    Origin(#[source] Arc<OriginError>),
    #[error(
        "block {block} of {key} does not have the bytes that were published (fetched twice); the object was overwritten or is damaged"
    )]
    Corrupt { key: String, block: u64 },
    #[error("the sums of {key} could not be had: {reason}")]
    Sums { key: String, reason: String },
    #[error("fetching was stopped")]
    Stopped,
}

impl FetchError {
    /// Whether the reader lacks a permission (EACCES) rather than the bytes (EIO).
    pub fn is_denied(&self) -> bool {
        matches!(self, Self::Origin(error) if matches!(**error, OriginError::Denied { .. } | OriginError::Credentials { .. }))
    }
}
