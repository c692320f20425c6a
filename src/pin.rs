//! What ties a version to the exact bytes of an object. A tree stores it, the origin checks it.

use serde::{Deserialize, Serialize};

/// The exact bytes an object must still have.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pin {
    /// Content-addressed: nothing to compare; sums verify it.
    Content,
    ETag(String),
    VersionId(String),
}
