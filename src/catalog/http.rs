//! A catalog behind a control plane: the client of the protocol in `docs/openapi.yaml`.
//!
//! Owns asking (deadlines, repeating, pages, who the caller is) and turning problems into errors. Keys that
//! are lent come with the record and are renewed through the control plane, which may be down for a while.

mod identity;
mod loans;
mod transport;

use std::{sync::Arc, time::Duration};

use async_trait::async_trait;
use reqwest::Method;

use self::{
    loans::{Access, NoKeys, Renewal},
    transport::{Answer, Ask, Transport},
};
use super::{
    Alias, Catalog, CatalogError, DatastoreSummary, Draft, Lease, OriginLocation, Reading, Record, Team,
    protocol::{
        Datastore, Datastores, Held, Kind, Leases, MOST_PER_PAGE, Me, NewAlias, NewLease, NewVersion,
        Problem, Purpose, Resolution, Teams, datastore_path, version_path,
    },
};
use crate::{
    origin::{Borrowed, Deadlines, Store, StoreSettings, StoreUrl},
    reference::{
        AliasName, PinnedReference, QualifiedName, Reference, UserName, VersionNumber, VersionSelector,
    },
};

/// What a mount that goes on waits for new keys, when it has old ones.
const RESUME_PATIENCE: Duration = Duration::from_secs(3);

pub struct HttpCatalog {
    transport: Arc<Transport>,
    me: Option<UserName>,
    store: Store,
    /// What came with the last record that was resolved: reading it needs no second question.
    resolved: parking_lot::Mutex<Option<Resolution>>,
}

impl HttpCatalog {
    /// Asks who the caller is, and where trees lie.
    pub async fn connect(url: &StoreUrl, settings: &StoreSettings) -> Result<Self, CatalogError> {
        let transport = Arc::new(Transport::new(url, settings)?);
        let me: Me = match transport.ask(Ask::get("/v1/me")).await? {
            Ok(me) => me,
            Err(problem) => return Err(refused(&transport, problem)),
        };
        Self::over(transport, settings, Some(me.user), &me.store)
    }

    /// As [`HttpCatalog::connect`], with keys to write to the store, if the control plane lends any.
    pub async fn connect_to_publish(url: &StoreUrl, settings: &StoreSettings) -> Result<Self, CatalogError> {
        let mut catalog = Self::connect(url, settings).await?;
        let Some(me) = catalog.me.clone() else {
            return Ok(catalog);
        };
        let renewal = Renewal::to_publish(&catalog.transport, me);
        let loan = renewal.ask().await?;
        let named = catalog.store.url().clone();
        catalog.store =
            Access::new(&named, settings, loan.as_ref(), renewal).open(&named, &Deadlines::control())?;
        Ok(catalog)
    }

    /// Asks nobody.
    pub fn known(url: &StoreUrl, settings: &StoreSettings, store: &StoreUrl) -> Result<Self, CatalogError> {
        Self::over(Arc::new(Transport::new(url, settings)?), settings, None, store)
    }

    fn over(
        transport: Arc<Transport>,
        settings: &StoreSettings,
        me: Option<UserName>,
        store: &StoreUrl,
    ) -> Result<Self, CatalogError> {
        // Whoever reads or publishes opens it with the keys for that.
        let store = Store::open_with(store, settings, &Deadlines::control(), Some(Arc::new(NoKeys)))
            .map_err(|source| CatalogError::Origin {
                doing: "opening the store that the control plane names",
                source,
            })?;
        Ok(Self {
            transport,
            me,
            store,
            resolved: parking_lot::Mutex::new(None),
        })
    }

    /// What a version's tree, or its objects, are read with.
    async fn access(
        &self,
        reference: &PinnedReference,
        purpose: Purpose,
        url: &StoreUrl,
        settings: &StoreSettings,
        resolution: Option<&Resolution>,
    ) -> Access {
        let lender = Renewal::to_read(&self.transport, reference.clone(), purpose);
        if let Some(resolution) = resolution {
            let loan = match purpose {
                Purpose::Tree => &resolution.tree_credentials,
                Purpose::Origin => &resolution.origin_credentials,
            };
            return Access::new(url, settings, loan.as_ref(), lender);
        }
        // A mount that goes on: its readers wait.
        match tokio::time::timeout(RESUME_PATIENCE, lender.ask()).await {
            Ok(Ok(loan)) => Access::new(url, settings, loan.as_ref(), lender),
            _ => Access::resuming(url, settings, &settings.lent(), lender),
        }
    }

    async fn ask<T: serde::de::DeserializeOwned>(&self, ask: Ask<'_>) -> Result<T, CatalogError> {
        self.transport
            .ask(ask)
            .await?
            .map_err(|problem| refused(&self.transport, problem))
    }

    /// Where the answer does not matter.
    async fn tell(&self, ask: Ask<'_>) -> Result<(), CatalogError> {
        match self.transport.send(&ask).await? {
            Answer::Ok(_) => Ok(()),
            Answer::Problem(problem) => Err(refused(&self.transport, problem)),
        }
    }

    async fn datastore(&self, name: &QualifiedName) -> Result<Datastore, CatalogError> {
        self.ask(Ask::get(&datastore_path(name))).await
    }

    async fn resolution(&self, name: &QualifiedName, version: &str) -> Result<Resolution, CatalogError> {
        let path = format!("{}/versions/{version}", datastore_path(name));
        let resolution: Resolution = self.ask(Ask::get(&path)).await?;
        if resolution.record.name() != *name {
            return Err(CatalogError::BadAnswer {
                catalog: self.transport.url().to_owned(),
                what: format!("asked for {name}, told of {}", resolution.record.name()),
            });
        }
        *self.resolved.lock() = Some(resolution.clone());
        Ok(resolution)
    }

    fn my_name(&self, me: &UserName) -> UserName {
        self.me.clone().unwrap_or_else(|| me.clone())
    }
}

#[async_trait]
impl Catalog for HttpCatalog {
    async fn list(&self, owner: Option<&UserName>) -> Result<Vec<DatastoreSummary>, CatalogError> {
        let mut all = Vec::new();
        let mut after = None::<String>;
        loop {
            let ask = Ask::get("/v1/datastores")
                .query("owner", owner)
                .query("after", after.as_ref())
                .query("limit", Some(MOST_PER_PAGE));
            let page: Datastores = self.ask(ask).await?;
            all.extend(page.items);
            match page.next {
                Some(next) if Some(&next) != after.as_ref() => after = Some(next),
                _ => break,
            }
        }
        match owner {
            Some(owner) if all.is_empty() => Err(CatalogError::NoSuchUser {
                user: owner.clone(),
                did_you_mean: None,
            }),
            _ => {
                all.sort_by(|one, other| one.name.cmp(&other.name));
                Ok(all)
            }
        }
    }

    async fn versions(&self, name: &QualifiedName) -> Result<Vec<VersionNumber>, CatalogError> {
        Ok(self.datastore(name).await?.versions)
    }

    async fn record(&self, reference: &PinnedReference) -> Result<Record, CatalogError> {
        let version = reference.version.to_string();
        Ok(self.resolution(&reference.name, &version).await?.record)
    }

    async fn aliases(&self, name: &QualifiedName) -> Result<Vec<Alias>, CatalogError> {
        Ok(self.datastore(name).await?.aliases)
    }

    async fn set_alias(&self, name: &QualifiedName, alias: &Alias) -> Result<(), CatalogError> {
        let path = format!("{}/aliases/{}", datastore_path(name), alias.alias);
        let body = NewAlias {
            version: alias.version,
        };
        self.tell(Ask::new(Method::PUT, &path).body(&body)).await
    }

    async fn remove_alias(&self, name: &QualifiedName, alias: &AliasName) -> Result<(), CatalogError> {
        let path = format!("{}/aliases/{alias}", datastore_path(name));
        self.tell(Ask::new(Method::DELETE, &path)).await
    }

    async fn publish(&self, draft: Draft) -> Result<Record, CatalogError> {
        let path = format!("{}/versions", datastore_path(&draft.name));
        let body = NewVersion {
            tree: draft.tree,
            origin: draft.origin,
            message: draft.message,
            totals: draft.totals,
        };
        // However often the request has to be repeated, there is one version.
        let key = format!("{:032x}", rand::random::<u128>());
        self.ask(Ask::new(Method::POST, &path).body(&body).once(key))
            .await
    }

    async fn resolve(&self, reference: &Reference, me: &UserName) -> Result<Record, CatalogError> {
        let name = reference.qualify(&self.my_name(me));
        let version = match &reference.version {
            VersionSelector::Latest => "latest".to_owned(),
            VersionSelector::Number(number) => number.to_string(),
            VersionSelector::Alias(alias) => alias.to_string(),
        };
        Ok(self.resolution(&name, &version).await?.record)
    }

    fn store(&self) -> &Store {
        &self.store
    }

    fn me(&self) -> Option<&UserName> {
        self.me.as_ref()
    }

    async fn reading(&self, record: &Record, settings: &StoreSettings) -> Result<Reading, CatalogError> {
        let reference = record.reference();
        let at_hand = self
            .resolved
            .lock()
            .take()
            .filter(|resolution| resolution.record == *record);
        if at_hand.is_some() && self.store.url().scheme() == "s3" {
            self.transport.refuse_skew().await?;
        }
        let store = self.store.url();
        let access = async |purpose, url| {
            self.access(&reference, purpose, url, settings, at_hand.as_ref())
                .await
        };
        let tree = access(Purpose::Tree, store).await;
        let trees = tree.open(store, &Deadlines::control())?;
        // In one store: the same keys, renewed once for both.
        let (objects, kept) = match &record.origin {
            OriginLocation::Catalog => (tree.open(store, &Deadlines::data())?, tree.clone()),
            OriginLocation::Url(url) => {
                let origin = access(Purpose::Origin, url).await;
                (origin.open(url, &Deadlines::data())?, origin)
            }
        };
        let mut loans: Vec<Arc<Borrowed>> = kept.borrowed.into_iter().collect();
        let other = tree
            .borrowed
            .filter(|loan| !loans.iter().any(|other| Arc::ptr_eq(loan, other)));
        loans.extend(other);
        Ok(Reading {
            trees,
            objects,
            loans,
            lent: kept.lent,
        })
    }

    async fn retire(
        &self,
        reference: &PinnedReference,
        _by: &UserName,
        although_used: bool,
    ) -> Result<(), CatalogError> {
        let path = version_path(reference);
        let ask = Ask::new(Method::DELETE, &path).query("in_use", although_used.then_some(true));
        self.tell(ask).await
    }

    async fn leases(&self, name: &QualifiedName) -> Result<Vec<Lease>, CatalogError> {
        let leases: Leases = self
            .ask(Ask::get(&format!("{}/leases", datastore_path(name))))
            .await?;
        Ok(leases.items)
    }

    async fn all_leases(&self) -> Result<Vec<Lease>, CatalogError> {
        let mut all = Vec::new();
        let mut after = None::<String>;
        loop {
            let ask = Ask::get("/v1/leases").query("after", after.as_ref());
            let page: Leases = self.ask(ask).await?;
            all.extend(page.items);
            match page.next {
                Some(next) if Some(&next) != after.as_ref() => after = Some(next),
                _ => return Ok(all),
            }
        }
    }

    async fn hold(&self, lease: &Lease) -> Result<Option<Duration>, CatalogError> {
        let path = lease_path(lease);
        let body = NewLease {
            host: lease.host.clone(),
            since: lease.since,
        };
        let held: Held = self.ask(Ask::new(Method::PUT, &path).body(&body)).await?;
        Ok(Some(Duration::from_secs(held.expires_in)))
    }

    async fn release(&self, lease: &Lease) -> Result<(), CatalogError> {
        self.tell(Ask::new(Method::DELETE, &lease_path(lease))).await
    }

    async fn teams(&self) -> Result<Option<Vec<Team>>, CatalogError> {
        let teams: Teams = self.ask(Ask::get("/v1/teams")).await?;
        Ok(Some(teams.teams))
    }
}

fn lease_path(lease: &Lease) -> String {
    format!("{}/leases/{}", version_path(&lease.reference), lease.id)
}

/// The control plane's problem as an error of this catalog.
fn refused(transport: &Transport, problem: Problem) -> CatalogError {
    let catalog = transport.url().to_owned();
    let detail = problem.detail.clone();
    let known = match problem.kind() {
        Some(Kind::NotInTeam) => problem.member("user").map(|user| CatalogError::NotInTeam {
            user,
            did_you_mean: problem.member("did_you_mean"),
        }),
        Some(Kind::NotYours) => problem
            .member("owner")
            .zip(problem.member("me"))
            .map(|(owner, me)| CatalogError::NotYours { owner, me }),
        Some(Kind::NoSuchUser) => problem.member("user").map(|user| CatalogError::NoSuchUser {
            user,
            did_you_mean: None,
        }),
        Some(Kind::NoSuchDatastore) => problem.member("name").map(|name| CatalogError::NoSuchDatastore {
            name,
            did_you_mean: problem.member("did_you_mean"),
        }),
        Some(Kind::NoSuchVersion) => {
            problem
                .member("reference")
                .map(|reference| CatalogError::NoSuchVersion {
                    reference,
                    existing: problem.existing(),
                })
        }
        Some(Kind::NoSuchAlias) => {
            problem
                .member("name")
                .zip(problem.member("alias"))
                .map(|(name, alias)| CatalogError::NoSuchAlias {
                    name,
                    alias,
                    did_you_mean: problem.member("did_you_mean"),
                })
        }
        Some(Kind::NotReady) => problem
            .member("name")
            .map(|name| CatalogError::NoVersion { name }),
        Some(Kind::Retired) => problem
            .member("reference")
            .map(|reference| CatalogError::Retired {
                reference,
                by: problem.member("by"),
                at: problem.member("at"),
            }),
        Some(Kind::InUse) => problem.member("reference").map(|reference| CatalogError::InUse {
            reference,
            holders: problem.member("holders").unwrap_or_default(),
        }),
        _ => None,
    };
    known.unwrap_or(CatalogError::Refused { catalog, detail })
}
