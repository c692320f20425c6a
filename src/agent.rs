//! The long-running process that owns mounts and the cache.
//!
//! Owns the mount table, the lifecycle of mounts, the control socket. What concerns the agent (cache,
//! limits) is its configuration; what concerns a caller (catalog, identity, credentials) comes with
//! each request. Must not know the command line.

pub mod client;
pub mod control;
pub mod keeping;
pub mod launch;
pub mod mount_point;
pub mod server;
pub mod snapshot;
mod stored;
mod sums;
mod warm;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::watch;

use self::{
    control::{AgentInfo, MountInfo, MountRequest, UnmountOutcome, UnmountRequest, UnmountTarget},
    keeping::{Entry, Keeping},
    mount_point::{MountPoint, MountPointError},
    snapshot::{Resolved, Snapshot, SnapshotError},
};
use crate::{
    cache::Cache,
    causes::in_one_line,
    fetch::{FetchError, Fetcher},
    fs::Owner,
    fuse::{self, Ended, MountError, MountOptions, Mounted, Operation},
    keeper::Held,
    origin::StoreSettings,
    reference::{ParseError, QualifiedName, Reference},
    tree::TreeError,
};
pub use crate::{
    cache::{CacheConfig, CacheError, VerifyPolicy},
    fetch::FetchConfig,
};

/// How long an unmounted session may take to end before the caller is told that it has not.
const SESSION_END_DEADLINE: Duration = Duration::from_secs(20);
/// Readers wait while a mount is resumed: its tree is in the cache, or has to come at once.
const RESUME_DEADLINE: Duration = Duration::from_secs(15);
/// Whoever started this agent waits while dead mounts are mounted again.
const AGAIN_DEADLINE: Duration = Duration::from_secs(8);

#[derive(Clone, Debug)]
pub struct AgentConfig {
    pub cache: CacheConfig,
    pub fetch: FetchConfig,
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
    #[error("the agent is stopping; try again")]
    Stopping,
}

/// Unmounts a mount of ours that no agent serves any more; `None` where there is none. Blocking.
pub fn unmount_orphan(path: &Path, lazy: bool) -> Option<UnmountOutcome> {
    let ours = |mount: &fuse::MountLine| mount.mount_point == *path && mount.kind == "fuse.grid-mount";
    let orphan = fuse::mounts().ok()?.into_iter().rfind(ours)?;
    let error = fuse::unmount_at(path, lazy)
        .err()
        .map(|error| in_one_line(&error));
    Some(UnmountOutcome {
        reference: orphan.source.to_str()?.parse().ok()?,
        mount_point: orphan.mount_point,
        error,
    })
}

/// One mount, served.
struct Mount {
    info: MountInfo,
    mounted: Arc<Mounted>,
    /// Keeps the tree's file in the cache while it is mapped.
    _snapshot: Arc<Snapshot>,
}

enum Slot {
    /// Somebody is mounting here.
    Pending,
    Serving(Arc<Mount>),
}

#[derive(Default)]
struct Table {
    slots: BTreeMap<PathBuf, Slot>,
    /// Requests to mount that are being answered.
    requests: usize,
    stopping: bool,
}

pub struct Agent {
    cache: Arc<Cache>,
    cache_config: CacheConfig,
    fetcher: Arc<Fetcher>,
    table: Mutex<Table>,
    /// Mounts, places held for mounts, and requests under way: an agent on demand ends at 0.
    count: watch::Sender<usize>,
    keeping: Arc<Keeping>,
}

impl Agent {
    /// Opens the cache; must run within a tokio runtime.
    pub fn new(config: AgentConfig, keeping: Keeping) -> Result<Arc<Self>, AgentError> {
        let cache = Cache::open(config.cache.clone()).map_err(|source| AgentError::Cache {
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
            table: Mutex::default(),
            count: watch::Sender::new(0),
            keeping: Arc::new(keeping),
        }))
    }

    /// Mounts what the request names, and returns when the mount answers.
    pub async fn mount(self: &Arc<Self>, request: MountRequest) -> Result<MountInfo, AgentError> {
        let _under_way = UnderWay::begin(self)?;
        let reference: Reference = request.reference.parse()?;
        let failed = |source| AgentError::Snapshot {
            requested: request.reference.clone(),
            source,
        };
        let resolved = Resolved::new(
            &reference,
            &request.catalog,
            &request.user,
            &request.store_settings,
        )
        .await
        .map_err(failed)?;
        let place = match self.reserve(&request.mount_point, &resolved)? {
            Place::Ours(reserved) => reserved,
            Place::AlreadyThere(info) => return Ok(*info),
        };
        let snapshot = resolved.fetch_tree(&self.cache).await.map_err(failed)?;
        let agent = Arc::clone(self);
        // Mounting waits for the kernel and perhaps for fusermount3.
        let handle = tokio::runtime::Handle::current();
        let made = tokio::task::spawn_blocking(move || agent.make_mount(&request, snapshot, place, handle));
        match made.await {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }

    fn reserve(self: &Arc<Self>, path: &Path, resolved: &Resolved) -> Result<Place, AgentError> {
        // The same directory by another name is found by its canonical path.
        let key = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
        let mut table = self.table.lock();
        match table.slots.get(&key) {
            Some(Slot::Pending) => Err(AgentError::Pending {
                mount_point: path.to_owned(),
            }),
            Some(Slot::Serving(mount)) => {
                let pinned = resolved.reference();
                if mount.info.reference == pinned && mount.info.catalog == resolved.catalog_url {
                    let info = MountInfo {
                        already_mounted: true,
                        ..mount.current_info()
                    };
                    return Ok(Place::AlreadyThere(Box::new(info)));
                }
                let offer = key.with_file_name(format!(
                    "{}-{}-{}",
                    pinned.name.owner, pinned.name.datastore, pinned.version
                ));
                Err(AgentError::Taken {
                    mount_point: path.to_owned(),
                    by: mount.info.reference.to_string(),
                    offer,
                })
            }
            None => {
                table.slots.insert(key.clone(), Slot::Pending);
                self.recount(&table);
                Ok(Place::Ours(Reserved {
                    agent: Arc::clone(self),
                    key,
                }))
            }
        }
    }

    fn make_mount(
        self: Arc<Self>,
        request: &MountRequest,
        snapshot: Snapshot,
        reserved: Reserved,
        handle: tokio::runtime::Handle,
    ) -> Result<MountInfo, AgentError> {
        let point = MountPoint::prepare(&request.mount_point)?;
        let snapshot = Arc::new(snapshot);
        let owner = Owner {
            uid: nix::unistd::geteuid().as_raw(),
            gid: nix::unistd::getegid().as_raw(),
        };
        let reference = snapshot.resolved.reference();
        let mut entry = self.keeping.begin(request, &point, &snapshot.resolved);
        let mut options = MountOptions::new(point.path(), reference.to_string(), owner);
        options.io_mode = request.io_mode;
        options.open_table = entry.as_ref().and_then(Entry::open_table);
        let mounted = fuse::mount(
            snapshot.file_system(&self.fetcher, owner, request.prefetch, &handle),
            options,
            &handle,
        )
        .map_err(|source| AgentError::Mount {
            requested: request.reference.clone(),
            mount_point: point.path().to_owned(),
            source,
        })?;
        if let Some(entry) = &mut entry {
            entry.made(&mounted, &snapshot.resolved.settings);
        }
        tracing::info!(%reference, mount_point = %point.path().display(), "mounted");
        let since = entry
            .as_ref()
            .map_or_else(jiff::Timestamp::now, |entry| entry.remembered.since);
        let mount = Mount::new(request, since, mounted, snapshot);
        let info = mount.current_info();
        reserved.serve(mount, point, entry, &handle);
        Ok(info)
    }

    /// Goes on with the mounts of agents before this one: with those whose descriptor is `held` as if
    /// nothing had happened; those that are dead are cleared and mounted again at the same path, with
    /// `settings` for the stores. Must be called before anything else is mounted.
    pub async fn resume(self: &Arc<Self>, held: Vec<Held>, settings: &StoreSettings) {
        let mut held: BTreeMap<String, Held> =
            held.into_iter().map(|held| (held.name.clone(), held)).collect();
        let mut lost = Vec::new();
        for entry in self.keeping.entries() {
            match held.remove(&entry.name()) {
                Some(held) if entry.remembered.state.is_some() => {
                    let (name, point) = (entry.name(), entry.remembered.mount_point.clone());
                    let remembered = entry.remembered.clone();
                    let settings = serde_json::from_str(&held.memo).unwrap_or_default();
                    if let Err(error) = self.resume_one(entry, held, settings).await {
                        let error = in_one_line(&*error);
                        tracing::error!(mount_point = %point.display(), error, "not resumed");
                        self.keeping.release(&name);
                        lost.extend(self.keeping.remembered(&name, remembered));
                    }
                }
                _ => lost.push(entry),
            }
        }
        for name in held.into_keys() {
            self.keeping.release(&name);
        }
        // The readers go on; the rest may take its time.
        self.keeping.serving();
        for entry in lost {
            self.mount_again(entry, settings).await;
        }
    }

    async fn resume_one(
        self: &Arc<Self>,
        entry: Entry,
        held: Held,
        settings: StoreSettings,
    ) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let remembered = &entry.remembered;
        let state = remembered.state.clone().ok_or("it was never made")?;
        let mut request = remembered.request.clone();
        request.store_settings = settings;
        let resolved = Resolved::again(
            remembered.record.clone(),
            &request.catalog,
            remembered.tree_store.as_ref(),
            &request.store_settings,
        )
        .await?;
        let snapshot = tokio::time::timeout(RESUME_DEADLINE, resolved.fetch_tree(&self.cache)).await??;
        let snapshot = Arc::new(snapshot);
        let agent = Arc::clone(self);
        let handle = tokio::runtime::Handle::current();
        let resuming = move || {
            let remembered = &entry.remembered;
            let point = MountPoint::inherited(remembered.mount_point.clone(), remembered.created.clone());
            let known = (state.handshake.clone(), state.device, state.way);
            let fs = snapshot.file_system(&agent.fetcher, state.owner, request.prefetch, &handle);
            let mounted = match fuse::resume(fs, state.options(), held.descriptor, known, &handle) {
                Ok(mounted) => mounted,
                Err(error) => {
                    // Whoever mounts it again will know what was made for it.
                    point.leave();
                    return Err(error);
                }
            };
            let since = remembered.since;
            let mount = Mount::new(&request, since, mounted, snapshot);
            tracing::info!(reference = %mount.info.reference, mount_point = %point.path().display(), "resumed");
            let reserved = Reserved {
                agent,
                key: point.path().to_owned(),
            };
            reserved.serve(mount, point, Some(entry), &handle);
            Ok(())
        };
        tokio::task::spawn_blocking(resuming).await??;
        Ok(())
    }

    /// Clears a mount that nobody serves, and mounts the same version again.
    async fn mount_again(self: &Arc<Self>, entry: Entry, settings: &StoreSettings) {
        let remembered = entry.remembered.clone();
        let was_dead = tokio::task::spawn_blocking(move || entry.clear()).await;
        if !was_dead.unwrap_or(false) {
            return;
        }
        let mut request = remembered.request;
        request.reference = remembered.record.reference().to_string();
        request.mount_point = remembered.mount_point;
        request.store_settings = settings.clone();
        let shown = request.mount_point.display().to_string();
        match tokio::time::timeout(AGAIN_DEADLINE, self.mount(request)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                let error = in_one_line(&error);
                tracing::warn!(mount_point = shown, error, "not mounted again");
            }
            Err(_) => tracing::warn!(mount_point = shown, "not mounted again: it took too long"),
        }
    }

    fn recount(&self, table: &Table) {
        self.count.send_replace(table.slots.len() + table.requests);
    }

    pub fn mounts(&self) -> Vec<MountInfo> {
        let table = self.table.lock();
        table
            .slots
            .values()
            .filter_map(Slot::serving)
            .map(|mount| mount.current_info())
            .collect()
    }

    pub fn info(&self) -> AgentInfo {
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
            last_error: fetch.last_error,
        }
    }

    pub async fn unmount(&self, request: UnmountRequest) -> Result<Vec<UnmountOutcome>, AgentError> {
        let chosen = match (self.choose(&request.target), &request.target) {
            (Err(error @ AgentError::NotMounted { .. }), UnmountTarget::MountPoint(path)) => {
                return unmount_orphan(path, request.lazy)
                    .map(|outcome| vec![outcome])
                    .ok_or(error);
            }
            (chosen, _) => chosen?,
        };
        let mut outcomes = Vec::with_capacity(chosen.len());
        for mount in chosen {
            outcomes.push(self.unmount_one(&mount, request.lazy).await);
        }
        Ok(outcomes)
    }

    async fn unmount_one(&self, mount: &Arc<Mount>, lazy: bool) -> UnmountOutcome {
        let mounted = Arc::clone(&mount.mounted);
        let error = match tokio::task::spawn_blocking(move || mounted.unmount(lazy)).await {
            Ok(Ok(())) => {
                // A lazily detached session ends when its last user goes: nothing to wait for.
                if lazy {
                    None
                } else {
                    self.wait_until_gone(mount).await
                }
            }
            Ok(Err(error)) => Some(in_one_line(&error)),
            Err(error) => Some(error.to_string()),
        };
        UnmountOutcome {
            reference: mount.info.reference.clone(),
            mount_point: mount.info.mount_point.clone(),
            error,
        }
    }

    async fn wait_until_gone(&self, mount: &Arc<Mount>) -> Option<String> {
        let mut count = self.count.subscribe();
        let is_there = || {
            let table = self.table.lock();
            table
                .slots
                .values()
                .filter_map(Slot::serving)
                .any(|other| Arc::ptr_eq(other, mount))
        };
        let gone = async {
            while is_there() {
                if count.changed().await.is_err() {
                    break;
                }
            }
        };
        tokio::time::timeout(SESSION_END_DEADLINE, gone)
            .await
            .err()
            .map(|_| {
                format!(
                    "unmounted, but its session has not ended within {} s",
                    SESSION_END_DEADLINE.as_secs()
                )
            })
    }

    fn choose(&self, target: &UnmountTarget) -> Result<Vec<Arc<Mount>>, AgentError> {
        let mounts: Vec<Arc<Mount>> = self
            .table
            .lock()
            .slots
            .values()
            .filter_map(Slot::serving)
            .cloned()
            .collect();
        let chosen: Vec<Arc<Mount>> = match target {
            UnmountTarget::All => return Ok(mounts),
            UnmountTarget::MountPoint(path) => mounts
                .iter()
                .filter(|mount| mount.info.mount_point == *path)
                .cloned()
                .collect(),
            UnmountTarget::Reference { reference, user } => {
                let reference: Reference = reference.parse()?;
                let name = QualifiedName {
                    owner: reference.owner.clone().unwrap_or_else(|| user.clone()),
                    datastore: reference.datastore.clone(),
                };
                mounts
                    .iter()
                    .filter(|mount| mount.is_of(&name, &reference))
                    .cloned()
                    .collect()
            }
        };
        if chosen.is_empty() {
            let target = match target {
                UnmountTarget::All => String::new(),
                UnmountTarget::MountPoint(path) => path.display().to_string(),
                UnmountTarget::Reference { reference, .. } => reference.clone(),
            };
            let there: Vec<String> = mounts
                .iter()
                .map(|mount| format!("{} at {}", mount.info.reference, mount.info.mount_point.display()))
                .collect();
            let mounted = if there.is_empty() {
                "; nothing is".to_owned()
            } else {
                format!("; these are: {}", there.join(", "))
            };
            return Err(AgentError::NotMounted { target, mounted });
        }
        Ok(chosen)
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

    /// Refuses new mounts and unmounts everything: what is in use is detached, and goes with its last user.
    pub async fn shut_down(&self) {
        self.table.lock().stopping = true;
        let mounts: Vec<Arc<Mount>> = self
            .table
            .lock()
            .slots
            .values()
            .filter_map(Slot::serving)
            .cloned()
            .collect();
        for mount in mounts {
            let outcome = self.unmount_one(&mount, false).await;
            let Some(error) = outcome.error else { continue };
            tracing::warn!(mount_point = %mount.info.mount_point.display(), error, "still in use: detached");
            if let Some(error) = self.unmount_one(&mount, true).await.error {
                tracing::error!(mount_point = %mount.info.mount_point.display(), error, "not unmounted");
            }
        }
        if let Err(error) = self.cache.settle() {
            tracing::warn!(%error, "the cache's order is not saved");
        }
    }
}

impl Mount {
    fn new(
        request: &MountRequest,
        since: jiff::Timestamp,
        mounted: Mounted,
        snapshot: Arc<Snapshot>,
    ) -> Arc<Self> {
        let resolved = &snapshot.resolved;
        let info = MountInfo {
            reference: resolved.reference(),
            requested: request.reference.clone(),
            mount_point: mounted.mount_point().to_owned(),
            catalog: resolved.catalog_url.clone(),
            origin: resolved.origin.url().clone(),
            totals: snapshot.tree.totals(),
            since,
            io_mode: mounted.io_mode().mode.to_string(),
            io_mode_reason: mounted.io_mode().reason.clone(),
            requests: BTreeMap::new(),
            already_mounted: false,
        };
        Arc::new(Self {
            info,
            mounted: Arc::new(mounted),
            _snapshot: snapshot,
        })
    }

    fn current_info(&self) -> MountInfo {
        let counters = self.mounted.counters();
        let requests = Operation::ALL
            .iter()
            .map(|operation| (operation.name().to_owned(), counters.get(*operation)))
            .filter(|(_, count)| *count > 0)
            .collect();
        MountInfo {
            requests,
            ..self.info.clone()
        }
    }

    fn is_of(&self, name: &QualifiedName, reference: &Reference) -> bool {
        use crate::reference::VersionSelector::{Alias, Latest, Number};
        self.info.reference.name == *name
            && match &reference.version {
                Latest => true,
                Number(version) => self.info.reference.version == *version,
                // An alias may have moved on since: what was typed decides.
                Alias(_) => self
                    .info
                    .requested
                    .parse::<Reference>()
                    .is_ok_and(|requested| requested.version == reference.version),
            }
    }
}

impl Slot {
    fn serving(&self) -> Option<&Arc<Mount>> {
        match self {
            Self::Pending => None,
            Self::Serving(mount) => Some(mount),
        }
    }
}

enum Place {
    Ours(Reserved),
    AlreadyThere(Box<MountInfo>),
}

/// A place in the table, given back unless a mount takes it.
struct Reserved {
    agent: Arc<Agent>,
    key: PathBuf,
}

impl Reserved {
    /// Enters the mount into the table, and takes it out when its session ends, however it ends.
    fn serve(
        self,
        mount: Arc<Mount>,
        point: MountPoint,
        entry: Option<Entry>,
        runtime: &tokio::runtime::Handle,
    ) {
        let served = Arc::clone(&mount.mounted);
        {
            let mut table = self.agent.table.lock();
            table.slots.insert(self.key.clone(), Slot::Serving(mount));
            self.agent.recount(&table);
        }
        runtime.spawn(async move {
            let shown = point.path().display();
            match served.wait().await {
                Ended::Failed(error) => tracing::error!(mount_point = %shown, error, "the session failed"),
                _ => tracing::info!(mount_point = %shown, "unmounted"),
            }
            drop(point);
            // Asks the keeper, which takes a moment.
            let _ = tokio::task::spawn_blocking(move || drop(entry)).await;
            drop(self);
        });
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        let mut table = self.agent.table.lock();
        table.slots.remove(&self.key);
        self.agent.recount(&table);
    }
}

/// A request to mount that is being answered: the agent stays for it.
struct UnderWay {
    agent: Arc<Agent>,
}

impl UnderWay {
    fn begin(agent: &Arc<Agent>) -> Result<Self, AgentError> {
        let mut table = agent.table.lock();
        if table.stopping {
            return Err(AgentError::Stopping);
        }
        table.requests += 1;
        agent.recount(&table);
        Ok(Self {
            agent: Arc::clone(agent),
        })
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        let mut table = self.agent.table.lock();
        table.requests -= 1;
        self.agent.recount(&table);
    }
}
