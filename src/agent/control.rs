//! What travels over the control socket: HTTP/1.1, JSON bodies.
//!
//! | request | body | answer |
//! | --- | --- | --- |
//! | `GET /v1/agent` | | [`AgentInfo`] |
//! | `GET /v1/mounts` | | `[MountInfo]` |
//! | `POST /v1/mounts` | [`MountRequest`] | [`MountInfo`], once the mount answers |
//! | `POST /v1/unmount` | [`UnmountRequest`] | `[UnmountOutcome]` |
//!
//! An error is a 4xx or 5xx with a [`Problem`]. Shapes only grow: fields are added, never renamed.

use std::{collections::BTreeMap, path::PathBuf};

use serde::{Deserialize, Serialize};

pub use crate::{fs::prefetch::PrefetchPolicy, fuse::IoModeWish};
use crate::{
    origin::{StoreSettings, StoreUrl},
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

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
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
    /// Requests that the kernel has sent, by operation; operations never asked for are left out.
    pub requests: BTreeMap<String, u64>,
    /// The mount was already there and is the one asked for.
    #[serde(default)]
    pub already_mounted: bool,
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

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct UnmountOutcome {
    pub reference: PinnedReference,
    pub mount_point: PathBuf,
    /// Why it is still mounted, when it is.
    pub error: Option<String>,
}

/// An error as it crosses the socket.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What failed, why, and what to do.
    pub message: String,
}
