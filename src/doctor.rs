//! What on this host is in the way of mounts, or makes them slow: what it costs, and how to mend it.
//!
//! Owns the checks, and the mending of what is safe to mend. Returns findings: whoever asks prints them.
//! Every wait has a deadline, since what is broken may not answer.

mod disk;
mod host;
mod mounted;
mod stores;

use std::path::PathBuf;

use serde::Serialize;

use crate::{
    origin::{LoanState, StoreSettings, StoreUrl},
    reference::UserName,
};

/// How bad it is, the best first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Verdict {
    Good,
    /// Something less than it could be, which may be as it is meant to be.
    Note,
    /// Works, but badly, or not for everybody.
    Warning,
    /// Does not work.
    Bad,
}

/// What one check found.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// The check's name, for machines: it does not change.
    pub check: &'static str,
    pub verdict: Verdict,
    pub found: String,
    /// What that costs.
    pub costs: Option<String>,
    /// How to mend it.
    pub mend: Option<String>,
    /// `--fix` mends it, or has just mended it.
    pub fix: Fix,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Fix {
    /// Not by this program.
    No,
    Possible,
    Done,
    /// Tried, in vain: what was found says why.
    Failed,
}

impl Finding {
    fn new(check: &'static str, verdict: Verdict, found: impl Into<String>) -> Self {
        Self {
            check,
            verdict,
            found: found.into(),
            costs: None,
            mend: None,
            fix: Fix::No,
        }
    }

    fn good(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Verdict::Good, found)
    }

    fn costs(mut self, costs: impl Into<String>) -> Self {
        self.costs = Some(costs.into());
        self
    }

    fn mend(mut self, mend: impl Into<String>) -> Self {
        self.mend = Some(mend.into());
        self
    }

    /// Mends it if that is wanted, else says that it could be.
    fn fixed_by(mut self, wanted: bool, work: impl FnOnce() -> std::io::Result<()>) -> Self {
        self.fix = match wanted {
            false => Fix::Possible,
            true => match work() {
                Ok(()) => Fix::Done,
                Err(error) => {
                    self.found.push_str(&format!(" (mending failed: {error})"));
                    Fix::Failed
                }
            },
        };
        self
    }

    /// Bad, and not mended.
    pub fn is_bad(&self) -> bool {
        self.verdict == Verdict::Bad && self.fix != Fix::Done
    }
}

/// Whom and what the checks are about.
pub struct Patient {
    /// `/`; a test has its own.
    pub root: PathBuf,
    pub is_root: bool,
    pub cache_dir: PathBuf,
    /// Bytes.
    pub cache_size: u64,
    pub cache_min_free: u64,
    pub catalog: StoreUrl,
    pub user: UserName,
    pub store_settings: StoreSettings,
    /// Where the bytes of what is mounted come from.
    pub origins: Vec<StoreUrl>,
    /// What keys are lent for, and how these do.
    pub loans: Vec<(String, LoanState)>,
    /// Mend what is safe to mend.
    pub fix: bool,
}

/// All checks, in an order in which what comes first may explain what comes later.
pub async fn examine(patient: Patient) -> Vec<Finding> {
    let patient = std::sync::Arc::new(patient);
    let here = std::sync::Arc::clone(&patient);
    // Disk work, and waiting for mounts that may not answer.
    let local = tokio::task::spawn_blocking(move || {
        let mut findings = host::examine(&here);
        findings.extend(disk::examine(&here));
        findings.extend(mounted::examine(&here));
        findings
    });
    let (local, stores) = futures::future::join(local, stores::examine(&patient)).await;
    let mut findings = match local {
        Ok(findings) => findings,
        Err(panic) => std::panic::resume_unwind(panic.into_panic()),
    };
    findings.extend(stores);
    findings
}
