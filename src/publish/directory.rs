//! Publishing a local directory: discover and plan, read and upload, build the tree.

mod discover;
mod read;
mod settle;

use std::{
    path::{Path, PathBuf},
    sync::Arc,
};

use futures::{StreamExt, TryStreamExt, stream};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Phase, Progress, PublishError, PublishOptions, Published, assemble::Assembler, parts::publish_tree,
    previous::Previous, upload::Uploader, walk::Walk,
};
use crate::{
    catalog::{Catalog, OriginLocation},
    origin::StoreKind,
    reference::QualifiedName,
};
use discover::{Discovered, discover};
use read::{Batches, Source};
use settle::Settle;

/// Entries that one task plans or reads at a time …
const BATCH_ENTRIES: usize = 256;
/// … and bytes: what a task holds in memory, or hashes before it hands over.
const BATCH_BYTES: u64 = 4 << 20;

/// Publishes what `dir` holds as the next version of `name`. Dropping the future stops it; what was
/// uploaded stays and is found by the next try.
pub async fn publish_directory(
    dir: &Path,
    name: QualifiedName,
    catalog: &dyn Catalog,
    options: &PublishOptions,
    progress: Arc<dyn Progress>,
) -> Result<Published, PublishError> {
    let (root, meta) = source_directory(dir)?;
    refuse_to_publish_ourselves(&root, catalog, options)?;
    let scratch = tempfile::Builder::new()
        .prefix("publish-")
        .tempdir_in(&options.scratch)
        .map_err(PublishError::scratch(&options.scratch))?;

    progress.phase(Phase::Discover);
    let previous = Previous::fetch(catalog, &name, scratch.path())
        .await?
        .map(Arc::new);
    let walk = Walk::new(&root, &meta, options.threads);
    let discovered = discover(&root, walk, previous.clone(), options, &progress, scratch.path()).await?;
    let Discovered {
        spool,
        usage,
        mut report,
    } = discovered;
    report.previous = previous.as_ref().map(|previous| previous.version);

    progress.phase(Phase::Upload);
    let source = Arc::new(Source {
        root,
        previous: previous.clone(),
        usage,
        uploader: Uploader::new(catalog.store().clone(), progress.clone()),
        progress: progress.clone(),
    });
    let assembler = Assembler::start(scratch.path(), options.memory_limit, previous);
    let mut settle = Settle::new(source.clone(), assembler, &mut report);
    let batches = stream::try_unfold(Batches::new(spool), |mut batches| async move {
        let batch = batches.next()?;
        Ok::<_, std::io::Error>((!batch.is_empty()).then_some((batch, batches)))
    })
    .map_err(|source| PublishError::Scratch {
        path: options.scratch.clone(),
        source,
    })
    .map(|batch| {
        let source = source.clone();
        async move { AbortOnDropHandle::new(tokio::spawn(source.read(batch?))).await? }
    })
    .buffered(options.threads.max(1));
    let mut batches = Box::pin(batches);
    while let Some(batch) = batches.try_next().await? {
        for ready in batch {
            settle.file(ready).await?;
        }
    }
    drop(batches);
    let assembler = settle.finish().await?;
    source.uploader.report(&mut report);

    progress.phase(Phase::Tree);
    let built = assembler.finish().await?;
    let record = publish_tree(built, name, OriginLocation::Catalog, catalog, options, &progress).await?;
    Ok(Published { record, report })
}

fn source_directory(dir: &Path) -> Result<(PathBuf, std::fs::Metadata), PublishError> {
    let unreadable = |source| PublishError::unreadable(dir, source);
    let root = dir.canonicalize().map_err(unreadable)?;
    let meta = root.metadata().map_err(unreadable)?;
    if !meta.is_dir() {
        return Err(PublishError::NotADirectory { path: dir.to_owned() });
    }
    Ok((root, meta))
}

/// A catalog or a scratch directory within the source would be published while it is written to.
fn refuse_to_publish_ourselves(
    root: &Path,
    catalog: &dyn Catalog,
    options: &PublishOptions,
) -> Result<(), PublishError> {
    let store = match catalog.store().url().kind() {
        StoreKind::File(path) => Some((path, "the catalog")),
        _ => None,
    };
    for (inner, what) in store
        .into_iter()
        .chain([(options.scratch.clone(), "the temporary files")])
    {
        // What is not there yet lies where its parent does.
        let existing = inner.ancestors().find_map(|path| path.canonicalize().ok());
        if existing.is_some_and(|path| path.starts_with(root)) {
            return Err(PublishError::Contains {
                path: root.to_owned(),
                inner,
                what,
            });
        }
    }
    Ok(())
}
