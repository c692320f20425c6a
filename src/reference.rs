//! The grammar of references: what people type to name a data set.
//!
//!     [user:]datastore[/version]               alice:imagenet/3   alice:imagenet   imagenet
//!     [user:]/datastores/datastore[/version]   alice:/datastores/imagenet/3
//!
//! Owns parsing, printing and near misses ("did you mean"). Knows nothing of catalogs.

use std::num::NonZeroU64;

use serde::{Deserialize, Serialize};

/// Who owns a datastore; may be an e-mail address. Case matters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct UserName(String);
/// The name of a datastore, unique per owner. Case matters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct DatastoreName(String);
/// A name that somebody gave to one version (`prod`). Never `latest`, never all digits.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct AliasName(String);
/// A version: 1, 2, 3, …
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VersionNumber(NonZeroU64);

/// `alice:imagenet`
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct QualifiedName {
    pub owner: UserName,
    pub datastore: DatastoreName,
}

/// `alice:imagenet/3`: a reference with nothing left to resolve.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct PinnedReference {
    pub name: QualifiedName,
    pub version: VersionNumber,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum VersionSelector {
    /// Nothing typed, or `latest`: the highest available version.
    Latest,
    Number(VersionNumber),
    Alias(AliasName),
}

/// A reference as typed; `owner: None` means me.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    pub owner: Option<UserName>,
    pub datastore: DatastoreName,
    pub version: VersionSelector,
}

/// What is wrong with a reference, and where.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message} (column {column} of {text:?})")]
pub struct ParseError {
    pub text: String,
    /// 1-based, in characters.
    pub column: usize,
    pub message: String,
}
