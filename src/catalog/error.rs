//! What can go wrong with a catalog, in words a person can act on.

use std::{fmt, time::Duration};

use jiff::Timestamp;

use crate::{
    origin::{OriginError, StoreUrl},
    reference::{AliasName, PinnedReference, QualifiedName, UserName, VersionNumber},
};

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CatalogError {
    #[error("no user {user} in this catalog{}", or_list(.did_you_mean, "`grid-mount list --global` shows who publishes here"))]
    NoSuchUser {
        user: UserName,
        did_you_mean: Option<UserName>,
    },
    #[error("no datastore {name}{}", or_list(.did_you_mean, &format!("`grid-mount list {}` shows what there is", .name.owner)))]
    NoSuchDatastore {
        name: QualifiedName,
        did_you_mean: Option<QualifiedName>,
    },
    #[error("no version {}: {} has {existing}", .reference, .reference.name)]
    NoSuchVersion {
        reference: PinnedReference,
        existing: Existing,
    },
    #[error("{name} has no alias {alias}{}", or_list(.did_you_mean, &format!("`grid-mount info {name}` shows its versions and aliases")))]
    NoSuchAlias {
        name: QualifiedName,
        alias: AliasName,
        /// An alias, or the number of a version that `v3` stands for.
        did_you_mean: Option<String>,
    },
    #[error(
        "{name} has no available version: nothing was published, or publishing did not finish; publish it (again)"
    )]
    NoVersion { name: QualifiedName },
    /// What the store holds under a key is not what was written there.
    #[error("{key} in {store} is damaged: {damage}; {}", .damage.remedy())]
    Damaged {
        store: String,
        key: String,
        #[source]
        damage: Damage,
    },
    #[error(
        "{store} overwrites objects although it is asked not to (If-None-Match: *), so two publishers could get the \
         same version: nothing was published; use a store that honours conditional puts, or a file:// catalog"
    )]
    StoreOverwrites { store: String },
    #[error("{tries} other publishers took the next version of {name} first; publish again")]
    Contended { name: QualifiedName, tries: usize },
    /// The store did not answer, and whether it wrote the record could not be found out.
    #[error(
        "whether {reference} was published is not known: the store stopped answering; when it does again, \
         `grid-mount info {reference}` tells"
    )]
    Unsettled {
        reference: PinnedReference,
        source: Option<Box<OriginError>>,
    },
    #[error("{name} has used up its version numbers")]
    VersionsExhausted { name: QualifiedName },
    #[error("the message is too long: {bytes} bytes, at most {limit}")]
    MessageTooLong { bytes: usize, limit: usize },
    #[error("{url} cannot be a catalog: a catalog is at file://, s3://, gs://, az://, http:// or https://")]
    UnsupportedScheme { url: StoreUrl },
    /// Nobody learns whether there is such a user.
    #[error("you share no team with anybody called {user}{}", or_list(.did_you_mean, "`grid-mount team` shows who is in yours"))]
    NotInTeam {
        user: UserName,
        did_you_mean: Option<UserName>,
    },
    #[error("only {owner} may change {owner}'s datastores; you are {me}")]
    NotYours { owner: UserName, me: UserName },
    #[error("{reference} was retired{}; `grid-mount info {}` shows what there is", by_whom(.by, .at), .reference.name)]
    Retired {
        reference: PinnedReference,
        by: Option<UserName>,
        at: Option<Timestamp>,
    },
    #[error("{reference} is mounted by {}; retire it all the same with --in-use: they read on, nobody else mounts it", .holders.join(", "))]
    InUse {
        reference: PinnedReference,
        holders: Vec<String>,
    },
    #[error("{cursor:?} is not where a page of this listing ends")]
    BadCursor { cursor: String },
    #[error(
        "{catalog} does not accept who you say you are: {reason}; put your token in a file and name it in \
         GRID_MOUNT_TOKEN_FILE, or set GRID_MOUNT_TOKEN, or GRID_USER_ID and GRID_API_KEY"
    )]
    WrongToken { catalog: String, reason: String },
    #[error("{catalog} cannot be asked: {reason}")]
    Client { catalog: String, reason: String },
    #[error("{catalog} did not answer within {} s", .waited.as_secs())]
    Unreachable {
        catalog: String,
        waited: Duration,
        source: Option<Box<dyn std::error::Error + Send + Sync>>,
    },
    #[error("{catalog} is overloaded or cannot reach its store: {detail}; try again later")]
    Overloaded { catalog: String, detail: String },
    #[error(
        "this machine's clock is {} s {} that of {catalog}: stores refuse requests signed with such a clock; set the clock",
        .seconds.unsigned_abs(), if *.seconds < 0 { "behind" } else { "ahead of" }
    )]
    ClockSkew { catalog: String, seconds: i64 },
    #[error(
        "{catalog} answered what this grid-mount does not understand ({what}); is it a grid-mount catalog?"
    )]
    BadAnswer { catalog: String, what: String },
    /// The control plane's own words.
    #[error("{catalog} refused: {detail}")]
    Refused { catalog: String, detail: String },
    #[error("the idempotency key was used for another version of {name}; publish again")]
    KeyReused { name: QualifiedName },
    #[error("{doing} failed")]
    Origin {
        doing: &'static str,
        source: OriginError,
    },
}

/// How a stored object differs from what was written.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Damage {
    #[error("it is not framed as grid-mount writes it")]
    Frame,
    #[error("its bytes do not have the digest written beside them")]
    Digest,
    #[error("it has format {found}, this grid-mount knows format {known}")]
    Format { found: u64, known: u32 },
    #[error("its fields are not those of format {known}")]
    Fields { known: u32, source: serde_json::Error },
    #[error("it belongs to {found}")]
    Elsewhere { found: String },
    #[error("it points outside the catalog (at {key:?})")]
    Outside { key: String },
    #[error("it has more than {limit} bytes")]
    Size { limit: u64 },
}

impl Damage {
    fn remedy(&self) -> &'static str {
        match self {
            Self::Format { .. } => "update grid-mount",
            _ => "restore it from a backup or use another version",
        }
    }
}

/// The versions there are, ascending; prints as `versions 1-7, 9`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Existing(pub Vec<VersionNumber>);

impl fmt::Display for Existing {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        /// More runs than this fill no screen with numbers: only the last are shown.
        const SHOWN: usize = 8;

        let mut runs: Vec<(u64, u64)> = Vec::new();
        for version in self.0.iter().map(|version| version.get()) {
            match runs.last_mut() {
                Some((_, last)) if last.checked_add(1) == Some(version) => *last = version,
                _ => runs.push((version, version)),
            }
        }
        match self.0.len() {
            0 => return f.write_str("no versions"),
            1 => f.write_str("version ")?,
            _ => f.write_str("versions ")?,
        }
        let left_out = runs.len().saturating_sub(SHOWN);
        if left_out > 0 {
            f.write_str("…, ")?;
        }
        for (i, (first, last)) in runs.iter().skip(left_out).enumerate() {
            let comma = if i == 0 { "" } else { ", " };
            match last - first {
                0 => write!(f, "{comma}{first}")?,
                1 => write!(f, "{comma}{first}, {last}")?,
                _ => write!(f, "{comma}{first}-{last}")?,
            }
        }
        Ok(())
    }
}

fn by_whom(by: &Option<UserName>, at: &Option<Timestamp>) -> String {
    let by = by.as_ref().map(|by| format!(" by {by}")).unwrap_or_default();
    let at = at
        .as_ref()
        .map(|at| format!(" on {}", at.strftime("%Y-%m-%d")))
        .unwrap_or_default();
    by + &at
}

fn or_list(did_you_mean: &Option<impl fmt::Display>, otherwise: &str) -> String {
    match did_you_mean {
        Some(near) => format!("; did you mean {near}?"),
        None => format!("; {otherwise}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn existing_versions_are_shown_as_runs() {
        let shown = |numbers: &[u64]| {
            Existing(numbers.iter().filter_map(|&n| VersionNumber::new(n)).collect()).to_string()
        };
        assert_eq!(shown(&[]), "no versions");
        assert_eq!(shown(&[4]), "version 4");
        assert_eq!(shown(&[1, 2, 3, 5, 6, 9]), "versions 1-3, 5, 6, 9");
        assert_eq!(
            shown(&[u64::MAX - 1, u64::MAX]),
            format!("versions {}, {}", u64::MAX - 1, u64::MAX)
        );
        let odd: Vec<u64> = (0..1000).map(|n| n * 2 + 1).collect();
        assert_eq!(
            shown(&odd),
            "versions …, 1985, 1987, 1989, 1991, 1993, 1995, 1997, 1999"
        );
    }
}
