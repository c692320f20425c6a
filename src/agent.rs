//! The long-running process that owns mounts and the cache.
//!
//! Owns the mount table, the lifecycle of mounts, the control socket. What concerns the agent (cache,
//! limits) is its configuration; what concerns a caller (catalog, identity, credentials) comes with
//! each request. Must not know the command line.

pub mod access;
pub mod as_caller;
mod caller;
pub mod client;
pub mod control;
mod idle;
pub mod keeping;
pub mod launch;
mod lease;
pub mod metrics;
mod mount;
pub mod mount_point;
mod mounting;
mod profiles;
pub mod reload;
mod report;
mod resuming;
mod reuse;
pub mod server;
pub mod snapshot;
mod stored;
mod sums;
pub mod systemd;
mod table;
mod trees;
mod unmounting;
mod warm;

use std::{path::PathBuf, sync::Arc, time::Duration};

use parking_lot::Mutex;
use tokio::sync::watch;

pub use self::unmounting::unmount_orphan;
use self::{
    access::{Access, AccessError, Caller},
    control::AgentInfo,
    keeping::Keeping,
    mount::Mount,
    mount_point::MountPointError,
    snapshot::SnapshotError,
    table::{Slot, Table, UnderWay},
};
pub use crate::fuse::UNHEARD;
use crate::{
    cache::Cache,
    fetch::{FetchError, Fetcher},
    fuse::{self, MountError},
    reference::ParseError,
    tree::TreeError,
};
pub use crate::{
    cache::{CacheConfig, CacheError, VerifyPolicy},
    fetch::FetchConfig,
};

/// A busy disk may take long to make the cache durable: an agent that ends waits no longer.
const SETTLE_PATIENCE: Duration = Duration::from_secs(10);

#[derive(Clone, Debug)]
pub struct AgentConfig {
    pub cache: CacheConfig,
    pub fetch: FetchConfig,
    /// Of mounts that say nothing else.
    pub idle_timeout: Option<Duration>,
}

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum AgentError {
    #[error("the cache in {dir} cannot be used")]
    Cache {
        dir: PathBuf,
        #[source]
        source: CacheError,
    },
    #[error(transparent)]
    Reference(#[from] ParseError),
    #[error("{requested} cannot be mounted")]
    Snapshot {
        requested: String,
        #[source]
        source: SnapshotError,
    },
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    MountPoint(#[from] MountPointError),
    #[error("{mount_point} is taken by {by}; name another mount point, for example {offer}")]
    Taken {
        mount_point: PathBuf,
        by: String,
        offer: PathBuf,
    },
    #[error("{mount_point} is just being mounted by another command")]
    Pending { mount_point: PathBuf },
    #[error("{requested} cannot be mounted at {mount_point}")]
    Mount {
        requested: String,
        mount_point: PathBuf,
        #[source]
        source: MountError,
    },
    #[error("{target} is not mounted{mounted}")]
    NotMounted {
        target: String,
        /// What is, in words.
        mounted: String,
    },
    #[error("nothing is being recorded there: mount it with --record-profile")]
    NotRecorded,
    #[error("{pattern} is not a pattern of paths: {reason}")]
    Pattern { pattern: String, reason: String },
    #[error("nothing in {requested} matches {patterns}")]
    NothingMatches { requested: String, patterns: String },
    #[error(
        "{requested} needs {needed} bytes, but the cache holds {limit}: name less of it with --include, or give the agent more with --cache-size"
    )]
    TooLarge {
        requested: String,
        needed: u64,
        limit: u64,
    },
    #[error("{requested} cannot be fetched")]
    Warm {
        requested: String,
        #[source]
        source: FetchError,
    },
    #[error("the cache does not keep what arrives: {reason}")]
    NotKept { reason: String },
    #[error("the tree of {requested} is damaged")]
    Tree {
        requested: String,
        #[source]
        source: TreeError,
    },
    #[error("the settings are not read again, the old ones stay: {reason}")]
    Reload { reason: String },
    #[error("the agent is stopping; try again")]
    Stopping,
}

pub struct Agent {
    cache: Arc<Cache>,
    cache_config: CacheConfig,
    fetcher: Arc<Fetcher>,
    pub access: Access,
    idle_timeout: Mutex<Option<Duration>>,
    reread: Mutex<Option<Arc<reload::Reread>>>,
    trees: trees::Trees,
    table: Mutex<Table>,
    /// Mounts, places held for mounts, and requests under way: an agent on demand ends at 0.
    count: watch::Sender<usize>,
    keeping: Arc<Keeping>,
}

impl Agent {
    /// One of this process's user. Opens the cache; must run within a tokio runtime.
    pub fn new(config: AgentConfig, keeping: Keeping) -> Result<Arc<Self>, AgentError> {
        Self::serving(config, keeping, Access::own())
    }

    /// As [`Agent::new`], for whom `access` says.
    pub fn serving(config: AgentConfig, keeping: Keeping, access: Access) -> Result<Arc<Self>, AgentError> {
        fuse::keep_buffers_out_of_the_heap();
        let cache =
            Cache::open_or_read_through(config.cache.clone()).map_err(|source| AgentError::Cache {
                dir: config.cache.dir.clone(),
                source,
            })?;
        let fetcher = Fetcher::new(
            config.fetch,
            Some(Arc::clone(&cache)),
            tokio::runtime::Handle::current(),
        );
        Ok(Arc::new(Self {
            cache,
            cache_config: config.cache,
            fetcher,
            access,
            idle_timeout: Mutex::new(config.idle_timeout),
            reread: Mutex::default(),
            trees: trees::Trees::default(),
            table: Mutex::default(),
            count: watch::Sender::new(0),
            keeping: Arc::new(keeping),
        }))
    }

    fn served(&self) -> Vec<Arc<Mount>> {
        let table = self.table.lock();
        table.slots.values().filter_map(Slot::serving).cloned().collect()
    }

    /// What the caller may see of them.
    fn seen_by(&self, caller: &Caller) -> Vec<Arc<Mount>> {
        let mut mounts = self.served();
        mounts.retain(|mount| self.access.may_see(caller, mount.info.owner));
        mounts
    }

    pub fn info(&self, caller: &Caller) -> AgentInfo {
        let cache = self.cache.stats();
        let fetch = self.fetcher.stats();
        AgentInfo {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            pid: std::process::id(),
            cache_dir: self.cache_config.dir.clone(),
            cache_degraded: cache.degraded,
            cache_used: cache.allocated_bytes,
            cache_limit: self.cache_config.max_bytes,
            bytes_from_cache: fetch.cache_bytes,
            bytes_from_origin: fetch.origin_bytes,
            origin_requests: fetch.gets,
            retries: fetch.retries,
            // It names a key, of whomever's data.
            last_error: fetch.last_error.filter(|_| self.access.is_administrator(caller)),
        }
    }

    /// Resolves when there is no mount any more; where none was asked for yet, after `patience`.
    pub async fn idle(&self, patience: Duration) {
        let mut count = self.count.subscribe();
        let first = count.wait_for(|count| *count > 0);
        let _ = tokio::time::timeout(patience, first).await;
        // The sender lives as long as this agent.
        let _ = count.wait_for(|count| *count == 0).await;
    }

    /// Refuses new mounts from now on, if nothing is mounted or being mounted.
    pub fn stop_if_idle(&self) -> bool {
        let mut table = self.table.lock();
        let idle = table.slots.is_empty() && table.requests == 0;
        table.stopping |= idle;
        idle
    }

    /// How many mounts this agent serves.
    pub fn mount_count(&self) -> usize {
        self.table.lock().slots.values().filter_map(Slot::serving).count()
    }

    /// Refuses new mounts, and leaves those there are to the next agent. This process must end without a
    /// mount being dropped: that would unmount it.
    pub fn leave(&self) {
        self.table.lock().stopping = true;
        if let Err(error) = self.cache.settle() {
            tracing::warn!(%error, "the cache's order is not saved");
        }
    }

    /// Refuses new mounts and unmounts everything: what is in use is detached, and goes with its last user.
    pub async fn shut_down(&self) {
        self.table.lock().stopping = true;
        let mounts = self.served();
        for mount in mounts {
            let outcome = self.unmount_one(&mount, false).await;
            let Some(error) = outcome.error else { continue };
            tracing::warn!(mount_point = %mount.info.mount_point.display(), error, "still in use: detached");
            if let Some(error) = self.unmount_one(&mount, true).await.error {
                tracing::error!(mount_point = %mount.info.mount_point.display(), error, "not unmounted");
            }
        }
        // What is not durable then is checked before it is used: no reason to hang on a busy disk.
        let cache = Arc::clone(&self.cache);
        let settling = tokio::task::spawn_blocking(move || cache.settle());
        match tokio::time::timeout(SETTLE_PATIENCE, settling).await {
            Ok(Ok(Ok(()))) => {}
            Ok(Ok(Err(error))) => tracing::warn!(%error, "the cache is not settled"),
            Ok(Err(error)) => tracing::warn!(%error, "the cache is not settled"),
            Err(_) => tracing::warn!(after = ?SETTLE_PATIENCE, "the disk is busy: the cache is not settled"),
        }
    }
}
