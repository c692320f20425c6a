//! From references to records.
//!
//! Owns records, versions, aliases, listing and publishing a record (put-if-absent, last).
//! Must not know FUSE or the cache.

mod error;
pub mod sealed;
pub mod store;

use std::sync::Arc;

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use error::{CatalogError, Damage, Existing};

use crate::{
    digest::Digest,
    origin::{Deadlines, Store, StoreSettings, StoreUrl},
    reference::{
        AliasName, DatastoreName, PinnedReference, QualifiedName, Reference, UserName, VersionNumber,
    },
    tree::Totals,
};

/// One part of a tree as it lies in the catalog's store.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TreePart {
    /// BLAKE3 of the part as used (uncompressed).
    pub digest: Digest,
    /// Relative to the catalog's store.
    pub key: String,
    /// Bytes as used.
    pub size: u64,
    /// Bytes on the wire; equal to `size` for a part that is not compressed.
    pub wire_size: u64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TreeParts {
    pub rows: TreePart,
    /// One digest per file; absent for registered data.
    pub digests: Option<TreePart>,
    /// One sum per block; absent for registered data. Read by ranges.
    pub sums: Option<TreePart>,
}

/// Where a version's objects lie.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum OriginLocation {
    /// In the catalog's own store (so that a catalog can be moved as a whole).
    Catalog,
    Url(StoreUrl),
}

/// What the catalog holds for one version. Immutable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Record {
    /// 1
    pub format: u32,
    pub owner: UserName,
    pub datastore: DatastoreName,
    pub version: VersionNumber,
    pub tree: TreeParts,
    pub origin: OriginLocation,
    pub created: Timestamp,
    pub message: String,
    pub totals: Totals,
    /// Tells our own successful put, whose answer was lost, from somebody else's.
    pub nonce: String,
}

impl Record {
    /// The only format this program writes and reads.
    pub const FORMAT: u32 = 1;

    pub fn name(&self) -> QualifiedName {
        QualifiedName {
            owner: self.owner.clone(),
            datastore: self.datastore.clone(),
        }
    }

    pub fn reference(&self) -> PinnedReference {
        PinnedReference {
            name: self.name(),
            version: self.version,
        }
    }
}

/// A record before it has a version number.
#[derive(Clone, Debug)]
pub struct Draft {
    pub name: QualifiedName,
    pub tree: TreeParts,
    pub origin: OriginLocation,
    pub message: String,
    pub totals: Totals,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DatastoreSummary {
    pub name: QualifiedName,
    pub latest: VersionNumber,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Alias {
    pub alias: AliasName,
    pub version: VersionNumber,
}

#[async_trait]
pub trait Catalog: Send + Sync {
    /// Everybody's datastores, or one user's; sorted.
    async fn list(&self, owner: Option<&UserName>) -> Result<Vec<DatastoreSummary>, CatalogError>;
    /// Ascending and never empty: else `NoSuchUser`, `NoSuchDatastore` (with near misses) or `NoVersion`.
    async fn versions(&self, name: &QualifiedName) -> Result<Vec<VersionNumber>, CatalogError>;
    async fn record(&self, reference: &PinnedReference) -> Result<Record, CatalogError>;
    async fn aliases(&self, name: &QualifiedName) -> Result<Vec<Alias>, CatalogError>;
    async fn set_alias(&self, name: &QualifiedName, alias: &Alias) -> Result<(), CatalogError>;
    async fn remove_alias(&self, name: &QualifiedName, alias: &AliasName) -> Result<(), CatalogError>;
    /// Gives the draft the next free version number; two publishers never get the same one.
    async fn publish(&self, draft: Draft) -> Result<Record, CatalogError>;
    /// Resolved once: owner `None` is `me`; latest and aliases become a number.
    async fn resolve(&self, reference: &Reference, me: &UserName) -> Result<Record, CatalogError>;
    /// Where trees lie, and objects whose origin is [`OriginLocation::Catalog`].
    fn store(&self) -> &Store;
}

/// The catalog at `url`. Only stores are catalogs so far.
pub fn open(
    url: &StoreUrl,
    settings: &StoreSettings,
    deadlines: &Deadlines,
) -> Result<Arc<dyn Catalog>, CatalogError> {
    match url.scheme() {
        "file" | "s3" | "gs" | "az" => {}
        _ => return Err(CatalogError::UnsupportedScheme { url: url.clone() }),
    }
    let store = Store::open(url, settings, deadlines).map_err(|source| CatalogError::Origin {
        doing: "opening the catalog",
        source,
    })?;
    Ok(Arc::new(store::StoreCatalog::new(store)))
}
