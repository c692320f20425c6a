//! The grammar of references: what people type to name a data set.
//!
//! ```text
//! [user:]datastore[/version]               alice:imagenet/3   alice:imagenet   imagenet
//! [user:]/datastores/datastore[/version]   alice:/datastores/imagenet/3
//! ```
//!
//! `version` is a positive integer, `latest`, or an alias (`prod`). Case matters everywhere.
//!
//! **Names** are ASCII letters, digits, `.`, `_` and `-`, and begin with a letter or a digit; a user
//! may also hold `@` and `+`, so that an e-mail address is a user name. One alphabet serves as
//! directory name, object key, URL part and shell word, with nothing to escape, and no two names look
//! alike. Because of the first character, `..`, hidden names and names that look like options are not
//! names.
//!
//! **Lengths**: [`MAX_NAME`] is 128 bytes. A name is one part of a path on some file system
//! (`/datastores/<name>`, a `file://` catalog), where 255 is the limit; half of it leaves room for
//! what is put around names (`<alias>.json`, `.<name>.lock`), and holds every e-mail address met in
//! practice.
//!
//! Owns parsing, printing and near misses ("did you mean"). Knows nothing of catalogs.

mod near;
mod parse;
#[cfg(test)]
mod tests;

use std::{fmt, num::NonZeroU64, str::FromStr};

use serde::{Deserialize, Serialize};

pub use near::did_you_mean;

/// The longest a user, datastore or alias may be, in bytes.
pub const MAX_NAME: usize = 128;

/// Who owns a datastore; may be an e-mail address. Case matters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct UserName(String);

/// The name of a datastore, unique per owner. Case matters.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DatastoreName(String);

/// A name that somebody gave to one version (`prod`). Begins with a letter; never `latest`.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct AliasName(String);

/// A version: 1, 2, 3, …
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct VersionNumber(NonZeroU64);

/// `alice:imagenet`
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct QualifiedName {
    pub owner: UserName,
    pub datastore: DatastoreName,
}

/// `alice:imagenet/3`: a reference with nothing left to resolve.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
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
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
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
    /// 1-based, in characters; one past the end where something is missing there.
    pub column: usize,
    pub message: String,
}

impl Reference {
    /// The name this reference has for `me`: no owner typed means me.
    pub fn qualify(&self, me: &UserName) -> QualifiedName {
        QualifiedName {
            owner: self.owner.clone().unwrap_or_else(|| me.clone()),
            datastore: self.datastore.clone(),
        }
    }
}

impl QualifiedName {
    pub fn new(owner: UserName, datastore: DatastoreName) -> Self {
        Self { owner, datastore }
    }

    pub fn at(&self, version: VersionNumber) -> PinnedReference {
        PinnedReference {
            name: self.clone(),
            version,
        }
    }
}

impl VersionNumber {
    pub const FIRST: Self = Self(NonZeroU64::MIN);

    /// `None` for 0: versions count from 1.
    pub const fn new(number: u64) -> Option<Self> {
        match NonZeroU64::new(number) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }

    pub const fn get(self) -> u64 {
        self.0.get()
    }

    /// The version after this one; `None` after the last a `u64` can hold.
    pub const fn next(self) -> Option<Self> {
        match self.0.checked_add(1) {
            Some(number) => Some(Self(number)),
            None => None,
        }
    }
}

/// What the three kinds of names have in common.
macro_rules! name {
    ($type:ident, $part:expr) => {
        impl $type {
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl AsRef<str> for $type {
            fn as_ref(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl FromStr for $type {
            type Err = ParseError;

            fn from_str(text: &str) -> Result<Self, ParseError> {
                parse::whole(text, $part).map(|()| Self(text.to_owned()))
            }
        }

        impl TryFrom<String> for $type {
            type Error = ParseError;

            fn try_from(text: String) -> Result<Self, ParseError> {
                parse::whole(&text, $part).map(|()| Self(text))
            }
        }

        impl From<$type> for String {
            fn from(name: $type) -> String {
                name.0
            }
        }
    };
}

name!(UserName, parse::Part::User);
name!(DatastoreName, parse::Part::Datastore);
name!(AliasName, parse::Part::Alias);

impl fmt::Display for VersionNumber {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl FromStr for VersionNumber {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        parse::version_number(text)
    }
}

impl fmt::Display for QualifiedName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.owner, self.datastore)
    }
}

impl fmt::Display for PinnedReference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.name, self.version)
    }
}

/// Prints `latest` for [`VersionSelector::Latest`].
impl fmt::Display for VersionSelector {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Latest => f.write_str("latest"),
            Self::Number(number) => number.fmt(f),
            Self::Alias(alias) => alias.fmt(f),
        }
    }
}

/// The shortest text that parses to the same reference: the latest version is not printed.
impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(owner) = &self.owner {
            write!(f, "{owner}:")?;
        }
        self.datastore.fmt(f)?;
        match &self.version {
            VersionSelector::Latest => Ok(()),
            version => write!(f, "/{version}"),
        }
    }
}

impl FromStr for Reference {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        parse::reference(text)
    }
}

impl FromStr for QualifiedName {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        parse::qualified_name(text)
    }
}

impl FromStr for PinnedReference {
    type Err = ParseError;

    fn from_str(text: &str) -> Result<Self, ParseError> {
        parse::pinned_reference(text)
    }
}

impl From<PinnedReference> for Reference {
    fn from(pinned: PinnedReference) -> Self {
        Self {
            owner: Some(pinned.name.owner),
            datastore: pinned.name.datastore,
            version: VersionSelector::Number(pinned.version),
        }
    }
}

/// In JSON a reference is the text people type.
macro_rules! as_text {
    ($type:ident) => {
        impl TryFrom<String> for $type {
            type Error = ParseError;

            fn try_from(text: String) -> Result<Self, ParseError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> String {
                value.to_string()
            }
        }
    };
}

as_text!(QualifiedName);
as_text!(PinnedReference);
as_text!(Reference);
