//! The mount table: what is mounted where, what is being mounted, and what holds the agent while it works.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, atomic::Ordering},
};

use super::{
    Agent, AgentError,
    access::Caller,
    as_caller::NamespaceId,
    control::MountInfo,
    idle,
    keeping::Entry,
    lease,
    mount::Mount,
    mount_point::{MountPoint, Prepared},
    profiles,
    snapshot::Resolved,
};
use crate::fuse::Ended;

/// Where something is mounted, as this agent tells mount points apart.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Key {
    /// `None` for a user's own agent, which knows one.
    pub(super) namespace: Option<NamespaceId>,
    pub(super) path: PathBuf,
}

pub(super) enum Slot {
    /// Somebody is mounting here.
    Pending,
    Serving(Arc<Mount>),
}

#[derive(Default)]
pub(super) struct Table {
    pub(super) slots: BTreeMap<Key, Slot>,
    /// Requests to mount that are being answered.
    pub(super) requests: usize,
    pub(super) stopping: bool,
}

impl Slot {
    pub(super) fn serving(&self) -> Option<&Arc<Mount>> {
        match self {
            Self::Pending => None,
            Self::Serving(mount) => Some(mount),
        }
    }
}

pub(super) enum Place {
    Ours(Reserved),
    AlreadyThere(Box<MountInfo>),
}

/// A place in the table, given back unless a mount takes it.
pub(super) struct Reserved {
    pub(super) agent: Arc<Agent>,
    pub(super) key: Key,
    /// The caller's directory, where an agent of many users opened it.
    pub(super) prepared: Option<Prepared>,
}

/// The same directory by another name is found by its canonical path.
pub(super) fn request_key(path: &Path) -> Key {
    Key {
        namespace: None,
        path: std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned()),
    }
}

impl Reserved {
    /// Enters the mount into the table, and takes it out when its session ends, however it ends.
    pub(super) fn serve(
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
        let cache_dir = self.agent.cache_config.dir.clone();
        // A recording mount is to show what its readers want, not what others wanted.
        let follows = mount.prefetches && mount.watch.recorder().is_none();
        let following = follows.then(|| profiles::follow(&mount, &cache_dir, runtime));
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
            drop(following);
            if let Some(kept) = served.keep_profile(&cache_dir).await {
                tracing::info!(reference = %kept.reference, blocks = kept.blocks, bytes = kept.bytes,
                    shared = kept.shared_at, error = kept.error, "an access profile is kept");
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
pub(super) fn put_back(prepared: Prepared) {
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
pub(super) struct UnderWay {
    pub(super) agent: Arc<Agent>,
}

impl UnderWay {
    pub(super) fn begin(agent: &Arc<Agent>) -> Result<Self, AgentError> {
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

impl Agent {
    pub(super) fn find(&self, wanted: impl Fn(&Arc<Mount>) -> bool) -> Option<(Key, Arc<Mount>)> {
        let table = self.table.lock();
        table.slots.iter().find_map(|(key, slot)| {
            let mount = slot.serving().filter(|mount| wanted(mount))?;
            Some((key.clone(), Arc::clone(mount)))
        })
    }

    pub(super) fn reserve(
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

    pub(super) fn recount(&self, table: &Table) {
        self.count.send_replace(table.slots.len() + table.requests);
    }
}
