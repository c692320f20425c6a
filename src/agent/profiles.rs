//! Access profiles: one mount notes down in which order blocks were first wanted, the next one fetches them in
//! that order.
//!
//! A profile lies beside the version's tree in the catalog's store, put there with the keys of whoever owns
//! the version, and in the cache directory of the agent that recorded it. It is advice: one that cannot be had
//! or read costs nothing but its benefit.

use std::{
    fs, io,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use tokio_util::task::AbortOnDropHandle;

use super::{
    Agent, AgentError,
    access::Caller,
    control::{ProfileOutcome, ProfileRequest, UnmountTarget},
    mount::Mount,
    snapshot::Snapshot,
    stored::blocking,
};
use crate::{
    causes::in_one_line,
    digest::Digest,
    fs::fetched::bring,
    profile::{MOST_BYTES, Profile},
};

/// Beside the tree's own key.
const SUFFIX: &str = ".profile";
const DIRECTORY: &str = "profiles";
/// In the cache directory; the oldest goes first.
const MOST_KEPT: usize = 256;
/// Of the catalog's store, which an unmount waits for.
const STORE_PATIENCE: Duration = Duration::from_secs(10);

fn key(snapshot: &Snapshot) -> String {
    format!("{}{SUFFIX}", snapshot.resolved.record.tree.rows.key)
}

/// One file for each version and set of rights: what users with other rights read is not told to each other.
fn local(cache_dir: &Path, snapshot: &Snapshot) -> PathBuf {
    let tree = snapshot.resolved.record.tree.rows.digest;
    let name = Digest::of(format!("{}\n{tree}", snapshot.resolved.domain).as_bytes());
    cache_dir.join(DIRECTORY).join(name.to_string())
}

/// What an earlier mount recorded, if it can be had.
async fn find(snapshot: &Snapshot, cache_dir: &Path) -> Option<Profile> {
    let tree = snapshot.resolved.record.tree.rows.digest;
    let path = local(cache_dir, snapshot);
    let kept = blocking(move || fs::read(path).ok()).await;
    if let Some(profile) = kept.and_then(|bytes| Profile::decode(&bytes, &tree).ok()) {
        return Some(profile);
    }
    let key = key(snapshot);
    let asking = snapshot.resolved.tree_store().get(&key, MOST_BYTES);
    // Most versions have none, and nobody is told of what does not answer.
    let (bytes, _) = tokio::time::timeout(STORE_PATIENCE, asking).await.ok()?.ok()?;
    match Profile::decode(&bytes, &tree) {
        Ok(profile) => Some(profile),
        Err(error) => {
            tracing::warn!(key, %error, "an access profile is not followed");
            None
        }
    }
}

/// Fetches in the order of the version's profile, if it has one, until the handle is dropped.
pub(super) fn follow(
    mount: &Mount,
    cache_dir: &Path,
    runtime: &tokio::runtime::Handle,
) -> AbortOnDropHandle<()> {
    let (snapshot, fetcher) = (Arc::clone(&mount.snapshot), Arc::clone(mount.watch.fetcher()));
    let cache_dir = cache_dir.to_owned();
    AbortOnDropHandle::new(runtime.spawn(async move {
        let Some(profile) = find(&snapshot, &cache_dir)
            .await
            .filter(|found| !found.is_empty())
        else {
            return;
        };
        let reference = snapshot.resolved.reference();
        tracing::info!(%reference, blocks = profile.blocks(), "following an access profile");
        bring(&fetcher, profile.ranges(), |number| {
            snapshot.object(&fetcher, number)
        })
        .await;
        tracing::info!(%reference, "followed the access profile to its end");
    }))
}

impl Mount {
    /// Keeps what this mount recorded so far; `None` if it does not record.
    pub(super) async fn keep_profile(&self, cache_dir: &Path) -> Option<ProfileOutcome> {
        let profile = self.watch.recorder()?.profile();
        let resolved = &self.snapshot.resolved;
        let rows = &resolved.record.tree.rows;
        let mut outcome = ProfileOutcome {
            reference: resolved.reference(),
            mount_point: self.info.mount_point.clone(),
            blocks: profile.blocks(),
            bytes: 0,
            kept_at: None,
            shared_at: None,
            error: None,
        };
        let (digest, size) = (rows.digest, rows.wire_size);
        let bytes = match blocking(move || profile.encode(&digest, size)).await {
            Ok(bytes) => Bytes::from(bytes),
            Err(error) => {
                outcome.error = Some(in_one_line(&error));
                return Some(outcome);
            }
        };
        outcome.bytes = bytes.len() as u64;
        let path = local(cache_dir, &self.snapshot);
        let (written, content) = (path.clone(), bytes.clone());
        match blocking(move || keep(&written, &content)).await {
            Ok(()) => outcome.kept_at = Some(path),
            Err(error) => outcome.error = Some(format!("{}: {error}", path.display())),
        }
        // Who may publish a version may say how it is read.
        if self.info.user == outcome.reference.name.owner {
            let (store, key) = (resolved.tree_store(), key(&self.snapshot));
            let putting = store.put(&key, bytes);
            match tokio::time::timeout(STORE_PATIENCE, putting).await {
                Ok(Ok(())) => outcome.shared_at = Some(format!("{}/{key}", store.url())),
                Ok(Err(error)) => outcome.error = Some(in_one_line(&error)),
                Err(_) => {
                    outcome.error = Some(format!(
                        "{} did not take the profile within {} s",
                        store.url(),
                        STORE_PATIENCE.as_secs()
                    ));
                }
            }
        }
        Some(outcome)
    }
}

/// Whole or not at all; then the oldest ones beyond [`MOST_KEPT`] go.
fn keep(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let dir = path.parent().unwrap_or(path);
    fs::create_dir_all(dir)?;
    let mut new = tempfile::NamedTempFile::new_in(dir)?;
    io::Write::write_all(&mut new, bytes)?;
    new.persist(path).map_err(|error| error.error)?;
    let mut all: Vec<_> = fs::read_dir(dir)?
        .filter_map(|entry| {
            let entry = entry.ok()?;
            Some((entry.metadata().ok()?.modified().ok()?, entry.path()))
        })
        .collect();
    all.sort_unstable();
    for (_, old) in all.iter().rev().skip(MOST_KEPT) {
        fs::remove_file(old)?;
    }
    Ok(())
}

impl Agent {
    /// Keeps what mounts have recorded so far; they go on recording.
    pub async fn keep_profiles(
        &self,
        caller: &Caller,
        request: &ProfileRequest,
    ) -> Result<Vec<ProfileOutcome>, AgentError> {
        let mut outcomes = Vec::new();
        for mount in self.choose(caller, &request.target)? {
            outcomes.extend(mount.keep_profile(&self.cache_config.dir).await);
        }
        match outcomes.is_empty() && request.target != UnmountTarget::All {
            true => Err(AgentError::NotRecorded),
            false => Ok(outcomes),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_newest_are_kept() {
        let dir = tempfile::tempdir().unwrap();
        for number in 0..MOST_KEPT + 3 {
            keep(&dir.path().join(format!("{number:04}")), b"x").unwrap();
        }
        let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(Result::unwrap).collect();
        assert_eq!(left.len(), MOST_KEPT);
        assert!(dir.path().join(format!("{:04}", MOST_KEPT + 2)).exists());
    }
}
