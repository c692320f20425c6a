//! The long-running process that owns mounts and the cache.
//!
//! Owns the mount table, the lifecycle of mounts, the control socket. What concerns the agent (cache,
//! limits) is its configuration; what concerns a caller (catalog, identity, credentials) comes with
//! each request. Must not know the command line.

pub mod access;
pub mod as_caller;
pub mod client;
pub mod control;
mod idle;
pub mod keeping;
pub mod launch;
mod lease;
pub mod metrics;
pub mod mount_point;
pub mod reload;
mod report;
mod reuse;
pub mod server;
pub mod snapshot;
mod stored;
mod sums;
pub mod systemd;
mod trees;
mod warm;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use parking_lot::Mutex;
use tokio::sync::watch;

use self::{
    access::{Access, AccessError, Caller},
    as_caller::NamespaceId,
    control::{AgentInfo, MountInfo, MountRequest, Traffic, UnmountOutcome, UnmountRequest, UnmountTarget},
    keeping::{Entry, Keeping},
    mount_point::{Elsewhere, MountPoint, MountPointError, Prepared, Target},
    report::Watch,
    snapshot::{Asking, Resolved, Snapshot, SnapshotError},
};
use crate::{
    cache::Cache,
    causes::in_one_line,
    fetch::{FetchError, Fetcher},
    fs::Share,
    fuse::{self, Ended, Leaving, MountError, MountOptions, Mounted, Operation, UnmountError},
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

/// Unmounts a mount of ours that no agent serves any more; `None` where there is none, or none of `owner`'s.
/// Blocking.
pub fn unmount_orphan(path: &Path, lazy: bool, owner: Option<u32>) -> Option<UnmountOutcome> {
    let ours = |mount: &fuse::MountLine| {
        let owners = |uid| {
            let of = format!("user_id={uid}");
            mount.options.split(',').any(|option| option == of)
        };
        mount.mount_point == *path && mount.kind == "fuse.grid-mount" && owner.is_none_or(owners)
    };
    let orphan = fuse::mounts().ok()?.into_iter().rfind(ours)?;
    let error = fuse::unmount_at(path, lazy)
        .err()
        .map(|error| in_one_line(&error));
    Some(UnmountOutcome {
        reference: orphan.source.to_str()?.parse().ok()?,
        mount_point: orphan.mount_point,
        error,
        holds: 0,
        report: None,
    })
}

/// One mount, served.
struct Mount {
    info: MountInfo,
    /// Where an agent of many users put it.
    elsewhere: Option<Elsewhere>,
    idle_timeout: Option<Duration>,
    /// How often it was asked for.
    holds: AtomicU32,
    mounted: Arc<Mounted>,
    /// Keeps the tree's file in the cache while it is mapped.
    snapshot: Arc<Snapshot>,
    watch: Watch,
}

/// Where something is mounted, as this agent tells mount points apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    /// `None` for a user's own agent, which knows one.
    namespace: Option<NamespaceId>,
    path: PathBuf,
}

enum Slot {
    /// Somebody is mounting here.
    Pending,
    Serving(Arc<Mount>),
}

#[derive(Default)]
struct Table {
    slots: BTreeMap<Key, Slot>,
    /// Requests to mount that are being answered.
    requests: usize,
    stopping: bool,
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
            access,
            idle_timeout: Mutex::new(config.idle_timeout),
            reread: Mutex::default(),
            trees: trees::Trees::default(),
            table: Mutex::default(),
            count: watch::Sender::new(0),
            keeping: Arc::new(keeping),
        }))
    }

    /// Mounts what the request names for the caller, and returns when the mount answers.
    pub async fn mount(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        request: MountRequest,
    ) -> Result<MountInfo, AgentError> {
        let _under_way = UnderWay::begin(self)?;
        let reference: Reference = request.reference.parse()?;
        let failed = |source| AgentError::Snapshot {
            requested: request.reference.clone(),
            source,
        };
        let asking = Asking {
            access: &self.access,
            caller,
            settings: &request.store_settings,
        };
        let resolved = Resolved::new(&reference, &request.catalog, &request.user, asking)
            .await
            .map_err(failed)?;
        let place = match self.access.serves_everybody() {
            false => self.reserve(
                request_key(&request.mount_point),
                &request.mount_point,
                caller,
                &resolved,
            )?,
            true => self.reserve_as(caller, &request, &resolved).await?,
        };
        let place = match place {
            Place::Ours(reserved) => reserved,
            Place::AlreadyThere(info) => return Ok(*info),
        };
        let snapshot = resolved
            .fetch_tree(&self.cache, &self.trees)
            .await
            .map_err(failed)?;
        let (agent, caller) = (Arc::clone(self), Arc::clone(caller));
        // Mounting waits for the kernel and perhaps for fusermount3.
        let handle = tokio::runtime::Handle::current();
        let made =
            tokio::task::spawn_blocking(move || agent.make_mount(&caller, &request, snapshot, place, handle));
        match made.await {
            Ok(result) => result,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        }
    }

    /// Opens or makes the caller's directory as the caller would, before it is anybody's: a path that the
    /// caller could not use is no reason to refuse it to somebody else.
    async fn reserve_as(
        self: &Arc<Self>,
        caller: &Arc<Caller>,
        request: &MountRequest,
        resolved: &Resolved,
    ) -> Result<Place, AgentError> {
        let path = request.mount_point.as_path();
        let unseen = |source| MountPointError::AsCaller {
            path: path.to_owned(),
            source,
        };
        let view = caller.view().map_err(unseen)?;
        let of_caller = |mount: &Arc<Mount>| {
            let there = mount.elsewhere.as_ref().map(|elsewhere| elsewhere.namespace);
            mount.info.mount_point == path && there == Some(view.id()) && mount.info.owner == caller.uid()
        };
        let there = self.find(of_caller);
        if let Some((key, _)) = there {
            return self.reserve(key, path, caller, resolved);
        }
        let wanted = path.to_owned();
        let trigger = request.trigger.filter(|_| caller.uid() == 0);
        let trigger = trigger.map(|number| {
            let unusable = |source| MountPointError::Unusable {
                path: path.to_owned(),
                source,
            };
            caller.descriptor(number).map_err(unusable)
        });
        let trigger = trigger.transpose()?;
        let preparing = move || match trigger {
            Some(trigger) => Prepared::trigger(&view, &wanted, trigger),
            None => Prepared::new(&view, &wanted),
        };
        let prepared = stored::blocking(preparing).await?;
        let key = Key {
            namespace: Some(prepared.namespace()),
            path: prepared.place().to_owned(),
        };
        let mut place = self.reserve(key, path, caller, resolved);
        match &mut place {
            Ok(Place::Ours(reserved)) => reserved.prepared = Some(prepared),
            _ => put_back(prepared),
        }
        place
    }

    fn find(&self, wanted: impl Fn(&Arc<Mount>) -> bool) -> Option<(Key, Arc<Mount>)> {
        let table = self.table.lock();
        table.slots.iter().find_map(|(key, slot)| {
            let mount = slot.serving().filter(|mount| wanted(mount))?;
            Some((key.clone(), Arc::clone(mount)))
        })
    }

    fn reserve(
        self: &Arc<Self>,
        key: Key,
        path: &Path,
        caller: &Caller,
        resolved: &Resolved,
    ) -> Result<Place, AgentError> {
        let mut table = self.table.lock();
        match table.slots.get(&key) {
            Some(Slot::Pending) => Err(AgentError::Pending {
                mount_point: path.to_owned(),
            }),
            Some(Slot::Serving(mount)) => {
                let pinned = resolved.reference();
                let theirs = !self.access.serves_everybody() || mount.info.owner == caller.uid();
                if theirs && mount.info.reference == pinned && mount.info.catalog == resolved.catalog_url {
                    mount.holds.fetch_add(1, Ordering::Relaxed);
                    let info = MountInfo {
                        already_mounted: true,
                        ..mount.current_info()
                    };
                    return Ok(Place::AlreadyThere(Box::new(info)));
                }
                let offer = key.path.with_file_name(format!(
                    "{}-{}-{}",
                    pinned.name.owner, pinned.name.datastore, pinned.version
                ));
                Err(AgentError::Taken {
                    mount_point: path.to_owned(),
                    by: match self.access.may_see(caller, mount.info.owner) {
                        true => mount.info.reference.to_string(),
                        false => "another user".to_owned(),
                    },
                    offer,
                })
            }
            None => {
                table.slots.insert(key.clone(), Slot::Pending);
                self.recount(&table);
                Ok(Place::Ours(Reserved {
                    agent: Arc::clone(self),
                    key,
                    prepared: None,
                }))
            }
        }
    }

    fn make_mount(
        self: Arc<Self>,
        caller: &Caller,
        request: &MountRequest,
        snapshot: Snapshot,
        mut reserved: Reserved,
        handle: tokio::runtime::Handle,
    ) -> Result<MountInfo, AgentError> {
        let (point, target) = match reserved.prepared.take() {
            None => (MountPoint::prepare(&request.mount_point)?, None),
            Some(prepared) => {
                let (point, target) = prepared.ready();
                (point, Some(target))
            }
        };
        let snapshot = Arc::new(snapshot);
        let owner = caller.owner();
        let reference = snapshot.resolved.reference();
        let mut entry = self.keeping.begin(request, &point, &snapshot.resolved);
        let mut options = MountOptions::new(point.path(), reference.to_string(), owner);
        options.io_mode = request.io_mode;
        options.share = request.share != Share::None;
        options.open_table = entry.as_ref().and_then(Entry::open_table);
        let watch = Watch::new(&self.fetcher, owner);
        let fs = snapshot.file_system(&watch, request.share, request.prefetch, &handle);
        let mounted = match target {
            None => fuse::mount(fs, options, &handle),
            Some(target) => {
                let attach = |mount: std::os::fd::BorrowedFd<'_>| Target::attach(&target, mount);
                fuse::mount_attached_by(fs, options, &handle, attach)
            }
        };
        let mounted = mounted.map_err(|source| AgentError::Mount {
            requested: request.reference.clone(),
            mount_point: point.path().to_owned(),
            source,
        })?;
        if let Some(entry) = &mut entry {
            let kept = request.store_settings.with_lent(&snapshot.resolved.lent);
            entry.made(&mounted, &kept);
        }
        tracing::info!(%reference, mount_point = %point.path().display(), uid = owner.uid, "mounted");
        let since = entry
            .as_ref()
            .map_or_else(jiff::Timestamp::now, |entry| entry.remembered.since);
        let mount = self.mount_of(request, since, mounted, (snapshot, watch), &point);
        let info = mount.current_info();
        reserved.serve(mount, point, entry, &handle);
        Ok(info)
    }

    fn mount_of(
        &self,
        request: &MountRequest,
        since: jiff::Timestamp,
        mounted: Mounted,
        watched: (Arc<Snapshot>, Watch),
        point: &MountPoint,
    ) -> Arc<Mount> {
        let idle_timeout = match request.idle_timeout {
            None => *self.idle_timeout.lock(),
            Some(seconds) => Some(Duration::from_secs(seconds)).filter(|time| !time.is_zero()),
        };
        Mount::new(request, since, mounted, watched, point, idle_timeout)
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
        let caller = match &remembered.elsewhere {
            None => Caller::this_process(),
            Some(elsewhere) => Caller::remembered(elsewhere.identity.clone()),
        };
        let asking = Asking {
            access: &self.access,
            caller: &caller,
            settings: &request.store_settings,
        };
        let store = remembered.tree_store.as_ref();
        let resolved = Resolved::again(remembered.record.clone(), &request.catalog, store, asking).await?;
        let snapshot =
            tokio::time::timeout(RESUME_DEADLINE, resolved.fetch_tree(&self.cache, &self.trees)).await??;
        let snapshot = Arc::new(snapshot);
        let agent = Arc::clone(self);
        let handle = tokio::runtime::Handle::current();
        let resuming = move || {
            let remembered = &entry.remembered;
            let point = MountPoint::inherited(remembered.mount_point.clone(), remembered.created.clone())
                .at(remembered.elsewhere.clone());
            let known = (state.handshake.clone(), state.device, state.way);
            let watch = Watch::new(&agent.fetcher, state.owner);
            let fs = snapshot.file_system(&watch, request.share, request.prefetch, &handle);
            let mounted = match fuse::resume(fs, state.options(), held.descriptor, known, &handle) {
                Ok(mounted) => mounted,
                Err(error) => {
                    // Whoever mounts it again will know what was made for it.
                    point.leave();
                    return Err(error);
                }
            };
            let since = remembered.since;
            let mount = agent.mount_of(&request, since, mounted, (snapshot, watch), &point);
            tracing::info!(reference = %mount.info.reference, mount_point = %point.path().display(), "resumed");
            let reserved = Reserved {
                agent,
                key: match point.elsewhere() {
                    None => Key {
                        namespace: None,
                        path: point.path().to_owned(),
                    },
                    Some(elsewhere) => Key {
                        namespace: Some(elsewhere.namespace),
                        path: elsewhere.place.clone(),
                    },
                },
                prepared: None,
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
        let caller = match remembered.elsewhere {
            None => Caller::this_process(),
            Some(elsewhere) => Caller::remembered(elsewhere.identity),
        };
        match tokio::time::timeout(AGAIN_DEADLINE, self.mount(&caller, request)).await {
            Ok(Ok(_)) => {}
            Ok(Err(error)) => {
                let error = in_one_line(&error);
                tracing::warn!(mount_point = shown, error, "not mounted again");
            }
            Err(_) => tracing::warn!(mount_point = shown, "not mounted again: it took too long"),
        }
    }

    /// Whether another mount's path leads through what was created for this one: in another namespace it
    /// may be the same directory, and removing that would unmount what lies on it there.
    fn lies_below_another(&self, key: &Key, created: &[PathBuf]) -> bool {
        let Some(outermost) = created.first() else {
            return false;
        };
        let table = self.table.lock();
        let mut others = table.slots.keys().filter(|other| *other != key);
        others.any(|other| other.namespace != key.namespace && other.path.starts_with(outermost))
    }

    fn recount(&self, table: &Table) {
        self.count.send_replace(table.slots.len() + table.requests);
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

    pub async fn unmount(
        &self,
        caller: &Caller,
        request: UnmountRequest,
    ) -> Result<Vec<UnmountOutcome>, AgentError> {
        let chosen = match (self.choose(caller, &request.target), &request.target) {
            (Err(error @ AgentError::NotMounted { .. }), UnmountTarget::MountPoint(path)) => {
                let owner = Some(caller.uid()).filter(|_| !self.access.is_administrator(caller));
                let (path, lazy) = (path.clone(), request.lazy);
                return stored::blocking(move || unmount_orphan(&path, lazy, owner))
                    .await
                    .map(|outcome| vec![outcome])
                    .ok_or(error);
            }
            (chosen, _) => chosen?,
        };
        let all = matches!(request.target, UnmountTarget::All);
        let mut outcomes = Vec::with_capacity(chosen.len());
        for mount in chosen {
            let left = if all { 0 } else { mount.let_go() };
            outcomes.push(match left {
                0 => self.unmount_one(&mount, request.lazy).await,
                holds => UnmountOutcome {
                    holds,
                    ..mount.outcome(None)
                },
            });
        }
        Ok(outcomes)
    }

    async fn unmount_one(&self, mount: &Arc<Mount>, lazy: bool) -> UnmountOutcome {
        let leaving = Arc::clone(mount);
        let error = match tokio::task::spawn_blocking(move || leaving.leave(lazy)).await {
            Ok(Ok(())) => {
                // A lazily detached session ends when its last user goes: nothing to wait for.
                if lazy {
                    None
                } else {
                    self.wait_until_gone(mount).await
                }
            }
            Ok(Err(error)) => Some(in_one_line(&*error)),
            Err(error) => Some(error.to_string()),
        };
        mount.outcome(error)
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

    fn choose(&self, caller: &Caller, target: &UnmountTarget) -> Result<Vec<Arc<Mount>>, AgentError> {
        let mounts = self.seen_by(caller);
        let chosen: Vec<Arc<Mount>> = match target {
            UnmountTarget::All => return Ok(mounts),
            UnmountTarget::MountPoint(path) => {
                let mut there: Vec<_> = mounts
                    .iter()
                    .filter(|mount| mount.info.mount_point == *path)
                    .cloned()
                    .collect();
                // A path means what the caller sees, where that is one of them.
                if there.len() > 1
                    && let Ok(view) = caller.view()
                {
                    let seen = |mount: &Arc<Mount>| {
                        let elsewhere = mount.elsewhere.as_ref();
                        elsewhere.is_some_and(|elsewhere| elsewhere.namespace == view.id())
                    };
                    if there.iter().any(seen) {
                        there.retain(seen);
                    }
                }
                there
            }
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
        (snapshot, watch): (Arc<Snapshot>, Watch),
        point: &MountPoint,
        idle_timeout: Option<Duration>,
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
            user: request.user.clone(),
            requests: BTreeMap::new(),
            owner: watch.owner().uid,
            share: request.share,
            idle_timeout: idle_timeout.map(|time| time.as_secs()),
            holds: 1,
            traffic: Traffic::default(),
            cached_percent: None,
            already_mounted: false,
            credentials: None,
        };
        Arc::new(Self {
            info,
            elsewhere: point.elsewhere().cloned(),
            idle_timeout,
            holds: AtomicU32::new(1),
            mounted: Arc::new(mounted),
            snapshot,
            watch,
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
            holds: self.holds.load(Ordering::Relaxed),
            traffic: self.watch.traffic(&self.mounted),
            credentials: self.snapshot.resolved.loans.first().map(|loan| loan.state()),
            ..self.info.clone()
        }
    }

    /// One who asked for it wants it no more. For how many others it stays: for none, unless it goes by
    /// itself when they forget it.
    fn let_go(&self) -> u32 {
        if self.idle_timeout.is_none() {
            return 0;
        }
        let fewer = |holds: u32| holds.checked_sub(1).filter(|left| *left > 0);
        match self
            .holds
            .fetch_update(Ordering::Relaxed, Ordering::Relaxed, fewer)
        {
            Ok(before) => before - 1,
            Err(_) => 0,
        }
    }

    fn outcome(&self, error: Option<String>) -> UnmountOutcome {
        UnmountOutcome {
            reference: self.info.reference.clone(),
            mount_point: self.info.mount_point.clone(),
            error,
            holds: 0,
            report: Some(self.report()),
        }
    }

    /// Blocking.
    fn leave(&self, lazy: bool) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
        let Some(elsewhere) = &self.elsewhere else {
            return Ok(self.mounted.unmount(lazy)?);
        };
        let leaving = match lazy {
            true => Leaving::Detached,
            false => Leaving::Unused,
        };
        match elsewhere.unmount(self.mounted.device(), leaving) {
            Ok(_) => Ok(()),
            Err(mount_point::LeaveError::Busy) => Err(Box::new(UnmountError::Busy {
                path: self.info.mount_point.clone(),
                holders: self.mounted.holders(),
            })),
            Err(error) => Err(Box::new(error)),
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
    key: Key,
    /// The caller's directory, where an agent of many users opened it.
    prepared: Option<Prepared>,
}

/// The same directory by another name is found by its canonical path.
fn request_key(path: &Path) -> Key {
    Key {
        namespace: None,
        path: std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()),
    }
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
        let served = Arc::clone(&mount);
        let lease = lease::hold(
            &mount.snapshot.resolved.catalog,
            mount.info.reference.clone(),
            mount.info.since,
            runtime,
        );
        if let Some(timeout) = mount.idle_timeout {
            runtime.spawn(idle::watch(Arc::clone(&mount), timeout));
        }
        {
            let mut table = self.agent.table.lock();
            table.slots.insert(self.key.clone(), Slot::Serving(mount));
            self.agent.recount(&table);
        }
        runtime.spawn(async move {
            let shown = point.path().display();
            match served.mounted.wait().await {
                Ended::Failed(error) => tracing::error!(mount_point = %shown, error, "the session failed"),
                _ => tracing::info!(mount_point = %shown, "unmounted"),
            }
            served.log_report();
            drop(served);
            lease.release().await;
            let shared = self.agent.lies_below_another(&self.key, point.created());
            // Asks the keeper, and the caller's file system: both take a moment.
            let _ = tokio::task::spawn_blocking(move || {
                if shared {
                    point.leave();
                }
                drop(entry);
            })
            .await;
            drop(self);
        });
    }
}

/// Removes what was made, off the runtime's threads.
fn put_back(prepared: Prepared) {
    if let Ok(runtime) = tokio::runtime::Handle::try_current() {
        runtime.spawn_blocking(move || drop(prepared));
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        if let Some(prepared) = self.prepared.take() {
            put_back(prepared);
        }
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
