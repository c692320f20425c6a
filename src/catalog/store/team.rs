//! What a team needs of a store catalog beyond records: pages, retiring, leases, publishing once.
//!
//! ```text
//! retired/<owner>/<datastore>/<version, 20 digits>.json        the version is not to be mounted any more
//! leases/<owner>/<datastore>/<version>/<id>.<user>.json        somebody has it mounted; renewed, or void
//! ```

use std::collections::{BTreeMap, BTreeSet};

use futures::{TryStreamExt, stream};
use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{LISTINGS, RecordStore, StoreCatalog, layout, origin};
use crate::{
    catalog::{CatalogError, Damage, DatastoreSummary, Lease, LeaseId, Record, protocol::Page, sealed},
    reference::{DatastoreName, PinnedReference, QualifiedName, UserName, VersionNumber},
};

/// Holders that a refusal to retire names.
const NAMED_HOLDERS: usize = 20;

/// A retired version, as it is stored.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredRetirement {
    format: u32,
    reference: PinnedReference,
    by: UserName,
    at: Timestamp,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredLease {
    format: u32,
    lease: Lease,
}

const FORMAT: u32 = 1;

/// Where a listing goes on.
struct Cursor {
    owner: UserName,
    /// Everything up to this one has been listed.
    datastore: DatastoreName,
}

impl<R: RecordStore> StoreCatalog<R> {
    /// The datastores of `owners` (sorted) after `after`, at most `limit`: one listing that goes on where the
    /// last page ended, and holds no more than a page.
    pub async fn page(
        &self,
        owners: &[UserName],
        after: Option<&str>,
        limit: usize,
    ) -> Result<Page<DatastoreSummary>, CatalogError> {
        let cursor = after
            .map(|after| {
                let name: QualifiedName = after.parse().map_err(|_| CatalogError::BadCursor {
                    cursor: after.to_owned(),
                })?;
                Ok::<_, CatalogError>(Cursor {
                    owner: name.owner,
                    datastore: name.datastore,
                })
            })
            .transpose()?;
        let mut page = self.page_of_published(owners, cursor.as_ref(), limit).await?;
        // Few datastores have retired versions: only those are looked at more closely.
        let mut with_retired = BTreeSet::new();
        for owner in owners {
            let prefix = layout::retired_of_user(owner);
            let in_page = |name: &QualifiedName| page.items.iter().any(|item| item.name == *name);
            if !page.items.iter().any(|item| item.name.owner == *owner) {
                continue;
            }
            let mut keys = self.records.list(&prefix, None);
            while let Some(key) = keys.try_next().await.map_err(origin("listing what is retired"))? {
                let datastore = layout::datastore_and_version(&prefix, &key).map(|(datastore, _)| datastore);
                let name = datastore.map(|datastore| QualifiedName::new(owner.clone(), datastore));
                with_retired.extend(name.filter(in_page));
            }
        }
        for name in with_retired {
            let latest = self.available(&name).await?.last().copied();
            match latest {
                Some(latest) => {
                    let item = page.items.iter_mut().find(|item| item.name == name);
                    if let Some(item) = item {
                        item.latest = latest;
                    }
                }
                None => page.items.retain(|item| item.name != name),
            }
        }
        Ok(page)
    }

    async fn page_of_published(
        &self,
        owners: &[UserName],
        cursor: Option<&Cursor>,
        limit: usize,
    ) -> Result<Page<DatastoreSummary>, CatalogError> {
        let mut items: Vec<DatastoreSummary> = Vec::new();
        for owner in owners {
            let below = match cursor {
                Some(cursor) if *owner < cursor.owner => continue,
                Some(cursor) if *owner == cursor.owner => {
                    // After every version's key of the datastore, whose names are digits.
                    let name = QualifiedName::new(owner.clone(), cursor.datastore.clone());
                    Some(format!("{}~", layout::records_of(&name)))
                }
                _ => None,
            };
            let prefix = layout::records_of_user(owner);
            let mut keys = self.records.list(&prefix, below.as_deref());
            while let Some(key) = keys.try_next().await.map_err(origin("listing the catalog"))? {
                let Some((datastore, version)) = layout::datastore_and_version(&prefix, &key) else {
                    continue;
                };
                if let Some(last) = items.last_mut()
                    && last.name.owner == *owner
                    && last.name.datastore == datastore
                {
                    last.latest = last.latest.max(version);
                    continue;
                }
                // One more has begun, so those before it are complete.
                if items.len() == limit {
                    let next = items.last().map(|last| last.name.to_string());
                    return Ok(Page { items, next });
                }
                items.push(DatastoreSummary {
                    name: QualifiedName::new(owner.clone(), datastore),
                    latest: version,
                });
            }
        }
        Ok(Page { items, next: None })
    }

    /// The versions that were retired; none where nothing was.
    pub(super) async fn retired(&self, name: &QualifiedName) -> Result<Vec<VersionNumber>, CatalogError> {
        let prefix = layout::retired_of(name);
        let level = self.level(&prefix).await?;
        Ok(level
            .objects
            .iter()
            .filter_map(|object| layout::version(layout::below(&prefix, &object.key)?))
            .collect())
    }

    /// What can be mounted, ascending; empty if there is nothing, whatever the reason.
    pub(super) async fn available(&self, name: &QualifiedName) -> Result<Vec<VersionNumber>, CatalogError> {
        let (mut versions, retired) = futures::try_join!(self.numbers(name), self.retired(name))?;
        versions.retain(|version| !retired.contains(version));
        Ok(versions)
    }

    pub(super) async fn refuse_retired(&self, reference: &PinnedReference) -> Result<(), CatalogError> {
        let key = layout::retired(reference);
        let Some(bytes) = self.read(&key).await? else {
            return Ok(());
        };
        let stored: StoredRetirement =
            sealed::unseal("retired", FORMAT, &bytes).map_err(self.damaged(&key))?;
        sealed::at_home(reference, &stored.reference).map_err(self.damaged(&key))?;
        Err(CatalogError::Retired {
            reference: reference.clone(),
            by: Some(stored.by),
            at: Some(stored.at),
        })
    }

    /// For those who have it mounted.
    pub async fn record_even_if_retired(&self, reference: &PinnedReference) -> Result<Record, CatalogError> {
        match self.find(reference).await? {
            Some(record) => Ok(record),
            None => Err(self.no_such_version(reference).await?),
        }
    }

    /// Marks a version: whoever has it mounted reads on, nobody mounts it any more. Its number stays taken.
    pub async fn retire_version(
        &self,
        reference: &PinnedReference,
        by: &UserName,
        although_used: bool,
    ) -> Result<(), CatalogError> {
        if self.find(reference).await?.is_none() {
            return Err(self.no_such_version(reference).await?);
        }
        if !although_used {
            let holders = self.leases_of(&reference.name, Some(reference.version)).await?;
            if !holders.is_empty() {
                return Err(CatalogError::InUse {
                    reference: reference.clone(),
                    holders: holders
                        .iter()
                        .take(NAMED_HOLDERS)
                        .map(|lease| format!("{} on {}", lease.user, lease.host))
                        .collect(),
                });
            }
        }
        let key = layout::retired(reference);
        let stored = StoredRetirement {
            format: FORMAT,
            reference: reference.clone(),
            by: by.clone(),
            at: Timestamp::now(),
        };
        self.put_sealed("retired", &key, &stored, "noting that the version is retired")
            .await
    }

    async fn put_sealed(
        &self,
        kind: &str,
        key: &str,
        content: &impl Serialize,
        doing: &'static str,
    ) -> Result<(), CatalogError> {
        let bytes = sealed::seal(kind, content).map_err(|source| {
            self.damaged(key)(Damage::Fields {
                known: FORMAT,
                source,
            })
        })?;
        self.records.put(key, bytes.into()).await.map_err(origin(doing))
    }

    /// Writes or renews a lease.
    pub async fn put_lease(&self, lease: &Lease) -> Result<(), CatalogError> {
        let stored = StoredLease {
            format: FORMAT,
            lease: lease.clone(),
        };
        self.put_sealed("lease", &layout::lease(lease), &stored, "writing the lease")
            .await
    }

    /// One that is not there is gone already.
    pub async fn drop_lease(
        &self,
        reference: &PinnedReference,
        id: &LeaseId,
        user: &UserName,
    ) -> Result<(), CatalogError> {
        match self.records.delete(&layout::lease_key(reference, id, user)).await {
            Err(error) if !matches!(error, crate::origin::OriginError::NotFound { .. }) => {
                Err(origin("removing the lease")(error))
            }
            _ => Ok(()),
        }
    }

    /// Who has the datastore (or one version of it) mounted, as far as they have renewed in time.
    pub async fn leases_of(
        &self,
        name: &QualifiedName,
        version: Option<VersionNumber>,
    ) -> Result<Vec<Lease>, CatalogError> {
        let prefix = match version {
            Some(version) => layout::leases_of_version(&name.at(version)),
            None => layout::leases_of(name),
        };
        let keys = self.records.list(&prefix, None);
        self.living(keys).await
    }

    /// Everything that `owner`'s datastores are mounted as.
    pub async fn leases_of_owner(&self, owner: &UserName) -> Result<Vec<Lease>, CatalogError> {
        let keys = self.records.list(&layout::leases_of_owner(owner), None);
        self.living(keys).await
    }

    async fn living(
        &self,
        keys: stream::BoxStream<'static, Result<String, crate::origin::OriginError>>,
    ) -> Result<Vec<Lease>, CatalogError> {
        let now = Timestamp::now();
        let found: BTreeMap<String, Lease> = keys
            .map_err(origin("listing leases"))
            .map_ok(async |key| {
                let Some(bytes) = self.read(&key).await? else {
                    return Ok(None);
                };
                // A damaged lease is nobody's.
                let stored: Option<StoredLease> = sealed::unseal("lease", FORMAT, &bytes).ok();
                let lease = stored
                    .map(|stored| stored.lease)
                    .filter(|lease| layout::lease(lease) == key);
                match lease {
                    Some(lease) if lease.expires > now => Ok(Some((key, lease))),
                    // Its host is gone; whoever looks tidies up. A lease that is renewed at this moment is
                    // written again with its next renewal.
                    _ => {
                        if let Err(error) = self.records.delete(&key).await {
                            tracing::debug!(key, %error, "a void lease stays");
                        }
                        Ok(None)
                    }
                }
            })
            .try_buffered(LISTINGS)
            .try_filter_map(|found| futures::future::ready(Ok(found)))
            .try_collect()
            .await?;
        Ok(found.into_values().collect())
    }
}
