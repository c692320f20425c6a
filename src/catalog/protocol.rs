//! What travels between [`super::http`] and [`super::server`]: `docs/openapi.yaml` in Rust.
//!
//! Answers grow: fields are added, never renamed, so what reads an answer ignores fields it does not know.

use std::{collections::BTreeMap, time::Duration};

use jiff::Timestamp;
use serde::{Deserialize, Serialize};

use super::{Alias, DatastoreSummary, Existing, Lease, OriginLocation, Record, Team, TreeParts};
use crate::{
    origin::{StoreSettings, StoreUrl},
    reference::{PinnedReference, QualifiedName, UserName, VersionNumber},
    tree::Totals,
};

/// Where the protocol's paths begin.
pub const BASE: &str = "/v1";
pub const IDEMPOTENCY_KEY: &str = "idempotency-key";
pub const PROBLEM_JSON: &str = "application/problem+json";
/// Before the kind of a problem: it names, and leads nowhere.
pub const PROBLEM_TYPE: &str = "urn:grid-mount:problem:";
pub const MOST_PER_PAGE: usize = 1000;

/// `GET /v1/me`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Me {
    pub user: UserName,
    pub teams: Vec<String>,
    /// Where trees lie, and objects whose origin is the catalog.
    pub store: StoreUrl,
}

/// `GET /v1/teams`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Teams {
    pub teams: Vec<Team>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Page<T> {
    pub items: Vec<T>,
    /// The `after` of the next page; absent on the last one.
    pub next: Option<String>,
}

pub type Datastores = Page<DatastoreSummary>;
pub type Leases = Page<Lease>;

/// `GET /v1/datastores/{owner}/{datastore}`
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datastore {
    pub name: QualifiedName,
    /// Ascending; those that can be mounted.
    pub versions: Vec<VersionNumber>,
    pub aliases: Vec<Alias>,
}

/// `GET /v1/datastores/{owner}/{datastore}/versions/{selector}`
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Resolution {
    pub record: Record,
    /// Where the tree lies.
    pub tree_store: StoreUrl,
    /// Where the objects lie; often the same.
    pub origin: StoreUrl,
    /// To read the tree; absent where the caller's own are to be used.
    pub tree_credentials: Option<Loan>,
    /// To read the objects; absent where the tree's do, or the caller's own.
    pub origin_credentials: Option<Loan>,
}

/// Settings of an object-store client, keys among them.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Loan {
    /// By their names in the environment: `AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, …
    pub settings: StoreSettings,
    /// Seconds; absent where they last until they are refused.
    pub expires_in: Option<u64>,
}

impl Loan {
    pub fn life(&self) -> Option<Duration> {
        self.expires_in.map(Duration::from_secs)
    }
}

/// What credentials are for: the `for` of `POST …/credentials`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Purpose {
    Tree,
    Origin,
}

/// `POST /v1/datastores/{owner}/{datastore}/versions`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewVersion {
    pub tree: TreeParts,
    pub origin: OriginLocation,
    #[serde(default)]
    pub message: String,
    pub totals: Totals,
}

/// `PUT …/aliases/{alias}`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewAlias {
    pub version: VersionNumber,
}

/// `PUT …/versions/{version}/leases/{id}`
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NewLease {
    pub host: String,
    pub since: Timestamp,
}

/// Its answer: renew within this many seconds.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Held {
    pub expires_in: u64,
}

/// An error as RFC 9457 has it. `kind` is the last part of `type`.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Problem {
    #[serde(rename = "type")]
    pub type_uri: String,
    pub title: String,
    pub status: u16,
    #[serde(default)]
    pub detail: String,
    #[serde(flatten)]
    pub members: BTreeMap<String, serde_json::Value>,
}

/// Which problem it is. Their texts are the `type`s of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    WrongToken,
    /// No such user, or one whom the caller shares no team with: nobody learns which.
    NotInTeam,
    NotYours,
    NoSuchUser,
    NoSuchDatastore,
    NoSuchVersion,
    NoSuchAlias,
    NotReady,
    Retired,
    InUse,
    BadRequest,
    KeyReused,
    TooMany,
    Unavailable,
    Damaged,
    Failed,
    NoSuchPath,
}

impl Kind {
    pub fn status(self) -> u16 {
        match self {
            Self::WrongToken => 401,
            Self::NotYours => 403,
            Self::NotInTeam
            | Self::NoSuchUser
            | Self::NoSuchDatastore
            | Self::NoSuchVersion
            | Self::NoSuchAlias
            | Self::NotReady
            | Self::NoSuchPath => 404,
            Self::InUse => 409,
            Self::Retired => 410,
            Self::BadRequest => 400,
            Self::KeyReused => 422,
            Self::TooMany => 429,
            Self::Unavailable => 503,
            Self::Damaged | Self::Failed => 500,
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::WrongToken => "The token is not valid",
            Self::NotInTeam => "Nobody of that name in your teams",
            Self::NotYours => "Not yours to change",
            Self::NoSuchUser => "Nothing of that user",
            Self::NoSuchDatastore => "No such datastore",
            Self::NoSuchVersion => "No such version",
            Self::NoSuchAlias => "No such alias",
            Self::NotReady => "No version is available yet",
            Self::Retired => "The version was retired",
            Self::InUse => "The version is in use",
            Self::BadRequest => "The request is not understood",
            Self::KeyReused => "The idempotency key was used for something else",
            Self::TooMany => "Too many requests",
            Self::Unavailable => "The store does not answer",
            Self::Damaged => "The catalog is damaged",
            Self::Failed => "The request failed",
            Self::NoSuchPath => "No such path",
        }
    }

    /// `wrong-token`
    fn text(self) -> String {
        serde_json::to_value(self)
            .ok()
            .and_then(|value| value.as_str().map(str::to_owned))
            .unwrap_or_default()
    }
}

impl Problem {
    pub fn new(kind: Kind, detail: impl Into<String>) -> Self {
        Self {
            type_uri: format!("{PROBLEM_TYPE}{}", kind.text()),
            title: kind.title().to_owned(),
            status: kind.status(),
            detail: detail.into(),
            members: BTreeMap::new(),
        }
    }

    #[must_use]
    pub fn with(mut self, member: &str, value: impl Serialize) -> Self {
        if let Ok(value) = serde_json::to_value(value)
            && !value.is_null()
        {
            self.members.insert(member.to_owned(), value);
        }
        self
    }

    /// `None` for a kind of a later protocol.
    pub fn kind(&self) -> Option<Kind> {
        let kind = self.type_uri.strip_prefix(PROBLEM_TYPE)?;
        serde_json::from_value(kind.into()).ok()
    }

    pub fn member<T: serde::de::DeserializeOwned>(&self, name: &str) -> Option<T> {
        serde_json::from_value(self.members.get(name)?.clone()).ok()
    }

    /// The versions there are, where the problem names them.
    pub fn existing(&self) -> Existing {
        Existing(self.member("existing").unwrap_or_default())
    }
}

/// The path of a version's resource.
pub fn version_path(reference: &PinnedReference) -> String {
    format!(
        "{}/versions/{}",
        datastore_path(&reference.name),
        reference.version
    )
}

/// Names need no escaping in a URL, by the grammar of references.
pub fn datastore_path(name: &QualifiedName) -> String {
    format!("{BASE}/datastores/{}/{}", name.owner, name.datastore)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn problems_come_back_as_what_they_were() {
        let problem = Problem::new(Kind::NoSuchVersion, "no version 9").with("existing", [1, 2, 3]);
        let text = serde_json::to_string(&problem).unwrap();
        assert!(text.contains("urn:grid-mount:problem:no-such-version"), "{text}");
        let back: Problem = serde_json::from_str(&text).unwrap();
        assert_eq!(back.kind(), Some(Kind::NoSuchVersion));
        assert_eq!(back.existing().to_string(), "versions 1-3");
    }
}
