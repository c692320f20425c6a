//! Where bytes come from: an object store location plus credentials.
//!
//! Owns every use of `object_store`: URLs, credentials and their renewal, ranged GETs pinned to an
//! ETag or version id, conditional puts, multipart uploads, listings, deadlines, typed errors.
//! Must not know blocks, caches or catalogs.

use std::{collections::BTreeMap, ops::Range, time::Duration};

use bytes::Bytes;
use futures::stream::BoxStream;
use serde::{Deserialize, Serialize};

/// An object store location: `file:///dir`, `s3://bucket/prefix`, `gs://…`, `az://…`, `http(s)://…`.
/// Never holds credentials (user info in the URL is a parse error).
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StoreUrl(url::Url);

/// The settings of the object-store ecosystems (`AWS_ENDPOINT_URL`, `AZURE_STORAGE_ACCOUNT`, …),
/// collected at the edge. `Debug` never shows a value.
#[derive(Clone, Default, PartialEq, Eq)]
pub struct StoreSettings(BTreeMap<String, String>);

/// What a store client may take before it gives up.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Deadlines {
    pub connect: Duration,
    /// Until the first byte of an answer.
    pub first_byte: Duration,
    /// Between two reads of a body.
    pub read: Duration,
    /// Retries of the client itself (0 on the data path: `fetch` retries).
    pub retries: usize,
    /// No retry starts later than this after the first try.
    pub retry_for: Duration,
}

/// The exact bytes an object must still have.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pin {
    /// Content-addressed: nothing to compare; sums verify it.
    Content,
    ETag(String),
    VersionId(String),
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ObjectInfo {
    /// Relative to the store's prefix.
    pub key: String,
    pub size: u64,
    pub etag: Option<String>,
    pub version_id: Option<String>,
    /// Seconds and nanoseconds since the epoch.
    pub modified: (i64, u32),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PutOutcome {
    Created,
    AlreadyExists,
}

/// An open store: one client, one prefix. Cheap to clone.
#[derive(Clone)]
pub struct Store {
    // filled in by the room's owner
}

/// One level of a delimited listing.
#[derive(Debug, Default)]
pub struct Level {
    pub prefixes: Vec<String>,
    pub objects: Vec<ObjectInfo>,
}

#[allow(unused_variables)]
impl Store {
    pub fn open(url: &StoreUrl, settings: &StoreSettings, deadlines: &Deadlines) -> Result<Self, OriginError> {
        todo!()
    }
    pub fn url(&self) -> &StoreUrl {
        todo!()
    }
    /// Endpoint + bucket + prefix in canonical form: part of a cached object's identity.
    pub fn canonical(&self) -> &str {
        todo!()
    }
    /// Exactly `range` of the object, as a stream; errors if the answer is longer, shorter or elsewhere.
    pub async fn get_range(
        &self,
        key: &str,
        pin: &Pin,
        range: Range<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, OriginError>>, OriginError> {
        todo!()
    }
    /// The whole of a small object; `TooLarge` if it has more than `limit` bytes.
    pub async fn get(&self, key: &str, limit: u64) -> Result<(Bytes, ObjectInfo), OriginError> {
        todo!()
    }
    pub async fn head(&self, key: &str) -> Result<ObjectInfo, OriginError> {
        todo!()
    }
    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), OriginError> {
        todo!()
    }
    pub async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, OriginError> {
        todo!()
    }
    /// Streams `parts` into one object: multipart, bounded memory, aborted on error.
    pub async fn put_stream(
        &self,
        key: &str,
        size: u64,
        parts: BoxStream<'_, std::io::Result<Bytes>>,
    ) -> Result<(), OriginError> {
        todo!()
    }
    pub async fn delete(&self, key: &str) -> Result<(), OriginError> {
        todo!()
    }
    /// Everything below `prefix` (with its trailing slash) whose key is greater than `after`, in pages.
    pub fn list(&self, prefix: &str, after: Option<&str>) -> BoxStream<'static, Result<ObjectInfo, OriginError>> {
        todo!()
    }
    pub async fn list_level(&self, prefix: &str) -> Result<Level, OriginError> {
        todo!()
    }
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum OriginError {
    #[error("{key} does not exist in {store}")]
    NotFound { store: String, key: String },
}
