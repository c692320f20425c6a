//! Bringing objects to the store under the names of their digests.
//!
//! A digest that is there with the right size is not uploaded again: that is what makes publishing
//! resumable. One digest is uploaded by one task at a time.

use std::{
    collections::HashMap,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bytes::Bytes;
use futures::{StreamExt, stream};
use parking_lot::Mutex;
use tokio::sync::OnceCell;

use super::{
    Progress, PublishError, Report,
    bundle::SealedBundle,
    content::{FileStream, stream_file},
};
use crate::{
    digest::Digest,
    origin::{OriginError, Store},
};

/// How a bundle is handed to the store: slices, so that the store decides on its own parts.
const SLICE: usize = 8 << 20;

/// How many uploaded files are remembered; of others the store is asked again.
const MAX_REMEMBERED: usize = 1_000_000;

/// Where an object of this digest lies in the catalog's store.
pub(super) fn object_key(digest: &Digest) -> String {
    let digest = digest.to_string();
    format!("objects/{}/{digest}", &digest[..2])
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum FileUpload {
    Done,
    /// The file no longer holds the bytes of the digest; nothing was uploaded.
    Changed,
}

pub(super) struct Uploader {
    store: Store,
    progress: Arc<dyn Progress>,
    uploaded: Count,
    present: Count,
    /// Digests of files that a task is uploading or has uploaded.
    files: Mutex<HashMap<Digest, Arc<OnceCell<()>>>>,
}

#[derive(Default)]
struct Count {
    objects: AtomicU64,
    bytes: AtomicU64,
}

impl Count {
    fn add(&self, bytes: u64) {
        self.objects.fetch_add(1, Ordering::Relaxed);
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    fn get(&self) -> (u64, u64) {
        (
            self.objects.load(Ordering::Relaxed),
            self.bytes.load(Ordering::Relaxed),
        )
    }
}

impl Uploader {
    pub fn new(store: Store, progress: Arc<dyn Progress>) -> Self {
        Self {
            store,
            progress,
            uploaded: Count::default(),
            present: Count::default(),
            files: Mutex::default(),
        }
    }

    pub fn report(&self, report: &mut Report) {
        (report.uploaded_objects, report.uploaded_bytes) = self.uploaded.get();
        (report.present_objects, report.present_bytes) = self.present.get();
    }

    async fn is_present(&self, key: &str, size: u64) -> Result<bool, PublishError> {
        is_present(&self.store, key, size).await
    }

    pub async fn bundle(&self, bundle: SealedBundle) -> Result<(), PublishError> {
        let (key, size) = (object_key(&bundle.digest), bundle.bytes.len() as u64);
        if self.is_present(&key, size).await? {
            self.present.add(size);
            return Ok(());
        }
        let slices: Vec<Bytes> = (0..bundle.bytes.len())
            .step_by(SLICE)
            .map(|start| bundle.bytes.slice(start..(start + SLICE).min(bundle.bytes.len())))
            .collect();
        let progress = self.progress.clone();
        let parts = stream::iter(slices)
            .map(Ok)
            .inspect(move |part: &std::io::Result<Bytes>| {
                progress.sent(part.as_ref().map_or(0, Bytes::len) as u64);
            })
            .boxed();
        self.store.put_stream(&key, size, parts).await?;
        self.uploaded.add(size);
        Ok(())
    }

    /// Uploads a file that was hashed a moment ago; hashes it again on the way, and gives up before
    /// the last byte if the file has changed. `settled` is how much of it `Progress` was told of.
    pub async fn file(
        &self,
        path: &Path,
        size: u64,
        digest: Digest,
        settled: &Arc<AtomicU64>,
    ) -> Result<FileUpload, PublishError> {
        let cell = self.files.lock().entry(digest).or_default().clone();
        let result = cell
            .get_or_try_init(|| self.file_alone(path, size, digest, settled))
            .await;
        if result.is_err() || self.files.lock().len() > MAX_REMEMBERED {
            // Whoever waits on the cell keeps it; who comes later asks the store.
            self.files.lock().remove(&digest);
        }
        match result {
            Ok(()) => Ok(FileUpload::Done),
            Err(None) => Ok(FileUpload::Changed),
            Err(Some(error)) => Err(error),
        }
    }

    /// `Err(None)`: the file has changed.
    async fn file_alone(
        &self,
        path: &Path,
        size: u64,
        digest: Digest,
        settled: &Arc<AtomicU64>,
    ) -> Result<(), Option<PublishError>> {
        let key = object_key(&digest);
        if self.is_present(&key, size).await.map_err(Some)? {
            self.present.add(size);
            return Ok(());
        }
        let FileStream { parts, changed } = stream_file(path.to_owned(), size, Some(digest));
        let (progress, settled, mut position) = (self.progress.clone(), settled.clone(), 0);
        let parts = parts
            .inspect(move |part| {
                let length = part.as_ref().map_or(0, Bytes::len) as u64;
                position += length;
                // A second try goes over the same bytes again.
                let before = settled.fetch_max(position, Ordering::Relaxed);
                progress.settled(0, position.saturating_sub(before));
                progress.sent(length);
            })
            .boxed();
        match self.store.put_stream(&key, size, parts).await {
            Ok(()) => {
                self.uploaded.add(size);
                Ok(())
            }
            Err(_) if changed.load(Ordering::Acquire) => Err(None),
            Err(error) => Err(Some(error.into())),
        }
    }
}

/// Whether `key` is there with `size` bytes.
pub(super) async fn is_present(store: &Store, key: &str, size: u64) -> Result<bool, PublishError> {
    Ok(size_of(store, key).await? == Some(size))
}

/// The size of an object, `None` if there is none.
pub(super) async fn size_of(store: &Store, key: &str) -> Result<Option<u64>, PublishError> {
    match store.head(key).await {
        Ok(info) => Ok(Some(info.size)),
        Err(OriginError::NotFound { .. }) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
