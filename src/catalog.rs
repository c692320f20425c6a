//! From references to records.
//!
//! Owns records, versions, aliases, listing and publishing a record (put-if-absent, last).
//! Must not know FUSE or the cache.

mod error;
pub mod http;
mod lease;
pub mod protocol;
pub mod sealed;
pub mod server;
pub mod store;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

pub use error::{CatalogError, Damage, Existing};
pub use lease::{Lease, LeaseId};

use crate::{
    digest::Digest,
    origin::{Borrowed, Deadlines, Store, StoreSettings, StoreUrl},
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

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DatastoreSummary {
    pub name: QualifiedName,
    pub latest: VersionNumber,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Alias {
    pub alias: AliasName,
    pub version: VersionNumber,
}

/// People who may read each other's datastores.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Team {
    pub name: String,
    pub members: Vec<UserName>,
}

/// The stores that one version is read from.
pub struct Reading {
    /// Its tree, and its sums.
    pub trees: Store,
    /// Its objects; no retries of its own.
    pub objects: Store,
    /// The keys that are lent for it, where they are.
    pub loans: Vec<Arc<Borrowed>>,
    /// The objects' keys and what came with them, as they are now: for whoever goes on with the mount.
    pub lent: StoreSettings,
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
    /// Where trees lie, and objects whose origin is [`OriginLocation::Catalog`]. Publishing writes there.
    fn store(&self) -> &Store;

    /// Who the catalog says I am; `None` where it takes everybody's word.
    fn me(&self) -> Option<&UserName> {
        None
    }

    /// Opens what the version is read from. `settings` are the caller's own.
    async fn reading(&self, record: &Record, settings: &StoreSettings) -> Result<Reading, CatalogError> {
        let url = match &record.origin {
            OriginLocation::Catalog => self.store().url(),
            OriginLocation::Url(url) => url,
        };
        let objects =
            Store::open(url, settings, &Deadlines::data()).map_err(|source| CatalogError::Origin {
                doing: "opening its origin",
                source,
            })?;
        Ok(Reading {
            trees: self.store().clone(),
            objects,
            loans: Vec::new(),
            lent: StoreSettings::default(),
        })
    }

    /// From now on nobody mounts the version; refused while somebody has it mounted, unless `although_used`.
    async fn retire(
        &self,
        reference: &PinnedReference,
        by: &UserName,
        although_used: bool,
    ) -> Result<(), CatalogError>;

    /// Who has versions of the datastore mounted, as far as the catalog is told.
    async fn leases(&self, name: &QualifiedName) -> Result<Vec<Lease>, CatalogError>;

    /// Everybody's whom I may see.
    async fn all_leases(&self) -> Result<Vec<Lease>, CatalogError> {
        Ok(Vec::new())
    }

    /// Says, or says again, that the version is mounted here; answers within what time to say it again.
    /// `None`: nobody wants to know.
    async fn hold(&self, lease: &Lease) -> Result<Option<Duration>, CatalogError> {
        let _ = lease;
        Ok(None)
    }

    async fn release(&self, lease: &Lease) -> Result<(), CatalogError> {
        let _ = lease;
        Ok(())
    }

    /// My teams and who is in them; `None` where the catalog knows of none.
    async fn teams(&self) -> Result<Option<Vec<Team>>, CatalogError> {
        Ok(None)
    }
}

/// The catalog at `url`, which is a store: nothing is asked of it yet.
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

/// The catalog at `url`, of whatever kind; a control plane is asked who the caller is.
pub async fn connect(url: &StoreUrl, settings: &StoreSettings) -> Result<Arc<dyn Catalog>, CatalogError> {
    match url.scheme() {
        "http" | "https" => Ok(Arc::new(http::HttpCatalog::connect(url, settings).await?)),
        _ => open(url, settings, &Deadlines::control()),
    }
}

/// As [`connect`], for whoever will publish.
pub async fn connect_to_publish(
    url: &StoreUrl,
    settings: &StoreSettings,
) -> Result<Arc<dyn Catalog>, CatalogError> {
    match url.scheme() {
        "http" | "https" => Ok(Arc::new(
            http::HttpCatalog::connect_to_publish(url, settings).await?,
        )),
        _ => open(url, settings, &Deadlines::control()),
    }
}

/// As [`connect`], but a control plane whose store is known is not asked: it may be down, and what was
/// mounted goes on.
pub async fn reconnect(
    url: &StoreUrl,
    settings: &StoreSettings,
    store: Option<&StoreUrl>,
) -> Result<Arc<dyn Catalog>, CatalogError> {
    match (url.scheme(), store) {
        ("http" | "https", Some(store)) => Ok(Arc::new(http::HttpCatalog::known(url, settings, store)?)),
        _ => connect(url, settings).await,
    }
}
