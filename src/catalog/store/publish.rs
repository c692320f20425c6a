//! Giving a draft the next version number, once and to one publisher only.

use std::{sync::atomic::Ordering, time::Duration};

use bytes::Bytes;
use jiff::Timestamp;

use super::{MESSAGE_LIMIT, RecordStore, StoreCatalog, encode_record, layout, origin};
use crate::{
    catalog::{CatalogError, Damage, Draft, Record},
    origin::{OriginError, PutOutcome},
    reference::{QualifiedName, VersionNumber},
};

/// Numbers lost to other publishers before giving up. Each lost number was won by somebody, and losers
/// look where the highest is before they try again.
const NUMBERS: usize = 100;
/// Tries to find out what became of one number.
const SETTLES: usize = 6;

/// A repeated request is recognised among this many versions back.
const REMEMBERED: usize = 8;

enum Claim {
    /// What is stored: an earlier try may have left it.
    Mine(Box<Record>),
    Taken,
}

impl<R: RecordStore> StoreCatalog<R> {
    pub(super) async fn publish_draft(&self, draft: Draft) -> Result<Record, CatalogError> {
        self.publish_as(draft, nonce(), false).await
    }

    /// As [`publish`](crate::catalog::Catalog::publish), but however often it is repeated with the same
    /// `nonce`, through however many processes, there is one version.
    pub async fn publish_once(&self, draft: Draft, nonce: String) -> Result<Record, CatalogError> {
        self.publish_as(draft, nonce, true).await
    }

    async fn publish_as(&self, draft: Draft, nonce: String, repeated: bool) -> Result<Record, CatalogError> {
        if draft.message.len() > MESSAGE_LIMIT {
            return Err(CatalogError::MessageTooLong {
                bytes: draft.message.len(),
                limit: MESSAGE_LIMIT,
            });
        }
        self.require_exclusive_puts().await?;
        let mut record = Record {
            format: Record::FORMAT,
            owner: draft.name.owner.clone(),
            datastore: draft.name.datastore.clone(),
            version: VersionNumber::FIRST,
            tree: draft.tree,
            origin: draft.origin,
            created: Timestamp::now(),
            message: draft.message,
            totals: draft.totals,
            nonce,
        };
        let mut lost: Option<VersionNumber> = None;
        for round in 0..NUMBERS {
            let listed = self.numbers(&draft.name).await?;
            if repeated && let Some(earlier) = self.with_nonce(&record, &listed).await? {
                return Ok(earlier);
            }
            // What is not listed and has the next number is compared when the number is claimed.
            record.version = next_version(&draft.name, listed.last().copied().max(lost))?;
            match self.claim(&record).await? {
                Claim::Mine(stored) => return same(&record, *stored),
                Claim::Taken => lost = Some(record.version),
            }
            pause(round).await;
        }
        Err(CatalogError::Contended {
            name: draft.name,
            tries: NUMBERS,
        })
    }

    /// The record that an earlier try left, among the last few.
    async fn with_nonce(
        &self,
        record: &Record,
        listed: &[VersionNumber],
    ) -> Result<Option<Record>, CatalogError> {
        for version in listed.iter().rev().take(REMEMBERED) {
            let found = self.find(&record.name().at(*version)).await?;
            if let Some(found) = found.filter(|found| found.nonce == record.nonce) {
                return same(record, found).map(Some);
            }
        }
        Ok(None)
    }

    /// Creates the record under its number. Does not return before it is known whose the number is: an
    /// answer that was lost must not make this publisher take a second number.
    async fn claim(&self, record: &Record) -> Result<Claim, CatalogError> {
        let reference = record.reference();
        let key = layout::record(&reference);
        let bytes: Bytes = encode_record(record)
            .map_err(|source| {
                self.damaged(&key)(Damage::Fields {
                    known: Record::FORMAT,
                    source,
                })
            })?
            .into();
        let mut last = None;
        for round in 0..SETTLES {
            let failed = match self.records.put_if_absent(&key, bytes.clone()).await {
                Ok(PutOutcome::Created) => return Ok(Claim::Mine(Box::new(record.clone()))),
                Ok(PutOutcome::AlreadyExists) => None,
                Err(error) => Some(error),
            };
            match (self.find(&reference).await, failed) {
                (Ok(Some(found)), _) if found.nonce == record.nonce => {
                    return Ok(Claim::Mine(Box::new(found)));
                }
                (Ok(Some(_)), _) => return Ok(Claim::Taken),
                // A definite refusal (denied, no bucket, read-only): nothing was written, now or earlier.
                (_, Some(error)) if !error.is_retryable() && round == 0 => {
                    return Err(origin("writing the record")(error));
                }
                // The answer is unknown, or the record is not there yet: the same bytes under the same key.
                (Ok(None), error) => last = error.or(last),
                (Err(CatalogError::Origin { source, .. }), error) => last = error.or(Some(source)),
                (Err(damaged), _) => return Err(damaged),
            }
            pause(round).await;
        }
        Err(CatalogError::Unsettled {
            reference,
            source: last.map(Box::new),
        })
    }

    /// Probes once per store whether put-if-absent means what it says; refuses to publish without it.
    async fn require_exclusive_puts(&self) -> Result<(), CatalogError> {
        if self.exclusive.load(Ordering::Relaxed) {
            return Ok(());
        }
        let here = Bytes::from(self.records.location() + "\n");
        // Only a marker that names this very store counts; one that is damaged is written anew.
        if self.read(layout::PROBED).await.ok().flatten().as_ref() != Some(&here) {
            self.probe().await?;
            self.records
                .put(layout::PROBED, here)
                .await
                .map_err(origin("noting that the store was probed"))?;
        }
        self.exclusive.store(true, Ordering::Relaxed);
        Ok(())
    }

    async fn probe(&self) -> Result<(), CatalogError> {
        let probing = origin("probing the store for conditional puts");
        let key = layout::probe(&nonce());
        let (first, second) = (Bytes::from_static(b"first\n"), Bytes::from_static(b"second\n"));
        // The key is random: `AlreadyExists` is a lost answer to this very put.
        self.records
            .put_if_absent(&key, first.clone())
            .await
            .map_err(&probing)?;
        let outcome = self.records.put_if_absent(&key, second).await;
        let kept = self.read(&key).await;
        // What remains of a probe is harmless; only its answer matters.
        if let Err(error) = self.records.delete(&key).await {
            tracing::debug!(%key, %error, "a probe was left behind");
        }
        match (outcome, kept?) {
            (Ok(PutOutcome::AlreadyExists), Some(kept)) if kept == first => Ok(()),
            (Err(error), Some(kept)) if kept == first => Err(probing(error)),
            (Err(error @ OriginError::Denied { .. }), _) => Err(probing(error)),
            _ => Err(CatalogError::StoreOverwrites {
                store: self.records.location(),
            }),
        }
    }
}

/// The stored record, if it is what was to be stored.
fn same(record: &Record, stored: Record) -> Result<Record, CatalogError> {
    let same = stored.tree == record.tree
        && stored.origin == record.origin
        && stored.message == record.message
        && stored.totals == record.totals;
    if same {
        Ok(stored)
    } else {
        Err(CatalogError::KeyReused { name: record.name() })
    }
}

/// The number after the highest: of those listed, and of those known to be taken.
fn next_version(name: &QualifiedName, highest: Option<VersionNumber>) -> Result<VersionNumber, CatalogError> {
    match highest {
        None => Ok(VersionNumber::FIRST),
        Some(highest) => highest
            .next()
            .ok_or_else(|| CatalogError::VersionsExhausted { name: name.clone() }),
    }
}

/// 128 random bits.
fn nonce() -> String {
    format!("{:032x}", rand::random::<u128>())
}

/// Longer from round to round, and different for everybody, so that those who collided spread out.
async fn pause(round: usize) {
    let longest = 10u64 << round.min(6);
    tokio::time::sleep(Duration::from_millis(rand::random_range(0..=longest))).await;
}
