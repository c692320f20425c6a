//! What a mount fetches before anybody asks: the choice, as it is configured and carried.

use std::{fmt, str::FromStr};

use serde::{Deserialize, Serialize};

/// What a mount fetches on its own account, at the lowest priority.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum PrefetchPolicy {
    /// Everything, once the mount is read widely, if it fits what is free of the cache.
    #[default]
    Auto,
    /// Nothing but what lies ahead of a sequential reader.
    None,
    /// Everything, from the start, as far as the cache has room.
    All,
}

impl PrefetchPolicy {
    pub const NAMES: [&str; 3] = ["auto", "none", "all"];
}

impl FromStr for PrefetchPolicy {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text.trim() {
            "auto" => Ok(Self::Auto),
            "none" => Ok(Self::None),
            "all" => Ok(Self::All),
            _ => Err(format!(
                "{text:?} is not a way to prefetch: write {}",
                Self::NAMES.join(", ")
            )),
        }
    }
}

impl fmt::Display for PrefetchPolicy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Auto => "auto",
            Self::None => "none",
            Self::All => "all",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_read_as_it_is_written() {
        for name in PrefetchPolicy::NAMES {
            assert_eq!(
                name.parse::<PrefetchPolicy>().map(|p| p.to_string()),
                Ok(name.to_owned())
            );
        }
        assert!(
            "some"
                .parse::<PrefetchPolicy>()
                .is_err_and(|e| e.contains("auto, none, all"))
        );
    }
}
