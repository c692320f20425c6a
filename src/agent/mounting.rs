//! From a request to a mount that answers: the reference resolved as the caller, the place reserved, the tree
//! there, the kernel's mount made and attached.

use std::{sync::Arc, time::Duration};

use super::{
    Agent, AgentError,
    access::Caller,
    control::{IoModeWish, MountInfo, MountRequest},
    keeping::Entry,
    mount::Mount,
    mount_point::{MountPoint, MountPointError, Prepared, Target},
    report::Watch,
    snapshot::{Asking, Resolved, Snapshot},
    stored,
    table::{Key, Place, Reserved, UnderWay, put_back, request_key},
};
use crate::{
    fs::Share,
    fuse::{self, MountOptions, Mounted},
    reference::Reference,
};

impl Agent {
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
        options.io_mode = match request.record_profile {
            // What the kernel reads without asking cannot be recorded.
            true => IoModeWish::NoOpen,
            false => request.io_mode,
        };
        options.share = request.share != Share::None;
        options.open_table = entry.as_ref().and_then(Entry::open_table);
        let watch = Watch::new(&self.fetcher, owner, request.record_profile);
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

    pub(super) fn mount_of(
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
}
