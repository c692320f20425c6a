//! Where things lie in a store catalog. Pure functions between names and keys.

use crate::{
    catalog::{Lease, LeaseId},
    reference::{AliasName, DatastoreName, PinnedReference, QualifiedName, UserName, VersionNumber},
};

pub(super) const RECORDS: &str = "records/";
/// Names the store that was probed: a catalog copied to another store is probed there again.
pub(super) const PROBED: &str = "probe/put-if-absent";

/// Digits of the largest version.
const DIGITS: usize = 20;

pub(super) fn records_of_user(owner: &UserName) -> String {
    format!("{RECORDS}{owner}/")
}

pub(super) fn records_of(name: &QualifiedName) -> String {
    format!("{RECORDS}{}/{}/", name.owner, name.datastore)
}

pub(super) fn record(reference: &PinnedReference) -> String {
    format!(
        "{}{:0DIGITS$}.json",
        records_of(&reference.name),
        reference.version.get()
    )
}

pub(super) fn aliases_of(name: &QualifiedName) -> String {
    format!("aliases/{}/{}/", name.owner, name.datastore)
}

pub(super) fn alias(name: &QualifiedName, alias: &AliasName) -> String {
    format!("{}{alias}.json", aliases_of(name))
}

/// The datastore and the version of a record's key below its owner's prefix.
pub(super) fn datastore_and_version(prefix: &str, key: &str) -> Option<(DatastoreName, VersionNumber)> {
    let (datastore, file) = key.strip_prefix(prefix)?.split_once('/')?;
    Some((datastore.parse().ok()?, version(file)?))
}

pub(super) fn retired_of_user(owner: &UserName) -> String {
    format!("retired/{owner}/")
}

pub(super) fn retired_of(name: &QualifiedName) -> String {
    format!("retired/{}/{}/", name.owner, name.datastore)
}

pub(super) fn retired(reference: &PinnedReference) -> String {
    format!(
        "{}{:0DIGITS$}.json",
        retired_of(&reference.name),
        reference.version.get()
    )
}

pub(super) fn leases_of_owner(owner: &UserName) -> String {
    format!("leases/{owner}/")
}

pub(super) fn leases_of(name: &QualifiedName) -> String {
    format!("leases/{}/{}/", name.owner, name.datastore)
}

pub(super) fn leases_of_version(reference: &PinnedReference) -> String {
    format!(
        "{}{:0DIGITS$}/",
        leases_of(&reference.name),
        reference.version.get()
    )
}

/// The user stands in the key, so that nobody can write another's lease. The id has a fixed length.
pub(super) fn lease_key(reference: &PinnedReference, id: &LeaseId, user: &UserName) -> String {
    format!("{}{id}.{user}.json", leases_of_version(reference))
}

pub(super) fn lease(lease: &Lease) -> String {
    lease_key(&lease.reference, &lease.id, &lease.user)
}

pub(super) fn probe(nonce: &str) -> String {
    format!("probe/{nonce}")
}

/// The last part of `key`, which lies directly below `prefix`.
pub(super) fn below<'k>(prefix: &str, key: &'k str) -> Option<&'k str> {
    let part = key.strip_prefix(prefix)?.trim_end_matches('/');
    (!part.is_empty() && !part.contains('/')).then_some(part)
}

/// The version in a record's file name; `None` for what no record is called.
pub(super) fn version(file: &str) -> Option<VersionNumber> {
    let digits = file.strip_suffix(".json")?;
    let all_digits = digits.len() == DIGITS && digits.bytes().all(|b| b.is_ascii_digit());
    VersionNumber::new(digits.parse().ok().filter(|_| all_digits)?)
}

/// Whether a key taken from a record stays below the catalog's prefix.
pub(super) fn is_inside(key: &str) -> bool {
    key.split('/').all(|part| !matches!(part, "" | "." | "..")) && !key.chars().any(char::is_control)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_sort_as_keys_and_come_back() {
        let name: QualifiedName = "alice@example.org:imagenet".parse().unwrap();
        let versions = [1, 2, 9, 10, 99, 100, u64::MAX - 1, u64::MAX].map(|n| VersionNumber::new(n).unwrap());
        let keys = versions.map(|version| record(&name.at(version)));
        assert!(keys.is_sorted());
        let prefix = records_of(&name);
        assert_eq!(
            keys.each_ref()
                .map(|key| version(below(&prefix, key).unwrap()).unwrap()),
            versions
        );
    }

    #[test]
    fn foreign_names_are_no_versions() {
        for file in [
            "1.json",
            "00000000000000000000.json",
            "+0000000000000000001.json",
            "00000000000000000001",
            "x",
        ] {
            assert_eq!(version(file), None, "{file}");
        }
        for key in ["", "/etc/passwd", "trees/../../x", "a//b", "trees/.", "a\nb"] {
            assert!(!is_inside(key), "{key}");
        }
        assert!(is_inside("trees/ab/abc..d.zst"));
    }
}
