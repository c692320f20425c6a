//! One mount, served: what it is, what it does, who still wants it.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

use super::{
    control::{MountInfo, MountRequest, PrefetchPolicy, Traffic, UnmountOutcome},
    mount_point::{self, Elsewhere, MountPoint},
    report::Watch,
    snapshot::Snapshot,
};
use crate::{
    fuse::{Leaving, Mounted, Operation, UnmountError},
    reference::{QualifiedName, Reference},
};

/// One mount, served.
pub(super) struct Mount {
    pub(super) info: MountInfo,
    /// Where an agent of many users put it.
    pub(super) elsewhere: Option<Elsewhere>,
    pub(super) idle_timeout: Option<Duration>,
    /// How often it was asked for.
    pub(super) holds: AtomicU32,
    pub(super) mounted: Arc<Mounted>,
    /// Keeps the tree's file in the cache while it is mapped.
    pub(super) snapshot: Arc<Snapshot>,
    pub(super) watch: Watch,
    /// Whether anything is fetched before it is asked for.
    pub(super) prefetches: bool,
}

impl Mount {
    pub(super) fn new(
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
            prefetches: request.prefetch != PrefetchPolicy::None,
            watch,
        })
    }

    pub(super) fn current_info(&self) -> MountInfo {
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
    pub(super) fn let_go(&self) -> u32 {
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

    pub(super) fn outcome(&self, error: Option<String>) -> UnmountOutcome {
        UnmountOutcome {
            reference: self.info.reference.clone(),
            mount_point: self.info.mount_point.clone(),
            error,
            holds: 0,
            report: Some(self.report()),
        }
    }

    /// Blocking.
    pub(super) fn leave(&self, lazy: bool) -> Result<(), Box<dyn std::error::Error + Send + Sync>> {
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

    pub(super) fn is_of(&self, name: &QualifiedName, reference: &Reference) -> bool {
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
