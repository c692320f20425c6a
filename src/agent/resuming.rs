//! Going on with the mounts of the agents before this one.

use std::{collections::BTreeMap, sync::Arc, time::Duration};

use super::{
    Agent,
    access::Caller,
    keeping::Entry,
    mount_point::MountPoint,
    report::Watch,
    snapshot::{Asking, Resolved},
    table::{Key, Reserved},
};
use crate::{causes::in_one_line, fuse, keeper::Held, origin::StoreSettings};

/// Readers wait while a mount is resumed: its tree is in the cache, or has to come at once.
const RESUME_DEADLINE: Duration = Duration::from_secs(15);
/// Whoever started this agent waits while dead mounts are mounted again.
const AGAIN_DEADLINE: Duration = Duration::from_secs(8);

impl Agent {
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
            let watch = Watch::new(&agent.fetcher, state.owner, false);
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
}
