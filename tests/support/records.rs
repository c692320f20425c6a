//! A catalog whose records are in memory and whose store is real: what publishing needs of one.

#![allow(dead_code)]

use std::sync::Mutex;

use async_trait::async_trait;
use grid_mount::{
    catalog::{Alias, Catalog, CatalogError, DatastoreSummary, Draft, Lease, Record},
    origin::{Deadlines, Store, StoreSettings, StoreUrl},
    reference::{AliasName, PinnedReference, QualifiedName, Reference, UserName, VersionNumber},
};

pub struct Records {
    store: Store,
    records: Mutex<Vec<Record>>,
}

impl Records {
    pub fn open(url: &str, settings: &StoreSettings) -> Self {
        let url: StoreUrl = url.parse().expect("a store URL");
        let store = Store::open(&url, settings, &Deadlines::control()).expect("an open store");
        Self {
            store,
            records: Mutex::default(),
        }
    }

    pub fn published(&self) -> usize {
        self.records.lock().unwrap().len()
    }
}

pub fn name(text: &str) -> QualifiedName {
    serde_json::from_value(text.into()).unwrap()
}

fn not_here<T>() -> Result<T, CatalogError> {
    unreachable!("publishing does not ask for this")
}

#[async_trait]
impl Catalog for Records {
    async fn list(&self, _: Option<&UserName>) -> Result<Vec<DatastoreSummary>, CatalogError> {
        not_here()
    }

    async fn versions(&self, _: &QualifiedName) -> Result<Vec<VersionNumber>, CatalogError> {
        Ok(self
            .records
            .lock()
            .unwrap()
            .iter()
            .map(|record| record.version)
            .collect())
    }

    async fn record(&self, reference: &PinnedReference) -> Result<Record, CatalogError> {
        let records = self.records.lock().unwrap();
        Ok(records
            .iter()
            .find(|record| record.version == reference.version)
            .unwrap()
            .clone())
    }

    async fn aliases(&self, _: &QualifiedName) -> Result<Vec<Alias>, CatalogError> {
        not_here()
    }

    async fn set_alias(&self, _: &QualifiedName, _: &Alias) -> Result<(), CatalogError> {
        not_here()
    }

    async fn remove_alias(&self, _: &QualifiedName, _: &AliasName) -> Result<(), CatalogError> {
        not_here()
    }

    async fn publish(&self, draft: Draft) -> Result<Record, CatalogError> {
        let mut records = self.records.lock().unwrap();
        let version = serde_json::from_value((records.len() + 1).into()).unwrap();
        let record = Record {
            format: 1,
            owner: draft.name.owner,
            datastore: draft.name.datastore,
            version,
            tree: draft.tree,
            origin: draft.origin,
            created: jiff::Timestamp::UNIX_EPOCH,
            message: draft.message,
            totals: draft.totals,
            nonce: String::new(),
        };
        records.push(record.clone());
        Ok(record)
    }

    async fn resolve(&self, _: &Reference, _: &UserName) -> Result<Record, CatalogError> {
        not_here()
    }

    async fn retire(&self, _: &PinnedReference, _: &UserName, _: bool) -> Result<(), CatalogError> {
        not_here()
    }

    async fn leases(&self, _: &QualifiedName) -> Result<Vec<Lease>, CatalogError> {
        not_here()
    }

    fn store(&self) -> &Store {
        &self.store
    }
}
