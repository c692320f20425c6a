//! What the cache holds, seen from the agent: its state, evicting a version, checking everything.

use std::{ops::ControlFlow, sync::Arc, time::Duration};

use tokio::sync::watch;

use super::{
    Agent, AgentError, UnderWay,
    access::Caller,
    control::{CacheInfo, EvictOutcome, EvictRequest, VerifyProgress, VersionRequest},
    snapshot::{Asking, Resolved, Snapshot},
};
use crate::{
    reference::Reference,
    tree::{ObjectNo, TreeError},
};

/// How long the state of the cache waits to be exact; then it is an estimate, and says so.
const COUNT_PATIENCE: Duration = Duration::from_secs(10);

impl Agent {
    /// The state of the cache, with what earlier runs left where that is counted in time.
    pub async fn cache_info(&self) -> CacheInfo {
        let cache = Arc::clone(&self.cache);
        blocking(move || cache.wait_scanned(COUNT_PATIENCE)).await;
        let stats = self.cache.stats();
        CacheInfo {
            dir: self.cache_config.dir.clone(),
            used: stats.allocated_bytes,
            limit: stats.max_bytes,
            min_free: self.cache_config.min_free,
            objects: stats.objects,
            units: stats.units,
            hits: stats.hits,
            misses: stats.misses,
            evictions: stats.evictions,
            fill_errors: stats.fill_errors,
            damaged: stats.verify_failures,
            scanned: stats.scanned,
            degraded: stats.degraded,
        }
    }

    /// Forgets a version's blocks, those it shares with other versions too, or everything. Who reads
    /// reads on.
    pub async fn evict(
        self: &Arc<Self>,
        caller: &Caller,
        request: EvictRequest,
    ) -> Result<EvictOutcome, AgentError> {
        let _under_way = UnderWay::begin(self)?;
        let Some(version) = request.version else {
            self.access.administrators(caller)?;
            let cache = Arc::clone(&self.cache);
            let (objects, freed) = blocking(move || {
                cache.wait_scanned(COUNT_PATIENCE);
                let before = cache.stats().allocated_bytes;
                let objects = cache.evict_all();
                (objects, before.saturating_sub(cache.stats().allocated_bytes))
            })
            .await;
            return Ok(EvictOutcome {
                reference: None,
                objects,
                freed,
            });
        };
        let snapshot = self.snapshot(caller, &version).await?;
        let reference = snapshot.resolved.reference();
        let agent = Arc::clone(self);
        let evicted = blocking(move || agent.evict_snapshot(snapshot)).await;
        let (objects, freed) = evicted.map_err(|source| AgentError::Tree {
            requested: version.reference,
            source,
        })?;
        Ok(EvictOutcome {
            reference: Some(reference),
            objects,
            freed,
        })
    }

    fn evict_snapshot(&self, snapshot: Snapshot) -> Result<(u64, u64), TreeError> {
        let before = self.cache.stats().allocated_bytes;
        let mut objects = 0;
        for number in (0..snapshot.tree.object_count()).map(ObjectNo) {
            let id = snapshot.object(&self.fetcher, number)?.id();
            objects += u64::from(self.cache.evict(&id));
        }
        let Snapshot { tree, kept, .. } = snapshot;
        drop(tree);
        if let Some(handle) = kept {
            self.cache.discard_tree(handle);
        }
        let freed = before.saturating_sub(self.cache.stats().allocated_bytes);
        Ok((objects, freed))
    }

    /// Compares every cached block with its checksum. Ends early when nobody follows the progress.
    pub async fn verify(
        self: &Arc<Self>,
        progress: watch::Sender<VerifyProgress>,
    ) -> Result<VerifyProgress, AgentError> {
        let _under_way = UnderWay::begin(self)?;
        let cache = Arc::clone(&self.cache);
        let done = blocking(move || {
            cache.scrub(|done| {
                progress.send_replace(VerifyProgress {
                    objects: done.objects,
                    blocks: done.blocks,
                    damaged: done.damaged,
                });
                match progress.is_closed() {
                    true => ControlFlow::Break(()),
                    false => ControlFlow::Continue(()),
                }
            })
        })
        .await;
        Ok(VerifyProgress {
            objects: done.objects,
            blocks: done.blocks,
            damaged: done.damaged,
        })
    }

    /// A version with its tree, without a mount.
    pub(super) async fn snapshot(
        &self,
        caller: &Caller,
        version: &VersionRequest,
    ) -> Result<Snapshot, AgentError> {
        let reference: Reference = version.reference.parse()?;
        let failed = |source| AgentError::Snapshot {
            requested: version.reference.clone(),
            source,
        };
        let asking = Asking {
            access: &self.access,
            caller,
            settings: &version.store_settings,
        };
        let resolved = Resolved::new(&reference, &version.catalog, &version.user, asking)
            .await
            .map_err(failed)?;
        resolved
            .fetch_tree(&self.cache, &self.trees)
            .await
            .map_err(failed)
    }
}

/// Disk work off the runtime's threads.
pub(super) async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> T {
    match tokio::task::spawn_blocking(work).await {
        Ok(result) => result,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    }
}
