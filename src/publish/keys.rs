//! Which object keys can be paths, and what becomes of those that cannot.
//!
//! The rules, for a key relative to the registered prefix:
//! - `dir/` (a directory marker) makes the directory `dir`; the marker itself is no file.
//! - An empty part (`a//b`, a leading `/`), `.`, `..`, a part over 255 bytes, or a NUL byte: the
//!   object is left out. It is never renamed: a made-up path could meet a real one.
//! - `dir` and `dir/file` are both objects: the directory stays, the object `dir` is left out (as
//!   a zero-byte marker, or as a clash). Decided while the sorted keys are merged, not here.
//!
//! Everything left out is counted and the first of each kind are named: see [`Skipped`].
//! Case and Unicode are kept as they are.

use std::collections::BTreeMap;

use serde::Serialize;

/// The longest name that Linux takes.
const MAX_NAME: usize = 255;
/// How many examples of each reason a report keeps.
const EXAMPLES: usize = 20;

/// Why something of the source is not in the tree.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub enum SkipReason {
    /// A socket, FIFO or device.
    Special,
    /// A key that names a directory, of zero bytes: the directory is there, the object is no file.
    DirectoryMarker,
    /// A key that ends in a slash but has bytes: the directory is there, the bytes are not.
    DirectoryWithBytes,
    /// An object and a directory of one name: the directory is there, the object is not.
    AlsoADirectory,
    /// `a//b`, or a leading slash.
    EmptyName,
    /// `.` or `..`
    DotName,
    /// A name over 255 bytes.
    NameTooLong,
    /// A NUL byte.
    Nul,
}

impl SkipReason {
    /// For people.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Special => "a socket, FIFO or device",
            Self::DirectoryMarker => "a zero-byte directory marker (the directory is there)",
            Self::DirectoryWithBytes => "ends in a slash but has bytes (the directory is there)",
            Self::AlsoADirectory => "there is a directory of the same name",
            Self::EmptyName => "an empty name between slashes",
            Self::DotName => "a name that is `.` or `..`",
            Self::NameTooLong => "a name of more than 255 bytes",
            Self::Nul => "a name with a NUL byte",
        }
    }
}

/// What is not in the tree: exact counts, and the first few of each kind by name.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct Skipped {
    pub reasons: BTreeMap<SkipReason, SkippedFor>,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
pub struct SkippedFor {
    pub count: u64,
    /// Paths or keys; bytes that are not UTF-8 are shown as U+FFFD.
    pub examples: Vec<String>,
}

impl Skipped {
    pub(super) fn add(&mut self, reason: SkipReason, name: &[u8]) {
        let of = self.reasons.entry(reason).or_default();
        of.count += 1;
        if of.examples.len() < EXAMPLES {
            of.examples.push(String::from_utf8_lossy(name).into_owned());
        }
    }

    pub(super) fn merge(&mut self, other: Self) {
        for (reason, more) in other.reasons {
            let of = self.reasons.entry(reason).or_default();
            of.count += more.count;
            let room = EXAMPLES.saturating_sub(of.examples.len());
            of.examples.extend(more.examples.into_iter().take(room));
        }
    }

    pub fn count(&self) -> u64 {
        self.reasons.values().map(|of| of.count).sum()
    }
}

/// What a key is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeyMeaning<'key> {
    File(&'key str),
    /// The directory's path, without the slash.
    Directory(&'key str),
    Nothing(SkipReason),
}

pub(super) fn meaning(key: &str) -> KeyMeaning<'_> {
    if key.is_empty() {
        // The marker of the registered prefix itself.
        return KeyMeaning::Directory(key);
    }
    let (path, directory) = match key.strip_suffix('/') {
        Some(path) => (path, true),
        None => (key, false),
    };
    for name in path.split('/') {
        let reason = match name {
            "" => SkipReason::EmptyName,
            "." | ".." => SkipReason::DotName,
            _ if name.len() > MAX_NAME => SkipReason::NameTooLong,
            _ if name.contains('\0') => SkipReason::Nul,
            _ => continue,
        };
        return KeyMeaning::Nothing(reason);
    }
    if directory {
        KeyMeaning::Directory(path)
    } else {
        KeyMeaning::File(path)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_rules() {
        use KeyMeaning::*;
        let long = "x".repeat(256);
        let nested_long = format!("a/{long}/b");
        let just_right = "x".repeat(255);
        for (key, expected) in [
            ("a/b.txt", File("a/b.txt")),
            ("a b/Ä/ä", File("a b/Ä/ä")),
            ("...", File("...")),
            (".hidden", File(".hidden")),
            (just_right.as_str(), File(just_right.as_str())),
            ("dir/", Directory("dir")),
            ("a/dir/", Directory("a/dir")),
            ("", Directory("")),
            ("/", Nothing(SkipReason::EmptyName)),
            ("/a", Nothing(SkipReason::EmptyName)),
            ("a//b", Nothing(SkipReason::EmptyName)),
            ("a//", Nothing(SkipReason::EmptyName)),
            ("a/./b", Nothing(SkipReason::DotName)),
            ("..", Nothing(SkipReason::DotName)),
            ("a/../../etc/passwd", Nothing(SkipReason::DotName)),
            (long.as_str(), Nothing(SkipReason::NameTooLong)),
            (nested_long.as_str(), Nothing(SkipReason::NameTooLong)),
            ("a\0b", Nothing(SkipReason::Nul)),
        ] {
            assert_eq!(meaning(key), expected, "{key:?}");
        }
    }

    proptest! {
        /// Whatever is taken as a path is one that Linux takes, and is the key itself.
        #[test]
        fn no_key_becomes_a_path_that_escapes(key in "[a./\0é]{1,12}") {
            match meaning(&key) {
                KeyMeaning::File(path) | KeyMeaning::Directory(path) => {
                    prop_assert_eq!(path, key.strip_suffix('/').unwrap_or(&key));
                    let plain = std::path::Path::new(path)
                        .components()
                        .all(|part| matches!(part, std::path::Component::Normal(_)));
                    prop_assert!(plain && !path.is_empty() && !path.contains('\0'));
                    prop_assert_eq!(std::path::Path::new(path).components().count(), path.split('/').count());
                }
                KeyMeaning::Nothing(_) => prop_assert!(
                    key.contains('\0')
                        || key.strip_suffix('/').unwrap_or(&key).split('/').any(|name| ["", ".", ".."].contains(&name))
                ),
            }
        }
    }

    #[test]
    fn counts_are_exact_and_examples_bounded() {
        let (mut all, mut more) = (Skipped::default(), Skipped::default());
        for number in 0..15 {
            all.add(SkipReason::DotName, format!("{number}").as_bytes());
            more.add(SkipReason::DotName, b"more");
            more.add(SkipReason::Special, b"\xff");
        }
        all.merge(more);
        assert_eq!(all.count(), 45);
        assert_eq!(all.reasons[&SkipReason::DotName].examples.len(), EXAMPLES);
    }
}
