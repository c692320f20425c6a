//! Walking the directory, and deciding for each file whether the previous version has its bytes.

use std::{
    ops::AddAssign,
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::{StreamExt, TryStreamExt, stream};
use tokio::task::{JoinError, spawn_blocking};

use super::{BATCH_BYTES, BATCH_ENTRIES};
use crate::{
    publish::{
        Progress, PublishError, PublishOptions, Report, SkipReason,
        content::{Stamp, hash},
        previous::{Kept, Previous, Usage},
        spool::{Plan, Planned, SpoolReader, SpoolWriter},
        walk::{Found, FoundKind, Walk, local_path},
    },
    tree::RowNo,
};

/// How many unreadable files an error names.
const MAX_UNREADABLE: usize = 20;

pub(super) struct Discovered {
    pub spool: SpoolReader,
    pub usage: Usage,
    pub report: Report,
}

/// What one task found out about some entries.
#[derive(Default)]
struct Planning {
    planned: Vec<Planned>,
    report: Report,
    files: u64,
    bytes: u64,
    unreadable: Unreadable,
    kept: Vec<Kept>,
}

#[derive(Default)]
struct Unreadable {
    paths: Vec<PathBuf>,
    count: u64,
    first: Option<std::io::Error>,
}

impl Unreadable {
    fn add(&mut self, path: PathBuf, error: std::io::Error) {
        self.count += 1;
        if self.paths.len() < MAX_UNREADABLE {
            self.paths.push(path);
        }
        self.first.get_or_insert(error);
    }

    fn merge(&mut self, other: Self) {
        self.count += other.count;
        let room = MAX_UNREADABLE.saturating_sub(self.paths.len());
        self.paths.extend(other.paths.into_iter().take(room));
        self.first = self.first.take().or(other.first);
    }

    fn into_result(self) -> Result<(), PublishError> {
        match self.first {
            None => Ok(()),
            Some(source) => Err(PublishError::Unreadable {
                paths: self.paths,
                count: self.count,
                source,
            }),
        }
    }
}

/// Walks everything, decides for each file whether it is unchanged, and writes it all down.
pub(super) async fn discover(
    root: &Path,
    walk: Walk,
    previous: Option<Arc<Previous>>,
    options: &PublishOptions,
    progress: &Arc<dyn Progress>,
    scratch: &Path,
) -> Result<Discovered, PublishError> {
    let in_scratch = || PublishError::scratch(scratch);
    let file = tempfile::tempfile_in(scratch).map_err(in_scratch())?;
    let mut spool = SpoolWriter::new(file);
    let mut usage = previous
        .as_ref()
        .map_or_else(Usage::none, |previous| previous.usage());
    let mut report = Report::default();
    let mut unreadable = Unreadable::default();

    let listings = stream::try_unfold(walk, |mut walk| async move {
        let listing = walk.next().await?;
        Ok::<_, JoinError>(listing.map(|listing| (listing, walk)))
    });
    let mut planning = std::pin::pin!(
        listings
            .map_ok(|listing| {
                let mut rest = Planning::default();
                for (path, error) in listing.unreadable {
                    rest.unreadable.add(path, error);
                }
                let batches = in_batches(listing.entries).into_iter().map(Ok).chain([Err(rest)]);
                stream::iter(batches.map(Ok::<_, JoinError>))
            })
            .try_flatten()
            .map(|batch| {
                let (root, previous, checksum) = (root.to_owned(), previous.clone(), options.checksum);
                async move {
                    match batch? {
                        Ok(batch) => {
                            spawn_blocking(move || plan(&root, batch, previous.as_deref(), checksum)).await?
                        }
                        Err(done) => Ok(done),
                    }
                }
            })
            .buffered(options.threads.max(1))
    );
    while let Some(planning) = planning.try_next().await? {
        for planned in &planning.planned {
            spool.push(planned).map_err(in_scratch())?;
        }
        planning.kept.iter().for_each(|kept| usage.count(kept));
        report
            .hard_linked_files
            .add_assign(planning.report.hard_linked_files);
        report.skipped.merge(planning.report.skipped);
        unreadable.merge(planning.unreadable);
        progress.discovered(planning.files, planning.bytes);
    }
    unreadable.into_result()?;
    if let Some(previous) = &previous {
        report.repacked_bundles = usage.decide(previous)?;
    }
    Ok(Discovered {
        spool: spool.into_reader().map_err(in_scratch())?,
        usage,
        report,
    })
}

/// Splits a directory so that no task has much to do (a large one with `checksum` has).
fn in_batches(entries: Vec<Found>) -> Vec<Vec<Found>> {
    let mut batches: Vec<Vec<Found>> = Vec::new();
    let mut bytes = 0;
    for found in entries {
        match batches.last_mut() {
            Some(batch) if batch.len() < BATCH_ENTRIES && bytes < 16 * BATCH_BYTES => batch.push(found),
            _ => {
                bytes = 0;
                batches.push(vec![found]);
            }
        }
        let last = batches.last().and_then(|batch| batch.last());
        bytes += last.map_or(0, |found| found.stamp.size);
    }
    batches
}

fn plan(
    root: &Path,
    batch: Vec<Found>,
    previous: Option<&Previous>,
    checksum: bool,
) -> Result<Planning, PublishError> {
    let mut planning = Planning::default();
    for Found {
        path,
        mut stamp,
        kind,
    } in batch
    {
        let plan = match kind {
            FoundKind::Directory => Plan::Directory,
            FoundKind::Symlink { target } => Plan::Symlink { target },
            FoundKind::Special => {
                planning.report.skipped.add(SkipReason::Special, &path);
                continue;
            }
            FoundKind::File { hard_linked } => {
                planning.report.hard_linked_files += u64::from(hard_linked);
                match unchanged(root, &path, &mut stamp, previous, checksum) {
                    Ok(Some((row, kept))) => {
                        planning.kept.push(kept);
                        Plan::Unchanged(row)
                    }
                    Ok(None) => {
                        let local = local_path(root, &path);
                        if let Err(error) = nix::unistd::eaccess(&local, nix::unistd::AccessFlags::R_OK) {
                            planning.unreadable.add(local, error.into());
                            continue;
                        }
                        Plan::Read
                    }
                    Err(PublishError::Unreadable { paths, source, .. }) => {
                        let path = paths.into_iter().next().unwrap_or_default();
                        planning.unreadable.add(path, source);
                        continue;
                    }
                    Err(error) => return Err(error),
                }
            }
        };
        if matches!(plan, Plan::Read | Plan::Unchanged(_)) {
            planning.files += 1;
            planning.bytes += stamp.size;
        }
        planning.planned.push(Planned { path, stamp, plan });
    }
    Ok(planning)
}

/// The row of the previous version that holds the same bytes under the same path.
fn unchanged(
    root: &Path,
    path: &[u8],
    stamp: &mut Stamp,
    previous: Option<&Previous>,
    checksum: bool,
) -> Result<Option<(RowNo, Kept)>, PublishError> {
    let Some(previous) = previous else {
        return Ok(None);
    };
    let Some((row, size)) = previous.find(path)? else {
        return Ok(None);
    };
    if size != stamp.size {
        return Ok(None);
    }
    if !checksum && !previous.looks_unchanged(row, stamp)? {
        return Ok(None);
    }
    let Some(kept) = previous.kept(row)? else {
        return Ok(None);
    };
    if checksum {
        let (read, hashed) = hash(&local_path(root, path))?;
        if hashed.digest != kept.digest {
            return Ok(None);
        }
        *stamp = read;
    }
    Ok(Some((row, kept)))
}
