//! Where bytes come from: an object store location plus credentials.
//!
//! Owns every use of `object_store`: URLs, credentials and their renewal, ranged GETs pinned to an
//! ETag or version id, conditional puts, multipart uploads, listings, deadlines, typed errors.
//! Must not know blocks, caches or catalogs.

mod credentials;
mod error;
mod http;
mod list;
mod local;
mod read;
mod remote;
mod settings;
mod url;
mod write;

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;

pub use crate::pin::Pin;

pub use self::{
    credentials::{Borrowed, Credentials, Keys, Lender, Lent, LoanState, Secret},
    error::OriginError,
    http::Counters,
    settings::StoreSettings,
    url::{StoreKind, StoreUrl},
};
use self::{
    http::{Seen, Tally},
    local::LocalStore,
    remote::{Place, Remote, observed},
};

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

impl Deadlines {
    /// For ranged GETs of data: no retries here, since `fetch` does that with a view of everybody's requests.
    pub fn data() -> Self {
        Self {
            connect: Duration::from_secs(5),
            first_byte: Duration::from_secs(10),
            read: Duration::from_secs(10),
            retries: 0,
            retry_for: Duration::ZERO,
        }
    }

    /// For records, trees, listings and uploads: a few retries, about 30 seconds in all.
    pub fn control() -> Self {
        Self {
            connect: Duration::from_secs(5),
            first_byte: Duration::from_secs(15),
            read: Duration::from_secs(15),
            retries: 4,
            retry_for: Duration::from_secs(12),
        }
    }
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
    inner: Arc<Inner>,
}

struct Inner {
    url: StoreUrl,
    shown: String,
    canonical: String,
    /// Empty, or with a trailing slash.
    prefix: String,
    deadlines: Deadlines,
    tally: Arc<Tally>,
    backend: Backend,
    /// Who has other keys when those in use are refused.
    credentials: Option<Arc<dyn Credentials>>,
    /// When new keys were last refused as the old ones had been.
    in_vain: Mutex<Option<Instant>>,
}

#[derive(Clone)]
enum Backend {
    Local(LocalStore),
    Remote(Remote),
}

/// One level of a delimited listing.
#[derive(Debug, Default)]
pub struct Level {
    /// Keys with their trailing slash.
    pub prefixes: Vec<String>,
    pub objects: Vec<ObjectInfo>,
}

/// For so long after new keys were refused too, a plain "denied" is believed: it is not about the keys.
const DENIED_IS_DENIED: Duration = Duration::from_secs(30);

impl Store {
    /// Makes a client; nothing is asked of the store, and nothing created in it, until it is used.
    pub fn open(
        url: &StoreUrl,
        settings: &StoreSettings,
        deadlines: &Deadlines,
    ) -> Result<Self, OriginError> {
        Self::open_with(url, settings, deadlines, None)
    }

    /// As [`Store::open`], with keys that somebody lends in place of those in `settings`. Only S3 takes them.
    pub fn open_with(
        url: &StoreUrl,
        settings: &StoreSettings,
        deadlines: &Deadlines,
        credentials: Option<Arc<dyn Credentials>>,
    ) -> Result<Self, OriginError> {
        // One TLS implementation for the process. An error means that somebody installed one before: fine.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let tally = Arc::new(Tally::default());
        let prefix = url.prefix();
        let (backend, place, prefix) = match url.kind() {
            StoreKind::File(root) => (
                Backend::Local(LocalStore::new(root)),
                url.to_string(),
                String::new(),
            ),
            _ => {
                let (remote, place) = remote::build(url, settings, deadlines, &tally, credentials.clone())?;
                (
                    Backend::Remote(remote),
                    place,
                    if prefix.is_empty() { prefix } else { prefix + "/" },
                )
            }
        };
        Ok(Self {
            inner: Arc::new(Inner {
                shown: url.to_string(),
                canonical: format!("{}/{prefix}", place.trim_end_matches('/')),
                url: url.clone(),
                prefix,
                deadlines: deadlines.clone(),
                tally,
                backend,
                credentials,
                in_vain: Mutex::default(),
            }),
        })
    }

    pub fn url(&self) -> &StoreUrl {
        &self.inner.url
    }

    /// Endpoint + bucket + prefix in canonical form: part of a cached object's identity.
    pub fn canonical(&self) -> &str {
        &self.inner.canonical
    }

    /// Requests and bytes so far, of all clones of this store.
    pub fn counters(&self) -> Counters {
        self.inner.tally.read()
    }

    fn place<'a>(&'a self, key: &'a str) -> Place<'a> {
        Place {
            store: &self.inner.shown,
            key,
            deadlines: &self.inner.deadlines,
        }
    }

    fn path(&self, key: &str) -> Result<object_store::path::Path, OriginError> {
        self.checked(key)?;
        remote::path(&format!("{}{key}", self.inner.prefix)).map_err(|reason| OriginError::BadKey {
            store: self.inner.shown.clone(),
            key: key.to_owned(),
            reason,
        })
    }

    /// Keys that would not come back as they are, or lead elsewhere, are refused everywhere.
    fn checked(&self, key: &str) -> Result<(), OriginError> {
        let local = matches!(self.inner.backend, Backend::Local(_));
        let reason = if key.is_empty() {
            "it is empty"
        } else if key.starts_with('/') {
            "it starts with a slash"
        } else if key.split('/').any(|part| matches!(part, "." | "..")) {
            "it has a part `.` or `..`"
        } else if key.chars().any(|c| c.is_ascii_control()) {
            "it holds a control character"
        } else if local && key.split('/').any(str::is_empty) {
            "a file's path has no empty part"
        } else {
            return Ok(());
        };
        Err(OriginError::BadKey {
            store: self.inner.shown.clone(),
            key: key.to_owned(),
            reason: reason.to_owned(),
        })
    }

    /// Runs one operation of a client; once more with other keys, if the store refuses those in use and
    /// there is somebody to ask. All who are refused at once share one renewal.
    async fn attempt<T, F>(
        &self,
        listing: bool,
        operation: impl Fn() -> F + Send,
    ) -> Result<T, (object_store::Error, Seen)>
    where
        F: Future<Output = object_store::Result<T>> + Send,
    {
        let (error, seen) = match observed(listing, operation()).await {
            Ok(done) => return Ok(done),
            Err(failed) => failed,
        };
        let (Some(credentials), Some(key)) = (&self.inner.credentials, &seen.signed_with) else {
            return Err((error, seen));
        };
        let about_keys = seen.keys_are_refused();
        let in_vain = self
            .inner
            .in_vain
            .lock()
            .is_some_and(|at| at.elapsed() < DENIED_IS_DENIED);
        if !about_keys && (!matches!(seen.status, 401 | 403) || in_vain) {
            return Err((error, seen));
        }
        tracing::info!(
            store = self.inner.shown,
            status = seen.status,
            code = seen.code,
            "keys are refused; asking for others"
        );
        if let Err(error) = credentials.renew(key).await {
            return Err((remote::carried(error), seen));
        }
        let again = observed(listing, operation()).await;
        if let Err((_, seen)) = &again
            && matches!(seen.status, 401 | 403)
        {
            *self.inner.in_vain.lock() = Some(Instant::now());
        }
        again
    }

    async fn local<T: Send + 'static>(
        &self,
        key: &str,
        work: impl FnOnce(&LocalStore) -> io::Result<T> + Send + 'static,
    ) -> Option<Result<T, OriginError>> {
        let Backend::Local(store) = &self.inner.backend else {
            return None;
        };
        let store = store.clone();
        let done = tokio::task::spawn_blocking(move || {
            let result = work(&store);
            let rootless = result.is_err() && !store.root_exists();
            (result, rootless)
        })
        .await;
        Some(match done {
            Ok((Ok(value), _)) => Ok(value),
            Ok((Err(error), rootless)) => Err(self.local_error(key, error, rootless)),
            Err(error) => Err(OriginError::Other {
                store: self.inner.shown.clone(),
                key: key.to_owned(),
                source: Some(error.into()),
            }),
        })
    }

    fn local_error(&self, key: &str, error: io::Error, rootless: bool) -> OriginError {
        let (store, key) = (self.inner.shown.clone(), key.to_owned());
        match error.kind() {
            _ if rootless && error.kind() == io::ErrorKind::NotFound => OriginError::NoBucket {
                store,
                source: Some(error.into()),
            },
            io::ErrorKind::NotFound | io::ErrorKind::NotADirectory => OriginError::NotFound { store, key },
            io::ErrorKind::PermissionDenied => OriginError::Denied {
                store,
                key,
                source: Some(error.into()),
            },
            io::ErrorKind::ReadOnlyFilesystem | io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
                OriginError::ReadOnly {
                    store,
                    key,
                    reason: error.to_string(),
                    source: Some(error.into()),
                }
            }
            // A symlink that leads out of the root.
            io::ErrorKind::CrossesDevices => OriginError::Denied {
                store,
                key,
                source: Some(error.into()),
            },
            _ => OriginError::Other {
                store,
                key,
                source: Some(error.into()),
            },
        }
    }

    fn elsewhere(&self, key: &str) -> OriginError {
        OriginError::Other {
            store: self.inner.shown.clone(),
            key: key.to_owned(),
            source: None,
        }
    }

    fn remote_info(&self, key: String, meta: &object_store::ObjectMeta) -> ObjectInfo {
        ObjectInfo {
            key,
            size: meta.size,
            etag: meta.e_tag.clone(),
            version_id: meta.version.clone(),
            modified: (
                meta.last_modified.timestamp(),
                meta.last_modified.timestamp_subsec_nanos(),
            ),
        }
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Store").field(&self.inner.shown).finish()
    }
}

#[cfg(test)]
mod tests;
