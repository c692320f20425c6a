//! The content of a snapshot as it comes through the fetcher.

use std::{fs::File, num::NonZeroUsize, ops::Range, sync::Arc};

use async_trait::async_trait;
use bytes::Bytes;
use lru::LruCache;
use parking_lot::Mutex;

use super::content::{Content, ReadError};
use crate::{
    block::blocks_covering,
    fetch::{FetchObject, Fetcher, Source, Streams},
    tree::{Ino, ObjectNo, TreeError},
};

/// Objects kept open between reads, each with two descriptors at most; and inodes whose streams are known.
const OPEN_OBJECTS: NonZeroUsize = NonZeroUsize::new(256).unwrap();
const KNOWN_INODES: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

/// Says where the objects of one tree are.
pub trait Sources: Send + Sync {
    fn source(&self, object: ObjectNo) -> Result<Source, TreeError>;
}

/// Objects of one tree, read through the cache and fetched when they are not there.
pub struct Fetched<S> {
    fetcher: Arc<Fetcher>,
    sources: S,
    /// Who may share cached bytes: see the cache's object identity.
    domain: String,
    open: Mutex<LruCache<ObjectNo, Arc<FetchObject>>>,
    streams: Mutex<LruCache<Ino, Arc<Streams>>>,
}

impl<S: Sources> Fetched<S> {
    pub fn new(fetcher: Arc<Fetcher>, sources: S, domain: String) -> Self {
        Self {
            fetcher,
            sources,
            domain,
            open: Mutex::new(LruCache::new(OPEN_OBJECTS)),
            streams: Mutex::new(LruCache::new(KNOWN_INODES)),
        }
    }

    fn object(&self, number: ObjectNo) -> Result<Arc<FetchObject>, TreeError> {
        if let Some(object) = self.open.lock().get(&number) {
            return Ok(Arc::clone(object));
        }
        // Two readers may both come here: the fetcher gives both the same object.
        let object = self.fetcher.open(&self.domain, self.sources.source(number)?);
        let evicted = self.open.lock().push(number, Arc::clone(&object));
        // Closing files is not for the lock.
        drop(evicted);
        Ok(object)
    }
}

#[async_trait]
impl<S: Sources> Content for Fetched<S> {
    fn read_cached(&self, object: ObjectNo, range: Range<u64>, buf: &mut Vec<u8>) -> bool {
        self.object(object)
            .is_ok_and(|object| self.fetcher.read_cached(&object, range, buf).is_some())
    }

    async fn read(&self, object: ObjectNo, range: Range<u64>) -> Result<Bytes, ReadError> {
        let object = self.object(object)?;
        Ok(self.fetcher.read(&object, range).await?)
    }

    fn advise(&self, ino: Ino, object: ObjectNo, range: Range<u64>, file: Range<u64>) {
        let Ok(object) = self.object(object) else { return };
        let streams = Arc::clone(self.streams.lock().get_or_insert(ino, Arc::default));
        self.fetcher.advise(&object, &streams, range, file);
    }

    fn cached_bytes(&self, object: ObjectNo, range: Range<u64>) -> u64 {
        let Ok(object) = self.object(object) else { return 0 };
        let Some(cached) = object.cached() else { return 0 };
        let absent = cached.missing(blocks_covering(&range)).into_iter().map(|block| {
            let bytes = block.byte_range(object.size());
            bytes
                .end
                .min(range.end)
                .saturating_sub(bytes.start.max(range.start))
        });
        (range.end - range.start).saturating_sub(absent.sum())
    }

    fn seal(&self, object: ObjectNo) -> Option<Arc<File>> {
        self.object(object).ok()?.cached()?.seal()
    }
}
