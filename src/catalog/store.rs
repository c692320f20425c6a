//! A catalog in an object store, with no server.
//!
//! ```text
//! records/<owner>/<datastore>/<version, 20 digits>.json   one per version, created, never changed
//! aliases/<owner>/<datastore>/<alias>.json                small, overwritten
//! retired/…, leases/…                                     see `team`
//! probe/put-if-absent                                     which store was found to refuse overwriting
//! probe/<random>                                          the probe itself, removed again
//! trees/…, objects/…                                      what `publish` writes; see there
//! ```
//!
//! Names stand in keys as they are: the grammar of references admits only characters that need no
//! escaping in a key, a URL or a file name, and no `..`. Twenty digits hold every version, so that
//! keys sort as numbers. A listing tells which datastores and versions there are; records are read
//! only where their content is wanted.
//!
//! **A version is given away once.** A publisher creates the record under the next number with
//! put-if-absent; the store lets one of them through. Because the client below repeats a request whose
//! answer was lost, `AlreadyExists` may mean *I did it*, and an error may hide a success: the record
//! carries a nonce and is read back before either is believed, and while it is not known what became of
//! one number no other is tried. So each publisher leaves exactly one record.

mod layout;
mod publish;
mod records;
mod team;

use async_trait::async_trait;
use bytes::Bytes;
use futures::{StreamExt, TryStreamExt, stream};
use serde::{Deserialize, Serialize};

use super::{Alias, Catalog, CatalogError, Damage, DatastoreSummary, Draft, Existing, Lease, Record, sealed};
use crate::{
    origin::{OriginError, Store},
    reference::{
        AliasName, DatastoreName, PinnedReference, QualifiedName, Reference, UserName, VersionNumber,
        VersionSelector, did_you_mean,
    },
};

pub use records::RecordStore;

/// Records and aliases are a few hundred bytes plus a message; what is larger is not one.
const RECORD_LIMIT: u64 = 1 << 20;
/// Leaves room for the rest of the record even if every character is escaped.
const MESSAGE_LIMIT: usize = 64 << 10;
/// Requests in flight for one listing.
const LISTINGS: usize = 16;
/// How many users are asked whether a datastore that I do not have is theirs.
const ELSEWHERE: usize = 64;

/// A catalog over a [`Store`] (or, in tests, over anything that keeps records).
pub struct StoreCatalog<R = Store> {
    records: R,
    /// Set once this process knows that the store refuses to overwrite.
    exclusive: std::sync::atomic::AtomicBool,
}

/// An alias as it is stored, knowing its place.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct StoredAlias {
    format: u32,
    name: QualifiedName,
    alias: AliasName,
    version: VersionNumber,
}

impl StoredAlias {
    const FORMAT: u32 = 1;
}

fn origin(doing: &'static str) -> impl Fn(OriginError) -> CatalogError {
    move |source| CatalogError::Origin { doing, source }
}

impl<R: RecordStore> StoreCatalog<R> {
    pub fn new(records: R) -> Self {
        Self {
            records,
            exclusive: false.into(),
        }
    }

    /// The bytes under a key; `None` if there is nothing.
    async fn read(&self, key: &str) -> Result<Option<Bytes>, CatalogError> {
        match self.records.get(key, RECORD_LIMIT).await {
            Ok(bytes) => Ok(Some(bytes)),
            Err(OriginError::NotFound { .. }) => Ok(None),
            Err(OriginError::TooLarge { .. }) => Err(self.damaged(key)(Damage::Size { limit: RECORD_LIMIT })),
            Err(error) => Err(origin("reading the catalog")(error)),
        }
    }

    fn damaged(&self, key: &str) -> impl FnOnce(Damage) -> CatalogError {
        let (store, key) = (self.records.location(), key.to_owned());
        move |damage| CatalogError::Damaged { store, key, damage }
    }

    /// The record of a version, checked; `None` if there is none.
    async fn find(&self, reference: &PinnedReference) -> Result<Option<Record>, CatalogError> {
        let key = layout::record(reference);
        let Some(bytes) = self.read(&key).await? else {
            return Ok(None);
        };
        decode_record(reference, &bytes)
            .map(Some)
            .map_err(self.damaged(&key))
    }

    async fn find_alias(
        &self,
        name: &QualifiedName,
        alias: &AliasName,
    ) -> Result<Option<VersionNumber>, CatalogError> {
        let key = layout::alias(name, alias);
        let Some(bytes) = self.read(&key).await? else {
            return Ok(None);
        };
        decode_alias(name, alias, &bytes)
            .map(Some)
            .map_err(self.damaged(&key))
    }

    /// The names one level below `prefix`; what is there and is no name is none of ours.
    async fn children<T: std::str::FromStr + Ord>(&self, prefix: &str) -> Result<Vec<T>, CatalogError> {
        let level = self.level(prefix).await?;
        let mut names: Vec<T> = level
            .prefixes
            .iter()
            .filter_map(|child| layout::below(prefix, child)?.parse().ok())
            .collect();
        names.sort_unstable();
        Ok(names)
    }

    async fn level(&self, prefix: &str) -> Result<crate::origin::Level, CatalogError> {
        match self.records.list_level(prefix).await {
            // Nothing below a prefix is an empty level, whichever way the store puts it.
            Err(OriginError::NotFound { .. }) => Ok(crate::origin::Level::default()),
            level => level.map_err(origin("listing the catalog")),
        }
    }

    async fn owners(&self) -> Result<Vec<UserName>, CatalogError> {
        self.children(layout::RECORDS).await
    }

    async fn datastores(&self, owner: &UserName) -> Result<Vec<DatastoreName>, CatalogError> {
        self.children(&layout::records_of_user(owner)).await
    }

    /// Ascending; empty if there are none, whatever the reason.
    async fn numbers(&self, name: &QualifiedName) -> Result<Vec<VersionNumber>, CatalogError> {
        let prefix = layout::records_of(name);
        let level = self.level(&prefix).await?;
        let mut versions: Vec<VersionNumber> = level
            .objects
            .iter()
            .filter_map(|object| layout::version(layout::below(&prefix, &object.key)?))
            .collect();
        versions.sort_unstable();
        versions.dedup();
        Ok(versions)
    }

    /// Why a datastore has no versions.
    async fn why_empty(&self, name: &QualifiedName) -> Result<CatalogError, CatalogError> {
        let datastores = self.datastores(&name.owner).await?;
        if datastores.contains(&name.datastore) {
            return Ok(CatalogError::NoVersion { name: name.clone() });
        }
        if datastores.is_empty() {
            let owners = self.owners().await?;
            let near = did_you_mean(name.owner.as_str(), owners.iter().map(UserName::as_str));
            return Ok(CatalogError::NoSuchUser {
                user: name.owner.clone(),
                did_you_mean: owners.iter().find(|owner| Some(owner.as_str()) == near).cloned(),
            });
        }
        let near = did_you_mean(
            name.datastore.as_str(),
            datastores.iter().map(DatastoreName::as_str),
        );
        let near = datastores
            .iter()
            .find(|datastore| Some(datastore.as_str()) == near);
        Ok(CatalogError::NoSuchDatastore {
            name: name.clone(),
            did_you_mean: near.map(|datastore| QualifiedName::new(name.owner.clone(), datastore.clone())),
        })
    }

    /// `imagenet` was typed and I have none: somebody else who has is the best guess.
    async fn owned_by_another(&self, name: &QualifiedName) -> Result<Option<QualifiedName>, CatalogError> {
        let owners = self
            .owners()
            .await?
            .into_iter()
            .filter(|owner| *owner != name.owner)
            .take(ELSEWHERE);
        let mut found = stream::iter(owners.map(async |owner| {
            let has = self.datastores(&owner).await?.contains(&name.datastore);
            Ok::<_, CatalogError>(has.then(|| QualifiedName::new(owner, name.datastore.clone())))
        }))
        .buffered(LISTINGS);
        while let Some(candidate) = found.try_next().await? {
            if candidate.is_some() {
                return Ok(candidate);
            }
        }
        Ok(None)
    }

    async fn no_such_version(&self, reference: &PinnedReference) -> Result<CatalogError, CatalogError> {
        Ok(CatalogError::NoSuchVersion {
            reference: reference.clone(),
            existing: Existing(self.versions(&reference.name).await?),
        })
    }

    async fn no_such_alias(
        &self,
        name: &QualifiedName,
        alias: &AliasName,
    ) -> Result<CatalogError, CatalogError> {
        let versions = self.versions(name).await?;
        let aliases = self.alias_names(name).await?;
        let number = alias
            .as_str()
            .strip_prefix(['v', 'V'])
            .and_then(|digits| digits.parse().ok());
        let did_you_mean = match number {
            Some(number) if versions.contains(&number) => Some(number.to_string()),
            _ => did_you_mean(alias.as_str(), aliases.iter().map(AliasName::as_str)).map(str::to_owned),
        };
        Ok(CatalogError::NoSuchAlias {
            name: name.clone(),
            alias: alias.clone(),
            did_you_mean,
        })
    }

    async fn alias_names(&self, name: &QualifiedName) -> Result<Vec<AliasName>, CatalogError> {
        let prefix = layout::aliases_of(name);
        let level = self.level(&prefix).await?;
        let mut aliases: Vec<AliasName> = level
            .objects
            .iter()
            .filter_map(|object| {
                layout::below(&prefix, &object.key)?
                    .strip_suffix(".json")?
                    .parse()
                    .ok()
            })
            .collect();
        aliases.sort_unstable();
        Ok(aliases)
    }

    async fn resolve_as(&self, reference: &Reference, name: QualifiedName) -> Result<Record, CatalogError> {
        let version = match &reference.version {
            VersionSelector::Number(version) => *version,
            VersionSelector::Latest => {
                let versions = self.versions(&name).await?;
                *versions
                    .last()
                    .ok_or_else(|| CatalogError::NoVersion { name: name.clone() })?
            }
            VersionSelector::Alias(alias) => match self.find_alias(&name, alias).await? {
                Some(version) => version,
                None => return Err(self.no_such_alias(&name, alias).await?),
            },
        };
        self.record(&PinnedReference { name, version }).await
    }
}

#[async_trait]
impl<R: RecordStore> Catalog for StoreCatalog<R> {
    async fn list(&self, owner: Option<&UserName>) -> Result<Vec<DatastoreSummary>, CatalogError> {
        let owners = match owner {
            Some(owner) => vec![owner.clone()],
            None => self.owners().await?,
        };
        let names: Vec<Vec<QualifiedName>> = stream::iter(owners.into_iter().map(async |owner| {
            let datastores = self.datastores(&owner).await?;
            Ok::<_, CatalogError>(
                datastores
                    .into_iter()
                    .map(|datastore| QualifiedName::new(owner.clone(), datastore))
                    .collect(),
            )
        }))
        .buffered(LISTINGS)
        .try_collect()
        .await?;
        let summaries: Vec<Option<DatastoreSummary>> =
            stream::iter(names.into_iter().flatten().map(async |name| {
                let latest = self.available(&name).await?.last().copied();
                // Without a version it is not there yet.
                Ok::<_, CatalogError>(latest.map(|latest| DatastoreSummary { name, latest }))
            }))
            .buffered(LISTINGS)
            .try_collect()
            .await?;
        let summaries: Vec<_> = summaries.into_iter().flatten().collect();
        match owner {
            Some(owner) if summaries.is_empty() => {
                let owners = self.owners().await?;
                let near = did_you_mean(owner.as_str(), owners.iter().map(UserName::as_str));
                Err(CatalogError::NoSuchUser {
                    user: owner.clone(),
                    did_you_mean: owners.iter().find(|owner| Some(owner.as_str()) == near).cloned(),
                })
            }
            _ => Ok(summaries),
        }
    }

    async fn versions(&self, name: &QualifiedName) -> Result<Vec<VersionNumber>, CatalogError> {
        let versions = self.available(name).await?;
        if versions.is_empty() {
            Err(self.why_empty(name).await?)
        } else {
            Ok(versions)
        }
    }

    async fn record(&self, reference: &PinnedReference) -> Result<Record, CatalogError> {
        let found = async { self.find(reference).await };
        match futures::try_join!(found, self.refuse_retired(reference))? {
            (Some(record), ()) => Ok(record),
            (None, ()) => Err(self.no_such_version(reference).await?),
        }
    }

    async fn aliases(&self, name: &QualifiedName) -> Result<Vec<Alias>, CatalogError> {
        self.versions(name).await?;
        let aliases: Vec<Option<Alias>> =
            stream::iter(self.alias_names(name).await?.into_iter().map(async |alias| {
                // Removed since it was listed: not an alias any more.
                let version = self.find_alias(name, &alias).await?;
                Ok::<_, CatalogError>(version.map(|version| Alias { alias, version }))
            }))
            .buffered(LISTINGS)
            .try_collect()
            .await?;
        Ok(aliases.into_iter().flatten().collect())
    }

    async fn set_alias(&self, name: &QualifiedName, alias: &Alias) -> Result<(), CatalogError> {
        let versions = self.versions(name).await?;
        if !versions.contains(&alias.version) {
            return Err(CatalogError::NoSuchVersion {
                reference: name.at(alias.version),
                existing: Existing(versions),
            });
        }
        let key = layout::alias(name, &alias.alias);
        let bytes = encode_alias(name, alias).map_err(|source| {
            self.damaged(&key)(Damage::Fields {
                known: StoredAlias::FORMAT,
                source,
            })
        })?;
        self.records
            .put(&key, bytes.into())
            .await
            .map_err(origin("writing the alias"))
    }

    async fn remove_alias(&self, name: &QualifiedName, alias: &AliasName) -> Result<(), CatalogError> {
        let key = layout::alias(name, alias);
        // Its bytes do not matter: a damaged alias can be removed too.
        if self.read(&key).await?.is_none() {
            return Err(self.no_such_alias(name, alias).await?);
        }
        self.records
            .delete(&key)
            .await
            .map_err(origin("removing the alias"))
    }

    async fn publish(&self, draft: Draft) -> Result<Record, CatalogError> {
        self.publish_draft(draft).await
    }

    async fn resolve(&self, reference: &Reference, me: &UserName) -> Result<Record, CatalogError> {
        let name = reference.qualify(me);
        let error = match self.resolve_as(reference, name.clone()).await {
            Err(error) if reference.owner.is_none() => error,
            answer => return answer,
        };
        match error {
            CatalogError::NoSuchUser { .. }
            | CatalogError::NoSuchDatastore {
                did_you_mean: None, ..
            } => {
                let did_you_mean = self.owned_by_another(&name).await?;
                Err(CatalogError::NoSuchDatastore { name, did_you_mean })
            }
            error => Err(error),
        }
    }

    async fn retire(
        &self,
        reference: &PinnedReference,
        by: &UserName,
        although_used: bool,
    ) -> Result<(), CatalogError> {
        self.retire_version(reference, by, although_used).await
    }

    async fn leases(&self, name: &QualifiedName) -> Result<Vec<Lease>, CatalogError> {
        self.leases_of(name, None).await
    }

    fn store(&self) -> &Store {
        self.records.store()
    }
}

fn encode_record(record: &Record) -> Result<Vec<u8>, serde_json::Error> {
    sealed::seal("record", record)
}

/// The record in `bytes`, if it is whole, of this format, and the one that belongs under `reference`.
fn decode_record(reference: &PinnedReference, bytes: &[u8]) -> Result<Record, Damage> {
    let record: Record = sealed::unseal("record", Record::FORMAT, bytes)?;
    sealed::at_home(reference, &record.reference())?;
    let parts = [
        Some(&record.tree.rows),
        record.tree.digests.as_ref(),
        record.tree.sums.as_ref(),
    ];
    if let Some(part) = parts
        .into_iter()
        .flatten()
        .find(|part| !layout::is_inside(&part.key))
    {
        return Err(Damage::Outside {
            key: part.key.clone(),
        });
    }
    Ok(record)
}

fn encode_alias(name: &QualifiedName, alias: &Alias) -> Result<Vec<u8>, serde_json::Error> {
    let stored = StoredAlias {
        format: StoredAlias::FORMAT,
        name: name.clone(),
        alias: alias.alias.clone(),
        version: alias.version,
    };
    sealed::seal("alias", &stored)
}

fn decode_alias(name: &QualifiedName, alias: &AliasName, bytes: &[u8]) -> Result<VersionNumber, Damage> {
    let stored: StoredAlias = sealed::unseal("alias", StoredAlias::FORMAT, bytes)?;
    sealed::at_home(name, &stored.name)?;
    sealed::at_home(alias, &stored.alias)?;
    Ok(stored.version)
}

#[cfg(test)]
mod tests;
