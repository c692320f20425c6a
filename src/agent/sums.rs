//! The sums of a version's blocks, fetched frame by frame when first needed.

use std::{num::NonZeroUsize, ops::Range, sync::Arc};

use async_trait::async_trait;
use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use lru::LruCache;
use parking_lot::Mutex;

use crate::{
    digest::BlockSum,
    fetch::{BlockSums, FetchError},
    origin::{OriginError, Pin, Store},
    tree::{ObjectNo, SumFrame, Tree, TreeError},
};

/// Verified frames kept in memory. One covers 512 MiB of data: the last 32 GiB for 4 MiB of memory.
const FRAMES_KEPT: NonZeroUsize = NonZeroUsize::new(64).unwrap();
/// A frame that arrives damaged is fetched once more.
const TRIES: usize = 2;

/// The sums part of one version.
pub struct SumsPart {
    tree: Arc<Tree>,
    store: Store,
    key: String,
    frames: Mutex<LruCache<u64, Bytes>>,
    /// Held while a frame is fetched: who comes second finds it there.
    fetching: tokio::sync::Mutex<()>,
}

impl SumsPart {
    pub fn new(tree: Arc<Tree>, store: Store, key: String) -> Arc<Self> {
        Arc::new(Self {
            tree,
            store,
            key,
            frames: Mutex::new(LruCache::new(FRAMES_KEPT)),
            fetching: tokio::sync::Mutex::new(()),
        })
    }

    /// One object's share of it.
    pub fn of(self: &Arc<Self>, object: ObjectNo) -> Arc<dyn BlockSums> {
        Arc::new(ObjectSums {
            part: Arc::clone(self),
            object,
        })
    }

    async fn frame(&self, frame: &SumFrame) -> Result<Vec<BlockSum>, FetchError> {
        let damaged = |error: TreeError| self.failed(&error);
        if let Some(bytes) = self.kept(frame) {
            return frame.pick(&bytes).map_err(damaged);
        }
        let _first = self.fetching.lock().await;
        if let Some(bytes) = self.kept(frame) {
            return frame.pick(&bytes).map_err(damaged);
        }
        let mut tries = 0;
        loop {
            tries += 1;
            let bytes = self
                .fetch(frame.range.clone())
                .await
                .map_err(|error| FetchError::Origin(Arc::new(error)))?;
            match frame.sums(&bytes) {
                Ok(sums) => {
                    self.frames.lock().put(frame.number, bytes);
                    return Ok(sums);
                }
                Err(error) if tries < TRIES => {
                    tracing::warn!(key = self.key, %error, "damaged sums; fetching them anew")
                }
                Err(error) => return Err(damaged(error)),
            }
        }
    }

    fn failed(&self, error: &TreeError) -> FetchError {
        FetchError::Sums {
            key: self.key.clone(),
            reason: error.to_string(),
        }
    }

    fn kept(&self, frame: &SumFrame) -> Option<Bytes> {
        self.frames.lock().get(&frame.number).cloned()
    }

    async fn fetch(&self, range: Range<u64>) -> Result<Bytes, OriginError> {
        let stream = self.store.get_range(&self.key, &Pin::Content, range).await?;
        let bytes = stream.try_fold(BytesMut::new(), |mut all, chunk| async move {
            all.extend_from_slice(&chunk);
            Ok(all)
        });
        Ok(bytes.await?.freeze())
    }
}

struct ObjectSums {
    part: Arc<SumsPart>,
    object: ObjectNo,
}

#[async_trait]
impl BlockSums for ObjectSums {
    async fn sums(&self, blocks: Range<u64>) -> Result<Vec<BlockSum>, FetchError> {
        let frames = self
            .part
            .tree
            .sum_frames(self.object, blocks)
            .map_err(|error| self.part.failed(&error))?;
        let mut sums = Vec::new();
        for frame in &frames {
            sums.extend(self.part.frame(frame).await?);
        }
        Ok(sums)
    }
}
