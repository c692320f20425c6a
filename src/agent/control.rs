//! What travels over the control socket: HTTP/1.1, JSON bodies.
//!
//! docs/agent.md has the requests and their answers, for whoever asks with curl. Shapes only grow: fields
//! are added, never renamed.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use crate::{fs::Share, fuse::IoModeWish, prefetch_policy::PrefetchPolicy};
use crate::{
    origin::{LoanState, StoreSettings, StoreUrl},
    reference::{PinnedReference, UserName},
    tree::Totals,
};

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct AgentInfo {
    /// The program's version.
    pub version: String,
    pub pid: u32,
    pub cache_dir: PathBuf,
    /// Why nothing is being cached, when that is so.
    pub cache_degraded: Option<String>,
    /// Bytes that the cache holds on disk, and may hold.
    pub cache_used: u64,
    pub cache_limit: u64,
    /// Bytes that readers got from the cache, and that came from origins, since the agent started.
    pub bytes_from_cache: u64,
    pub bytes_from_origin: u64,
    /// Requests to origins.
    pub origin_requests: u64,
    pub retries: u64,
    pub last_error: Option<String>,
}

/// The caller's part of a mount: what concerns the caller (catalog, identity, credentials) travels
/// with the request, what concerns the agent (cache, limits) does not.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountRequest {
    pub reference: String,
    pub mount_point: PathBuf,
    pub catalog: StoreUrl,
    pub user: UserName,
    /// Object-store settings by their ecosystem names; secrets among them.
    pub store_settings: StoreSettings,
    pub io_mode: IoModeWish,
    #[serde(default)]
    pub prefetch: PrefetchPolicy,
    /// Who else may read it.
    #[serde(default)]
    pub share: Share,
    /// Unmount it when nobody used it for so many seconds; without it, the agent's own default. 0: never.
    #[serde(default)]
    pub idle_timeout: Option<u64>,
    /// A descriptor of the caller's, who must be root: the mount point, opened where nobody else may walk
    /// because an automount waits for this mount.
    #[serde(default)]
    pub trigger: Option<u32>,
    /// Note down in which order blocks are first wanted, and keep that at unmount.
    #[serde(default)]
    pub record_profile: bool,
}

// A request carries credentials: no derived Debug.
impl std::fmt::Debug for MountRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("MountRequest")
            .field("reference", &self.reference)
            .field("mount_point", &self.mount_point)
            .field("catalog", &self.catalog)
            .field("user", &self.user)
            .field("store_settings", &self.store_settings)
            .finish_non_exhaustive()
    }
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MountInfo {
    /// What the reference resolved to.
    pub reference: PinnedReference,
    /// As it was typed.
    pub requested: String,
    pub mount_point: PathBuf,
    pub catalog: StoreUrl,
    /// Where the bytes come from.
    pub origin: StoreUrl,
    pub totals: Totals,
    pub since: jiff::Timestamp,
    /// `passthrough`, `no-open` or `cached`.
    pub io_mode: String,
    /// Why that mode.
    pub io_mode_reason: String,
    /// Who asked, as the catalog knows them.
    pub user: UserName,
    /// Requests that the kernel has sent, by operation; operations never asked for are left out.
    pub requests: BTreeMap<String, u64>,
    /// The uid of the user whose mount it is.
    #[serde(default)]
    pub owner: u32,
    #[serde(default)]
    pub share: Share,
    /// Seconds without use after which it goes.
    #[serde(default)]
    pub idle_timeout: Option<u64>,
    /// How often it was asked for: as often it has to be unmounted, if it goes by itself when unused.
    #[serde(default)]
    pub holds: u32,
    pub traffic: Traffic,
    /// How much of the version's objects the cache holds, where that was asked for; an estimate for large
    /// versions.
    pub cached_percent: Option<f64>,
    /// The mount was already there and is the one asked for.
    #[serde(default)]
    pub already_mounted: bool,
    /// The keys that are lent to read it, where a control plane lends them.
    #[serde(default)]
    pub credentials: Option<LoanState>,
}

/// What a mount has done since this agent began to serve it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub struct Traffic {
    /// `None` in the I/O mode `no-open`, where the kernel does not tell.
    pub open_files: Option<u64>,
    /// Sent to the kernel; what it reads by itself (page cache, passthrough) is not among them.
    pub bytes_read: u64,
    pub bytes_from_cache: u64,
    /// Fetched for this mount, ahead of its readers too.
    pub bytes_from_origin: u64,
    /// Reads that were answered at once, of all that reached the agent.
    pub hit_ratio: Option<f64>,
    pub origin_requests: u64,
    pub retries: u64,
    /// All readers together.
    pub waited_seconds: f64,
    /// Requests that ended with an error.
    pub failures: u64,
    pub last_error: Option<String>,
}

/// What a mount has done, at its end.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct MountReport {
    /// For how long it was there.
    pub seconds: f64,
    /// As in [`Traffic`].
    pub bytes_read: u64,
    pub bytes_from_cache: u64,
    pub bytes_from_origin: u64,
    /// Of those, without what was fetched ahead and then not read.
    pub bytes_used_of_fetched: u64,
    pub hit_ratio: Option<f64>,
    pub origin_requests: u64,
    pub retries: u64,
    pub failures: u64,
    pub waited_seconds: f64,
    /// The reads that took longest, longest first.
    pub slowest: Vec<SlowRequest>,
    /// Bytes of different blocks that were read; an estimate for large amounts.
    pub distinct_bytes: u64,
    /// A cache of this size holds nearly all of what was read again; `None` where nothing was.
    pub suggested_cache_bytes: Option<u64>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct SlowRequest {
    pub path: String,
    pub offset: u64,
    pub length: u64,
    pub seconds: f64,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnmountRequest {
    pub target: UnmountTarget,
    /// Detach now, finish when the last user goes.
    pub lazy: bool,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum UnmountTarget {
    All,
    MountPoint(PathBuf),
    /// Every mount of this reference; without a version, of every version.
    Reference {
        reference: String,
        user: UserName,
    },
}

/// Keep what these mounts have recorded so far.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ProfileRequest {
    pub target: UnmountTarget,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ProfileOutcome {
    pub reference: PinnedReference,
    pub mount_point: PathBuf,
    /// Wanted so far.
    pub blocks: u64,
    /// Of the profile.
    pub bytes: u64,
    /// On this host.
    pub kept_at: Option<PathBuf>,
    /// Beside the version, for everybody who may read it; put there for the version's owner only.
    pub shared_at: Option<String>,
    /// What did not work.
    pub error: Option<String>,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct UnmountOutcome {
    pub reference: PinnedReference,
    pub mount_point: PathBuf,
    /// Why it is still mounted, when it is.
    pub error: Option<String>,
    /// For how many others it stays mounted.
    #[serde(default)]
    pub holds: u32,
    /// What it did; `None` where no agent served it any more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub report: Option<MountReport>,
}

/// The settings as they were read again.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadOutcome {
    /// How many are listed now; 0 for a user's own agent, which has no lists.
    pub catalogs: usize,
    pub origins: usize,
    pub endpoints: usize,
    /// Seconds, of mounts to come that say nothing else.
    pub idle_timeout: Option<u64>,
    /// Settings that changed, but count only when the agent starts again.
    pub at_next_start: Vec<String>,
}

/// A version, and the caller's part of asking for it.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VersionRequest {
    pub reference: String,
    pub catalog: StoreUrl,
    pub user: UserName,
    /// Object-store settings by their ecosystem names; secrets among them.
    pub store_settings: StoreSettings,
}

// As with `MountRequest`.
impl std::fmt::Debug for VersionRequest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("VersionRequest")
            .field("reference", &self.reference)
            .field("catalog", &self.catalog)
            .field("user", &self.user)
            .field("store_settings", &self.store_settings)
            .finish()
    }
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CacheInfo {
    pub dir: PathBuf,
    pub used: u64,
    pub limit: u64,
    /// Free space that is left to others.
    pub min_free: u64,
    pub objects: u64,
    /// Extents, sealed objects and trees: what is evicted at once.
    pub units: u64,
    pub hits: u64,
    pub misses: u64,
    pub evictions: u64,
    pub fill_errors: u64,
    /// Blocks and sidecars found damaged since the agent started.
    pub damaged: u64,
    /// What earlier runs left has been counted; before, `used` is an estimate.
    pub scanned: bool,
    /// Why nothing is being cached, when that is so.
    pub degraded: Option<String>,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EvictRequest {
    /// Everything, where no version is named.
    pub version: Option<VersionRequest>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct EvictOutcome {
    /// What the reference resolved to.
    pub reference: Option<PinnedReference>,
    pub objects: u64,
    /// What the cache takes less than before.
    pub freed: u64,
}

#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WarmRequest {
    pub version: VersionRequest,
    /// Globs over paths; everything, where there is none.
    pub include: Vec<String>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct WarmProgress {
    /// What the reference resolved to, once that is known.
    pub reference: Option<PinnedReference>,
    pub files: u64,
    pub bytes_total: u64,
    /// In the cache now, of those.
    pub bytes: u64,
    /// Of `bytes`, what was there before.
    pub bytes_before: u64,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct VerifyProgress {
    pub objects: u64,
    pub blocks: u64,
    /// Blocks that were not what had been stored; they are absent now.
    pub damaged: u64,
}

/// One line of a long answer; the last one is `Done` or `Failed`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Line<T> {
    Progress(T),
    Done(T),
    Failed(Problem),
}

/// An error as it crosses the socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What failed, why, and what to do.
    pub message: String,
}
