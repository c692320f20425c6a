//! What can go wrong between here and a store, in words a person can act on.

use std::{error::Error, ops::Range, time::Duration};

/// Every message names the store and the key, and says what to do where there is something to do.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OriginError {
    #[error("{text:?} is not a store location: {reason}")]
    BadUrl { text: String, reason: String },
    #[error("{} cannot be a key: {reason}", at(.store, .key))]
    BadKey {
        store: String,
        key: String,
        reason: String,
    },
    #[error("a setting for {store} is not usable; check the AWS_…, GOOGLE_… or AZURE_… variables")]
    Settings {
        store: String,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    #[error("{key} does not exist in {store}")]
    NotFound { store: String, key: String },
    #[error("the bucket (or directory) of {store} does not exist; check its name and the endpoint")]
    NoBucket {
        store: String,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    #[error("{} changed since it was published (expected {expected}, found {}); publish or register it again", at(.store, .key), .found.as_deref().unwrap_or("something else"))]
    Changed {
        store: String,
        key: String,
        expected: String,
        found: Option<String>,
    },
    #[error("access to {} is denied; ask for permission, or check which credentials are in use", at(.store, .key))]
    Denied {
        store: String,
        key: String,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    #[error("no usable credentials for {store}: {reason}")]
    Credentials {
        store: String,
        reason: String,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    #[error("{store} asks to slow down (reading {key})")]
    Throttled {
        store: String,
        key: String,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    #[error("{store} cannot be reached; check the endpoint and the network")]
    Unreachable {
        store: String,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    #[error("{} did not answer within {after:?}", at(.store, .key))]
    Deadline {
        store: String,
        key: String,
        after: Duration,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    #[error("the answer for {} ended after {got} of {expected} bytes", at(.store, .key))]
    Truncated {
        store: String,
        key: String,
        expected: u64,
        got: u64,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    #[error("the answer for {} is not the bytes {}..{} that were asked for", at(.store, .key), .asked.start, .asked.end)]
    BadRange {
        store: String,
        key: String,
        asked: Range<u64>,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    #[error("{} has {size} bytes, more than the {limit} allowed here", at(.store, .key))]
    TooLarge {
        store: String,
        key: String,
        size: u64,
        limit: u64,
    },
    #[error("{store} does not support {what}")]
    Unsupported {
        store: String,
        what: &'static str,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    #[error("{} cannot be written: {reason}", at(.store, .key))]
    ReadOnly {
        store: String,
        key: String,
        reason: String,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    /// A 500 or a broken connection before any byte: worth another try.
    #[error("{} failed for a reason that may pass", at(.store, .key))]
    Transient {
        store: String,
        key: String,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
    #[error("{} failed", at(.store, .key))]
    Other {
        store: String,
        key: String,
        source: Option<Box<dyn Error + Send + Sync>>,
    },
}

impl OriginError {
    /// Whether the same request may succeed if it is made again soon.
    pub fn is_retryable(&self) -> bool {
        matches!(
            self,
            Self::Throttled { .. }
                | Self::Unreachable { .. }
                | Self::Deadline { .. }
                | Self::Truncated { .. }
                | Self::BadRange { .. }
                | Self::Transient { .. }
        )
    }

    /// The message and its causes in one line.
    pub fn chain(&self) -> String {
        crate::causes::in_one_line(self)
    }
}

fn at(store: &str, key: &str) -> String {
    if key.is_empty() {
        store.to_owned()
    } else {
        format!("{}/{key}", store.trim_end_matches('/'))
    }
}
