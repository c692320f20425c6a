//! Where bytes come from: an object store location plus credentials.
//!
//! Owns every use of `object_store`: URLs, credentials and their renewal, ranged GETs pinned to an
//! ETag or version id, conditional puts, multipart uploads, listings, deadlines, typed errors.
//! Must not know blocks, caches or catalogs.

mod credentials;
mod error;
mod http;
mod local;
mod remote;
mod settings;
mod url;

use std::{collections::VecDeque, io, ops::Range, sync::Arc, time::Duration};

use bytes::{Bytes, BytesMut};
use futures::{
    StreamExt as _, TryStreamExt as _,
    stream::{self, BoxStream},
};
use object_store::{
    GetOptions, GetRange, ObjectStoreExt as _, PutMode, PutOptions, WriteMultipart,
    list::PaginatedListOptions,
};

pub use crate::pin::Pin;

pub use self::{
    credentials::{Borrowed, Credentials, Keys, Lender, Lent, LoanState, Secret},
    error::OriginError,
    http::Counters,
    settings::StoreSettings,
    url::{StoreKind, StoreUrl},
};
use self::{
    http::{Tally, unescape_key},
    local::{Listed, LocalStore},
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

/// Objects up to this size are uploaded in one request.
const SINGLE_PUT: u64 = 16 << 20;
const PART: u64 = 16 << 20;
/// S3 allows 10,000 parts.
const MOST_PARTS: u64 = 9_000;
/// Parts in flight: with [`PART`], what bounds the memory of an upload.
const PARTS_AT_ONCE: usize = 4;
/// What is read from a local file at once.
const LOCAL_CHUNK: u64 = 1 << 20;

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
                let (remote, place) = remote::build(url, settings, deadlines, &tally, credentials)?;
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

    /// Exactly `range` of the object, as a stream; errors if the answer is longer, shorter or elsewhere.
    pub async fn get_range(
        &self,
        key: &str,
        pin: &Pin,
        range: Range<u64>,
    ) -> Result<BoxStream<'static, Result<Bytes, OriginError>>, OriginError> {
        self.checked(key)?;
        if range.is_empty() {
            return Ok(stream::empty().boxed());
        }
        let wanted = key.to_owned();
        if let Some(opened) = self.local(key, move |store| store.open(&wanted)).await {
            let opened = opened?;
            if let Pin::ETag(expected) = pin {
                self.compare(key, expected, opened.info.etag.as_deref())?;
            }
            self.inner
                .tally
                .requests
                .fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            let body = self.read_file(key, Arc::new(opened.file), range.clone());
            return Ok(self.exact(key, range, body));
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        let mut options = GetOptions::new().with_range(Some(GetRange::Bounded(range.clone())));
        match pin {
            Pin::Content => {}
            Pin::ETag(etag) => options = options.with_if_match(Some(etag)),
            Pin::VersionId(version) => options = options.with_version(Some(version)),
        }
        let place = self.place(key);
        let result = observed(false, remote.store.get_opts(&path, options))
            .await
            .map_err(|(error, seen)| {
                match place.error(error, &seen) {
                    OriginError::Changed { store, key, .. } => OriginError::Changed {
                        store,
                        key,
                        expected: match pin {
                            Pin::ETag(expected) | Pin::VersionId(expected) => expected.clone(),
                            Pin::Content => "its published content".to_owned(),
                        },
                        found: None,
                    },
                    // A success that the client did not accept: not the range that was asked for.
                    OriginError::Other { store, key, source }
                        if (200..300).contains(&seen.status) || seen.status == 416 =>
                    {
                        OriginError::BadRange {
                            store,
                            key,
                            asked: range.clone(),
                            source,
                        }
                    }
                    error => error,
                }
            })?;
        if let Pin::ETag(expected) = pin {
            self.compare(key, expected, result.meta.e_tag.as_deref())?;
        }
        if result.range != range {
            return Err(OriginError::BadRange {
                store: self.inner.shown.clone(),
                key: key.to_owned(),
                asked: range,
                source: None,
            });
        }
        let store = self.clone();
        let key_owned = key.to_owned();
        let body = result
            .into_stream()
            .map_err(move |error| store.place(&key_owned).error(error, &http::Seen::default()))
            .boxed();
        Ok(self.exact(key, range, body))
    }

    fn elsewhere(&self, key: &str) -> OriginError {
        OriginError::Other {
            store: self.inner.shown.clone(),
            key: key.to_owned(),
            source: None,
        }
    }

    fn compare(&self, key: &str, expected: &str, found: Option<&str>) -> Result<(), OriginError> {
        // Listings and answers differ in quotes, and proxies weaken tags.
        let bare = |tag: &str| tag.trim_start_matches("W/").trim_matches('"').to_owned();
        if found.map(bare) == Some(bare(expected)) {
            return Ok(());
        }
        Err(OriginError::Changed {
            store: self.inner.shown.clone(),
            key: key.to_owned(),
            expected: expected.to_owned(),
            found: found.map(str::to_owned),
        })
    }

    fn read_file(
        &self,
        key: &str,
        file: Arc<std::fs::File>,
        range: Range<u64>,
    ) -> BoxStream<'static, Result<Bytes, OriginError>> {
        let (store, key) = (self.clone(), key.to_owned());
        stream::try_unfold(range.start, move |offset| {
            let (store, key, file, end) = (store.clone(), key.clone(), Arc::clone(&file), range.end);
            async move {
                if offset >= end {
                    return Ok(None);
                }
                let length = usize::try_from((end - offset).min(LOCAL_CHUNK)).unwrap_or(usize::MAX);
                let bytes = tokio::task::spawn_blocking(move || local::read_at(&file, offset, length))
                    .await
                    .map_err(io::Error::other)
                    .flatten()
                    .map_err(|error| store.local_error(&key, error, false))?;
                if bytes.is_empty() {
                    return Ok(None);
                }
                store
                    .inner
                    .tally
                    .bytes_in
                    .fetch_add(bytes.len() as u64, std::sync::atomic::Ordering::Relaxed);
                let next = offset + bytes.len() as u64;
                Ok(Some((bytes, next)))
            }
        })
        .boxed()
    }

    /// Passes a body on, and turns too few or too many bytes into an error.
    fn exact(
        &self,
        key: &str,
        range: Range<u64>,
        body: BoxStream<'static, Result<Bytes, OriginError>>,
    ) -> BoxStream<'static, Result<Bytes, OriginError>> {
        let (store, key) = (self.inner.shown.clone(), key.to_owned());
        let expected = range.end - range.start;
        stream::try_unfold(Some((body, 0u64)), move |state| {
            let (store, key, asked) = (store.clone(), key.clone(), range.clone());
            async move {
                let Some((mut body, got)) = state else {
                    return Ok(None);
                };
                match body.next().await {
                    Some(Ok(bytes)) => {
                        let got = got + bytes.len() as u64;
                        if got > expected {
                            return Err(OriginError::BadRange {
                                store,
                                key,
                                asked,
                                source: None,
                            });
                        }
                        Ok(Some((bytes, Some((body, got)))))
                    }
                    // A connection that breaks in the middle of a body is a truncated answer.
                    Some(Err(OriginError::Transient { source, .. } | OriginError::Other { source, .. })) => {
                        Err(OriginError::Truncated {
                            store,
                            key,
                            expected,
                            got,
                            source,
                        })
                    }
                    Some(Err(error)) => Err(error),
                    None if got < expected => Err(OriginError::Truncated {
                        store,
                        key,
                        expected,
                        got,
                        source: None,
                    }),
                    None => Ok(None),
                }
            }
        })
        .boxed()
    }

    /// The whole of a small object; `TooLarge` if it has more than `limit` bytes.
    pub async fn get(&self, key: &str, limit: u64) -> Result<(Bytes, ObjectInfo), OriginError> {
        self.checked(key)?;
        let too_large = |size| OriginError::TooLarge {
            store: self.inner.shown.clone(),
            key: key.to_owned(),
            size,
            limit,
        };
        let wanted = key.to_owned();
        if let Some(read) = self
            .local(key, move |store| {
                let open = store.open(&wanted)?;
                let length = usize::try_from(open.info.size.min(limit)).unwrap_or(usize::MAX);
                let bytes = if open.info.size > limit {
                    Bytes::new()
                } else {
                    local::read_at(&open.file, 0, length)?
                };
                Ok((bytes, open.info))
            })
            .await
        {
            let (bytes, info) = read?;
            return if info.size > limit {
                Err(too_large(info.size))
            } else {
                Ok((bytes, info))
            };
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        let place = self.place(key);
        let result = observed(false, remote.store.get_opts(&path, GetOptions::new()))
            .await
            .map_err(|(error, seen)| place.error(error, &seen))?;
        let info = self.remote_info(key.to_owned(), &result.meta);
        if info.size > limit {
            return Err(too_large(info.size));
        }
        let size = info.size;
        let mut bytes = BytesMut::with_capacity(usize::try_from(size).unwrap_or(0));
        let mut body = result.into_stream();
        while let Some(chunk) = body.next().await {
            let chunk = chunk.map_err(|error| place.error(error, &http::Seen::default()))?;
            if (bytes.len() + chunk.len()) as u64 > limit {
                return Err(too_large((bytes.len() + chunk.len()) as u64));
            }
            bytes.extend_from_slice(&chunk);
        }
        if bytes.len() as u64 != size {
            return Err(OriginError::Truncated {
                store: self.inner.shown.clone(),
                key: key.to_owned(),
                expected: size,
                got: bytes.len() as u64,
                source: None,
            });
        }
        Ok((bytes.freeze(), info))
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

    pub async fn head(&self, key: &str) -> Result<ObjectInfo, OriginError> {
        self.checked(key)?;
        let wanted = key.to_owned();
        if let Some(opened) = self.local(key, move |store| store.open(&wanted)).await {
            return Ok(opened?.info);
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        let meta = observed(false, remote.store.head(&path))
            .await
            .map_err(|(error, seen)| self.place(key).error(error, &seen))?;
        Ok(self.remote_info(key.to_owned(), &meta))
    }

    pub async fn put(&self, key: &str, bytes: Bytes) -> Result<(), OriginError> {
        self.checked(key)?;
        let (wanted, payload) = (key.to_owned(), bytes.clone());
        if let Some(done) = self.local(key, move |store| store.put(&wanted, &payload)).await {
            return done;
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        observed(false, remote.store.put(&path, bytes.into()))
            .await
            .map(drop)
            .map_err(|(error, seen)| self.place(key).error(error, &seen))
    }

    /// A retry inside the client can meet its own first try: `AlreadyExists` may be our own object.
    pub async fn put_if_absent(&self, key: &str, bytes: Bytes) -> Result<PutOutcome, OriginError> {
        self.checked(key)?;
        let (wanted, payload) = (key.to_owned(), bytes.clone());
        if let Some(done) = self
            .local(key, move |store| store.put_if_absent(&wanted, &payload))
            .await
        {
            return done;
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        let options = PutOptions {
            mode: PutMode::Create,
            ..PutOptions::default()
        };
        match observed(false, remote.store.put_opts(&path, bytes.into(), options)).await {
            Ok(_) => Ok(PutOutcome::Created),
            Err((object_store::Error::AlreadyExists { .. }, seen)) if seen.status != 409 => {
                Ok(PutOutcome::AlreadyExists)
            }
            // 409: another conditional put of this key is being decided; the caller reads back or tries again.
            Err((object_store::Error::AlreadyExists { source, .. }, _)) => Err(OriginError::Transient {
                store: self.inner.shown.clone(),
                key: key.to_owned(),
                source: Some(source),
            }),
            Err((error, seen)) => match self.place(key).error(error, &seen) {
                OriginError::Unsupported { store, source, .. } => Err(OriginError::Unsupported {
                    store,
                    what: "put-if-absent",
                    source,
                }),
                error => Err(error),
            },
        }
    }

    /// Streams `parts` into one object: multipart, bounded memory, aborted on error.
    pub async fn put_stream(
        &self,
        key: &str,
        size: u64,
        mut parts: BoxStream<'_, io::Result<Bytes>>,
    ) -> Result<(), OriginError> {
        self.checked(key)?;
        let unreadable = |error: io::Error| OriginError::Other {
            store: self.inner.shown.clone(),
            key: key.to_owned(),
            source: Some(error.into()),
        };
        let wrong_size = |got: u64| {
            unreadable(io::Error::other(format!(
                "{got} bytes came where {size} were announced"
            )))
        };
        let wanted = key.to_owned();
        if let Some(upload) = self.local(key, move |store| store.upload(&wanted)).await {
            let mut upload = upload?;
            let mut got = 0;
            while let Some(bytes) = parts.next().await {
                let bytes = bytes.map_err(unreadable)?;
                got += bytes.len() as u64;
                let written = self
                    .local(key, move |_| upload.write(&bytes).map(|()| upload))
                    .await;
                upload = written.unwrap_or_else(|| Err(self.elsewhere(key)))?;
            }
            if got != size {
                return Err(wrong_size(got));
            }
            return self
                .local(key, move |_| upload.finish())
                .await
                .unwrap_or_else(|| Err(self.elsewhere(key)));
        }
        if size <= SINGLE_PUT {
            let mut whole = BytesMut::with_capacity(usize::try_from(size).unwrap_or(0));
            while let Some(bytes) = parts.next().await {
                let bytes = bytes.map_err(unreadable)?;
                if (whole.len() + bytes.len()) as u64 > size {
                    return Err(wrong_size((whole.len() + bytes.len()) as u64));
                }
                whole.extend_from_slice(&bytes);
            }
            return match whole.len() as u64 {
                got if got == size => self.put(key, whole.freeze()).await,
                got => Err(wrong_size(got)),
            };
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        let place = self.place(key);
        let upload = observed(false, remote.store.put_multipart(&path))
            .await
            .map_err(|(error, seen)| place.error(error, &seen))?;
        let part = PART.max(size.div_ceil(MOST_PARTS));
        let mut upload =
            WriteMultipart::new_with_chunk_size(upload, usize::try_from(part).unwrap_or(usize::MAX));
        // Parts are sent by tasks of their own, out of sight of `observed`: their errors tell less.
        let mut got = 0;
        let failed = loop {
            match parts.next().await {
                None if got == size => break None,
                None => break Some(wrong_size(got)),
                Some(Err(error)) => break Some(unreadable(error)),
                Some(Ok(bytes)) => {
                    if let Err(error) = upload.wait_for_capacity(PARTS_AT_ONCE).await {
                        break Some(place.error(error, &http::Seen::default()));
                    }
                    got += bytes.len() as u64;
                    upload.put(bytes);
                }
            }
        };
        if let Some(error) = failed {
            // The store forgets the parts; if it does not hear of it, its own lifecycle rules do it later.
            let _ = upload.abort().await;
            return Err(error);
        }
        // `finish` aborts by itself when it fails.
        observed(false, upload.finish())
            .await
            .map(drop)
            .map_err(|(error, seen)| place.error(error, &seen))
    }

    pub async fn delete(&self, key: &str) -> Result<(), OriginError> {
        self.checked(key)?;
        let wanted = key.to_owned();
        if let Some(done) = self.local(key, move |store| store.delete(&wanted)).await {
            return done;
        }
        let Backend::Remote(remote) = &self.inner.backend else {
            return Err(self.elsewhere(key));
        };
        let path = self.path(key)?;
        observed(false, remote.store.delete(&path))
            .await
            .map_err(|(error, seen)| self.place(key).error(error, &seen))
    }

    /// Everything below `prefix` (with its trailing slash; or empty) whose key is greater than `after`, in
    /// pages, in the order of the keys' bytes where the store keeps one (S3, GCS, Azure and files do).
    pub fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
    ) -> BoxStream<'static, Result<ObjectInfo, OriginError>> {
        match &self.inner.backend {
            Backend::Local(_) => self.list_files(prefix, after),
            Backend::Remote(_) => self
                .pages(prefix, after, false)
                .map_ok(move |page| {
                    let objects = page.objects.into_iter().filter(|object| !object.key.is_empty());
                    stream::iter(objects.map(Ok).collect::<Vec<_>>())
                })
                .try_flatten()
                .boxed(),
        }
    }

    fn list_files(
        &self,
        prefix: &str,
        after: Option<&str>,
    ) -> BoxStream<'static, Result<ObjectInfo, OriginError>> {
        let after = after.map(str::to_owned);
        let start = VecDeque::from([Listed::Directory(prefix.to_owned())]);
        // Depth first; each directory is read when the walk comes to it, so the memory is one path's worth.
        stream::try_unfold((self.clone(), start), move |(store, mut queue)| {
            let after = after.clone();
            async move {
                loop {
                    match queue.pop_front() {
                        None => return Ok(None),
                        Some(Listed::Object(info)) => {
                            if after.as_ref().is_none_or(|after| info.key > *after) {
                                return Ok(Some((info, (store, queue))));
                            }
                        }
                        Some(Listed::Directory(key)) => {
                            // Everything in it sorts before `after`.
                            if let Some(after) = &after
                                && after.as_str() > key.as_str()
                                && !after.starts_with(&key)
                            {
                                continue;
                            }
                            let wanted = key.clone();
                            let level = match store.local(&key, move |local| local.level(&wanted)).await {
                                Some(level) => level?,
                                None => return Err(store.elsewhere(&key)),
                            };
                            for entry in level.into_iter().rev() {
                                queue.push_front(entry);
                            }
                        }
                    }
                }
            }
        })
        .boxed()
    }

    /// The pages of a remote listing; keys relative to the store's prefix.
    fn pages(
        &self,
        prefix: &str,
        after: Option<&str>,
        delimited: bool,
    ) -> BoxStream<'static, Result<Level, OriginError>> {
        let full = format!("{}{prefix}", self.inner.prefix);
        let offset = after.map(|after| format!("{}{after}", self.inner.prefix));
        let prefix = prefix.to_owned();
        stream::try_unfold((self.clone(), Some(None::<String>)), move |(store, state)| {
            let (full, offset, prefix) = (full.clone(), offset.clone(), prefix.clone());
            async move {
                let Some(token) = state else { return Ok(None) };
                let lister = match &store.inner.backend {
                    Backend::Remote(Remote {
                        lister: Some(lister), ..
                    }) => Arc::clone(lister),
                    _ => {
                        return Err(OriginError::Unsupported {
                            store: store.inner.shown.clone(),
                            what: "listing; use s3://, gs://, az:// or file://",
                            source: None,
                        });
                    }
                };
                let options = PaginatedListOptions {
                    // A page token already knows where it goes on.
                    offset: if token.is_none() { offset.clone() } else { None },
                    delimiter: delimited.then_some("/".into()),
                    page_token: token,
                    ..PaginatedListOptions::default()
                };
                let prefix_option = (!full.is_empty()).then_some(full.as_str());
                let page = observed(true, lister.list_paginated(prefix_option, options))
                    .await
                    .map_err(|(error, seen)| match store.place(&prefix).error(error, &seen) {
                        OriginError::NotFound { store, .. } => OriginError::NoBucket { store, source: None },
                        error => error,
                    })?;
                let relative = |escaped: &str| {
                    unescape_key(escaped)
                        .strip_prefix(&store.inner.prefix)
                        .map(str::to_owned)
                };
                let level = Level {
                    prefixes: page
                        .result
                        .common_prefixes
                        .iter()
                        .filter_map(|path| relative(path.as_ref()))
                        .collect(),
                    objects: page
                        .result
                        .objects
                        .iter()
                        .filter_map(|meta| {
                            let key = relative(meta.location.as_ref())?;
                            // Not every store heeds the offset.
                            let wanted = offset.as_ref().is_none_or(|offset| {
                                format!("{}{key}", store.inner.prefix).as_str() > offset.as_str()
                            });
                            wanted.then(|| store.remote_info(key, meta))
                        })
                        .collect(),
                };
                Ok(Some((level, (store, page.page_token.map(Some)))))
            }
        })
        .boxed()
    }

    /// The objects right below `prefix` (with its trailing slash; or empty), and the prefixes one level down.
    pub async fn list_level(&self, prefix: &str) -> Result<Level, OriginError> {
        let wanted = prefix.to_owned();
        if let Some(listed) = self.local(prefix, move |store| store.level(&wanted)).await {
            let mut level = Level::default();
            for entry in listed? {
                match entry {
                    Listed::Object(info) => level.objects.push(info),
                    Listed::Directory(key) => level.prefixes.push(key),
                }
            }
            return Ok(level);
        }
        let mut level = Level::default();
        let mut pages = self.pages(prefix, None, true);
        while let Some(page) = pages.next().await {
            let page = page?;
            level.prefixes.extend(page.prefixes);
            level.objects.extend(page.objects);
        }
        level.prefixes.sort_unstable();
        level.prefixes.dedup();
        Ok(level)
    }
}

impl std::fmt::Debug for Store {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Store").field(&self.inner.shown).finish()
    }
}

#[cfg(test)]
mod tests;
