//! Registering an existing prefix: list, sort, build the tree; not a byte of data is copied.
//!
//! Object stores know no modes and no times of directories: files are 0644 with the object's last
//! modification, directories 0755 with the newest below them.

use std::{path::Path, sync::Arc};

use tokio::{sync::mpsc, task::spawn_blocking};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Phase, Progress, PublishError, PublishOptions, Published, Report, SkipReason, Skipped,
    keys::{KeyMeaning, meaning},
    listing::list_all,
    parts::publish_tree,
    pin_of,
    sort::{Listed, ListedFile, Sorted, Sorter},
};
use crate::{
    catalog::{Catalog, OriginLocation},
    origin::{ObjectInfo, Store, StoreKind, StoreUrl},
    reference::QualifiedName,
    tree::{
        Content, Object, Timestamp,
        builder::{BuiltTree, TreeBuilder},
    },
};

const FILE_MODE: u16 = 0o644;
const DIRECTORY_MODE: u16 = 0o755;
/// Pages on their way from the listing to the sorting.
const PAGES_AHEAD: usize = 16;

/// Makes everything below `url` the next version of `name`. `store` is `url`, opened.
pub async fn register(
    url: StoreUrl,
    store: &Store,
    name: QualifiedName,
    catalog: &dyn Catalog,
    options: &PublishOptions,
    progress: Arc<dyn Progress>,
) -> Result<Published, PublishError> {
    let scratch = tempfile::Builder::new()
        .prefix("register-")
        .tempdir_in(&options.scratch)
        .map_err(PublishError::scratch(&options.scratch))?;

    progress.phase(Phase::Discover);
    // A directory is listed as the file system gives it, and from its start each time.
    let sorted = !matches!(url.kind(), StoreKind::File(_));
    let listed = match list_and_sort(store, sorted, options, scratch.path(), &progress).await {
        // A store that keeps no order (S3 directory buckets): one task, without cuts.
        Err(PublishError::BadListing { .. }) if sorted => {
            list_and_sort(store, false, options, scratch.path(), &progress).await
        }
        listed => listed,
    };
    let (entries, mut skipped) = listed?;

    progress.phase(Phase::Tree);
    let (dir, memory_limit, shown) = (scratch.path().to_owned(), options.memory_limit, url.to_string());
    let (built, clashes) = spawn_blocking(move || build(entries, &dir, memory_limit, shown)).await??;
    skipped.merge(clashes);
    let record = publish_tree(built, name, OriginLocation::Url(url), catalog, options, &progress).await?;
    Ok(Published {
        record,
        report: Report {
            skipped,
            ..Report::default()
        },
    })
}

async fn list_and_sort(
    store: &Store,
    sorted: bool,
    options: &PublishOptions,
    scratch: &Path,
    progress: &Arc<dyn Progress>,
) -> Result<(Sorted, Skipped), PublishError> {
    let (pages, received) = mpsc::channel(PAGES_AHEAD);
    let sorter = Sorter::new(scratch, options.memory_limit);
    let (dir, teller) = (scratch.to_owned(), progress.clone());
    let sorting = AbortOnDropHandle::new(spawn_blocking(move || collect(sorter, received, &dir, &*teller)));
    list_all(store, sorted, options.threads, pages).await?;
    sorting.await?
}

/// Takes the pages as they come: what can be a path is sorted, the rest is counted.
fn collect(
    mut sorter: Sorter,
    mut pages: mpsc::Receiver<Vec<ObjectInfo>>,
    scratch: &Path,
    progress: &dyn Progress,
) -> Result<(Sorted, Skipped), PublishError> {
    let mut skipped = Skipped::default();
    while let Some(page) = pages.blocking_recv() {
        let (mut files, mut bytes) = (0, 0);
        for object in page {
            let ObjectInfo {
                key,
                size,
                etag,
                version_id,
                modified,
            } = object;
            let (path, file) = match meaning(&key) {
                KeyMeaning::Nothing(reason) => {
                    skipped.add(reason, key.as_bytes());
                    continue;
                }
                KeyMeaning::Directory(path) => {
                    let reason = match size {
                        0 => SkipReason::DirectoryMarker,
                        _ => SkipReason::DirectoryWithBytes,
                    };
                    skipped.add(reason, key.as_bytes());
                    (path.to_owned(), None)
                }
                KeyMeaning::File(path) => {
                    let path = path.to_owned();
                    let Some(pin) = pin_of(version_id, etag) else {
                        return Err(PublishError::CannotPin { key });
                    };
                    files += 1;
                    bytes += size;
                    (path, Some(ListedFile { size, pin }))
                }
            };
            sorter
                .push(Listed { path, modified, file })
                .map_err(PublishError::scratch(scratch))?;
        }
        progress.discovered(files, bytes);
        progress.settled(files, bytes);
    }
    Ok((sorter.finish().map_err(PublishError::scratch(scratch))?, skipped))
}

/// A directory whose entries are being added.
struct OpenDirectory {
    path: String,
    newest: (i64, u32),
}

fn build(
    mut entries: Sorted,
    scratch: &Path,
    memory_limit: usize,
    url: String,
) -> Result<(BuiltTree, Skipped), PublishError> {
    let mut builder = TreeBuilder::new(scratch, memory_limit)?;
    let mut skipped = Skipped::default();
    let mut open: Vec<OpenDirectory> = Vec::new();
    if entries.peek().is_none() {
        return Err(PublishError::NothingThere { url });
    }
    while let Some(entry) = entries.next().map_err(PublishError::scratch(scratch))? {
        let Listed { path, modified, file } = entry;
        if let (Some(file), Some(next)) = (&file, entries.peek()) {
            if next.path == path && next.file.is_some() {
                return Err(PublishError::BadListing { url, key: path });
            }
            if next.path == path || is_below(&next.path, &path) {
                let reason = match file.size {
                    0 => SkipReason::DirectoryMarker,
                    _ => SkipReason::AlsoADirectory,
                };
                skipped.add(reason, path.as_bytes());
                continue;
            }
        }
        let directory = match &file {
            Some(_) => path.rsplit_once('/').map_or("", |(directory, _)| directory),
            None => &path,
        };
        enter(&mut builder, &mut open, directory)?;
        if let Some(innermost) = open.last_mut() {
            innermost.newest = innermost.newest.max(modified);
        }
        if let Some(ListedFile { size, pin }) = file {
            let content = match size {
                0 => None,
                _ => {
                    let object = Object {
                        key: path.clone(),
                        size,
                        pin,
                        digest: None,
                    };
                    Some(Content {
                        object: builder.add_object(object, None)?,
                        offset: 0,
                    })
                }
            };
            builder.add_file(
                path.as_bytes(),
                FILE_MODE,
                timestamp(modified),
                size,
                content,
                None,
            )?;
        }
    }
    while !open.is_empty() {
        leave(&mut builder, &mut open)?;
    }
    Ok((builder.finish(scratch)?, skipped))
}

fn timestamp((seconds, nanos): (i64, u32)) -> Timestamp {
    Timestamp { seconds, nanos }
}

/// `path` lies in the directory `directory`, at any depth; everything but the root is in `""`.
fn is_below(path: &str, directory: &str) -> bool {
    directory.is_empty()
        || path
            .strip_prefix(directory)
            .is_some_and(|rest| rest.starts_with('/'))
}

/// Makes `directory` the innermost open one; entries come sorted, so what is left never comes back.
fn enter(
    builder: &mut TreeBuilder,
    open: &mut Vec<OpenDirectory>,
    directory: &str,
) -> Result<(), PublishError> {
    while open
        .last()
        .is_some_and(|last| last.path != directory && !is_below(directory, &last.path))
    {
        leave(builder, open)?;
    }
    if open.is_empty() {
        open.push(OpenDirectory {
            path: String::new(),
            newest: (i64::MIN, 0),
        });
    }
    while let Some(last) = open.last()
        && last.path != directory
    {
        let start = if last.path.is_empty() {
            0
        } else {
            last.path.len() + 1
        };
        let end = directory[start..]
            .find('/')
            .map_or(directory.len(), |length| start + length);
        let path = directory[..end].to_owned();
        open.push(OpenDirectory {
            path,
            newest: (i64::MIN, 0),
        });
    }
    Ok(())
}

fn leave(builder: &mut TreeBuilder, open: &mut Vec<OpenDirectory>) -> Result<(), PublishError> {
    let Some(OpenDirectory { path, newest }) = open.pop() else {
        return Ok(());
    };
    if let Some(parent) = open.last_mut() {
        parent.newest = parent.newest.max(newest);
    }
    builder.add_directory(path.as_bytes(), DIRECTORY_MODE, timestamp(newest))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use proptest::prelude::*;

    use super::*;
    use crate::tree::{EntryKind, RowNo, Tree, unpack};

    fn tree_of(keys: &BTreeMap<String, u64>, memory_limit: usize) -> (Tree, Skipped) {
        let scratch = tempfile::tempdir().unwrap();
        let (sender, pages) = mpsc::channel(keys.len() + 1);
        for (number, (key, size)) in (0..).zip(keys) {
            let object = ObjectInfo {
                key: key.clone(),
                size: *size,
                etag: Some(format!("etag of {key}")),
                version_id: None,
                modified: (1000 + number, 0),
            };
            sender.try_send(vec![object]).unwrap();
        }
        drop(sender);
        let sorter = Sorter::new(scratch.path(), memory_limit);
        let (sorted, mut skipped) = collect(sorter, pages, scratch.path(), &()).unwrap();
        let (built, clashes) = build(sorted, scratch.path(), 1 << 20, "s3://b".to_owned()).unwrap();
        skipped.merge(clashes);
        let (rows, out) = (built.rows, scratch.path().join("rows"));
        unpack(
            std::fs::File::open(&rows.path).unwrap(),
            rows.size,
            rows.digest,
            &out,
        )
        .unwrap();
        (Tree::from_bytes(std::fs::read(&out).unwrap()).unwrap(), skipped)
    }

    /// Every proper leading part of a path, and the root.
    fn parents(path: &str) -> impl Iterator<Item = String> + '_ {
        let nested = path.match_indices('/').map(|(end, _)| path[..end].to_owned());
        std::iter::once(String::new()).chain(nested)
    }

    proptest! {
        /// Against a model that holds everything in memory.
        #[test]
        fn the_tree_is_what_the_rules_say(
            keys in proptest::collection::btree_map("[ab.-]{0,2}(/[ab.-]{0,2}){0,3}", 0u64..3, 1..30),
            memory_limit in 1usize..5000,
        ) {
            let usable: BTreeMap<_, _> =
                keys.iter().filter(|(key, _)| !matches!(meaning(key), KeyMeaning::Nothing(_))).collect();
            prop_assume!(!usable.is_empty());
            let mut directories = BTreeSet::from([String::new()]);
            for key in usable.keys() {
                let path = match meaning(key) {
                    KeyMeaning::Directory(path) => {
                        directories.insert(path.to_owned());
                        path
                    }
                    KeyMeaning::File(path) => path,
                    KeyMeaning::Nothing(_) => continue,
                };
                directories.extend(parents(path));
            }
            let files: BTreeMap<_, _> = usable
                .iter()
                .filter(|(key, _)| matches!(meaning(key), KeyMeaning::File(_)) && !directories.contains(**key))
                .collect();

            let (tree, skipped) = tree_of(&keys, memory_limit);
            let (mut seen_files, mut seen_directories) = (0, BTreeSet::new());
            let mut newest: BTreeMap<String, i64> = BTreeMap::new();
            for row in (0..tree.row_count()).map(RowNo) {
                let path = String::from_utf8(tree.path(row).unwrap()).unwrap();
                let entry = tree.entry(row).unwrap();
                match entry.kind {
                    EntryKind::Directory { .. } => {
                        prop_assert_eq!(entry.mode, DIRECTORY_MODE);
                        seen_directories.insert(path.clone());
                        newest.insert(path, entry.modified.seconds);
                    }
                    EntryKind::File { size, content } => {
                        prop_assert_eq!(entry.mode, FILE_MODE);
                        prop_assert_eq!(Some(size), files.get(&&path).map(|size| ***size));
                        prop_assert_eq!(content.is_some(), size > 0);
                        if let Some(content) = content {
                            let object = tree.object(content.object).unwrap();
                            prop_assert_eq!(object.pin, crate::origin::Pin::ETag(format!("etag of {path}")));
                            prop_assert_eq!((object.key, object.size, content.offset), (path, size, 0));
                        }
                        seen_files += 1;
                    }
                    EntryKind::Symlink { .. } => prop_assert!(false, "a symlink"),
                }
            }
            prop_assert_eq!(seen_files, files.len());
            prop_assert_eq!(&seen_directories, &directories);
            // Nothing is dropped silently: every key is a file or was reported.
            prop_assert_eq!(skipped.count() as usize + seen_files, keys.len());
            // A directory is as new as the newest thing in it.
            let times: Vec<(String, i64)> =
                (1000..).zip(keys.keys()).map(|(time, key)| (key.clone(), time)).collect();
            for (directory, modified) in newest {
                let below = times.iter().filter(|(key, _)| match meaning(key) {
                    KeyMeaning::File(path) => !directories.contains(path) && is_below(path, &directory),
                    KeyMeaning::Directory(path) => path == directory || is_below(path, &directory),
                    KeyMeaning::Nothing(_) => false,
                });
                prop_assert_eq!(Some(modified), below.map(|(_, time)| *time).max());
            }
        }
    }

    #[test]
    fn a_key_listed_twice_is_an_error() {
        let scratch = tempfile::tempdir().unwrap();
        let mut sorter = Sorter::new(scratch.path(), 1);
        for _ in 0..2 {
            let file = ListedFile {
                size: 1,
                pin: crate::origin::Pin::Content,
            };
            sorter
                .push(Listed {
                    path: "a".to_owned(),
                    modified: (0, 0),
                    file: Some(file),
                })
                .unwrap();
        }
        let built = build(sorter.finish().unwrap(), scratch.path(), 1, "s3://b".to_owned());
        assert!(matches!(built, Err(PublishError::BadListing { key, .. }) if key == "a"));
    }
}
