//! Unmounting: which mounts are meant, whose they are, and when they are gone.

use std::{path::Path, sync::Arc, time::Duration};

use super::{
    Agent, AgentError,
    access::Caller,
    control::{UnmountOutcome, UnmountRequest, UnmountTarget},
    mount::Mount,
    stored,
    table::Slot,
};
use crate::{
    causes::in_one_line,
    fuse,
    reference::{QualifiedName, Reference},
};

/// How long an unmounted session may take to end before the caller is told that it has not.
const SESSION_END_DEADLINE: Duration = Duration::from_secs(20);

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

impl Agent {
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

    pub(super) async fn unmount_one(&self, mount: &Arc<Mount>, lazy: bool) -> UnmountOutcome {
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

    pub(super) fn choose(
        &self,
        caller: &Caller,
        target: &UnmountTarget,
    ) -> Result<Vec<Arc<Mount>>, AgentError> {
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
}
