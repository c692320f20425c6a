//! Publishing a local directory: discover and plan, read and upload, build the tree.

use std::{
    collections::HashMap,
    ops::AddAssign,
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use futures::{StreamExt, TryStreamExt, stream};
use tokio::task::{JoinError, JoinSet, spawn_blocking};
use tokio_util::task::AbortOnDropHandle;

use super::{
    Phase, Progress, PublishError, PublishOptions, Published, Report, SkipReason,
    assemble::{Assembler, ObjectId, Place, Row, RowKind},
    bundle::{Bundle, LARGE_FILE},
    content::{Hashed, Stamp, hash, read_small},
    parts::publish_tree,
    previous::{Kept, Previous, Usage},
    spool::{Plan, Planned, SpoolReader, SpoolWriter},
    upload::{FileUpload, Uploader, object_key},
    walk::{Found, FoundKind, Walk, local_path},
};
use crate::{
    catalog::{Catalog, OriginLocation},
    digest::Digest,
    origin::{Pin, StoreKind},
    reference::QualifiedName,
    tree::{Object, ObjectNo, RowNo},
};

/// Entries that one task plans or reads at a time …
const BATCH_ENTRIES: usize = 256;
/// … and bytes: what a task holds in memory, or hashes before it hands over.
const BATCH_BYTES: u64 = 4 << 20;
/// Bundles on their way to the store, each in memory.
const BUNDLES_IN_FLIGHT: usize = 3;
/// Digests remembered to find files of the same bytes: what comes later is stored again.
const MAX_PLACES: usize = 2_000_000;
/// How many unreadable files an error names.
const MAX_UNREADABLE: usize = 20;
/// A large file that changes between hashing and uploading is hashed again this often.
const UPLOAD_ATTEMPTS: usize = 2;

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
    let batches = stream::try_unfold(Batches { spool, waiting: None }, |mut batches| async move {
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

struct Discovered {
    spool: SpoolReader,
    usage: Usage,
    report: Report,
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
async fn discover(
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

/// Cuts the spool into what one task reads at a time.
struct Batches {
    spool: SpoolReader,
    waiting: Option<Planned>,
}

impl Batches {
    /// A large file comes alone, so that nothing waits in memory while it is uploaded.
    fn next(&mut self) -> std::io::Result<Vec<Planned>> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < BATCH_ENTRIES {
            let next = match self.waiting.take() {
                Some(waiting) => waiting,
                None => match self.spool.next()? {
                    Some(next) => next,
                    None => break,
                },
            };
            // Unchanged files weigh as well: theirs may have to be read to be bundled anew.
            let weight = match next.plan {
                Plan::Read | Plan::Unchanged(_) => next.stamp.size,
                Plan::Directory | Plan::Symlink { .. } => 0,
            };
            if !batch.is_empty() && bytes + weight > BATCH_BYTES {
                self.waiting = Some(next);
                break;
            }
            bytes += weight;
            batch.push(next);
        }
        Ok(batch)
    }
}

/// An entry whose bytes, if it has any, were read (small) or are in the store (large).
struct Ready {
    path: Vec<u8>,
    stamp: Stamp,
    bytes: ReadyBytes,
}

enum ReadyBytes {
    Directory,
    Symlink {
        target: Vec<u8>,
    },
    Empty,
    /// The previous version has them. `unchanged`: under the same path, too.
    Kept {
        kept: Kept,
        unchanged: bool,
    },
    Small {
        bytes: Vec<u8>,
        digest: Digest,
    },
    Large(Hashed),
}

enum Read {
    Ready(Ready),
    /// Too large to be read into memory (or has grown to be): for `upload_large`.
    Large {
        path: Vec<u8>,
    },
}

/// What the reading tasks share.
struct Source {
    root: PathBuf,
    previous: Option<Arc<Previous>>,
    usage: Usage,
    uploader: Uploader,
    progress: Arc<dyn Progress>,
}

impl Source {
    async fn read(self: Arc<Self>, batch: Vec<Planned>) -> Result<Vec<Ready>, PublishError> {
        let source = self.clone();
        let batch = spawn_blocking(move || {
            batch
                .into_iter()
                .map(|planned| source.read_one(planned))
                .collect::<Result<Vec<_>, _>>()
        })
        .await??;
        let mut all = Vec::with_capacity(batch.len());
        for read in batch {
            all.push(match read {
                Read::Ready(ready) => ready,
                Read::Large { path } => self.clone().upload_large(path).await?,
            });
        }
        Ok(all)
    }

    fn read_one(&self, planned: Planned) -> Result<Read, PublishError> {
        let Planned { path, stamp, plan } = planned;
        let bytes = match plan {
            Plan::Directory => ReadyBytes::Directory,
            Plan::Symlink { target } => ReadyBytes::Symlink { target },
            Plan::Unchanged(row) => match self.kept(row)? {
                Some(kept) => ReadyBytes::Kept {
                    kept,
                    unchanged: true,
                },
                None => return self.read_file(path, stamp),
            },
            Plan::Read => return self.read_file(path, stamp),
        };
        Ok(Read::Ready(Ready { path, stamp, bytes }))
    }

    /// `None` if the object that holds this row's bytes is bundled anew.
    fn kept(&self, row: RowNo) -> Result<Option<Kept>, PublishError> {
        let Some(previous) = &self.previous else {
            return Ok(None);
        };
        Ok(previous
            .kept(row)?
            .filter(|kept| self.usage.keeps(kept.content.object)))
    }

    fn read_file(&self, path: Vec<u8>, stamp: Stamp) -> Result<Read, PublishError> {
        if stamp.size >= LARGE_FILE {
            return Ok(Read::Large { path });
        }
        let (stamp, bytes) = read_small(&local_path(&self.root, &path), LARGE_FILE)?;
        let Some(bytes) = bytes else {
            return Ok(Read::Large { path });
        };
        let bytes = if bytes.is_empty() {
            ReadyBytes::Empty
        } else {
            let digest = Digest::of(&bytes);
            match self.find_digest(&digest)? {
                Some(kept) => ReadyBytes::Kept {
                    kept,
                    unchanged: false,
                },
                None => ReadyBytes::Small { bytes, digest },
            }
        };
        Ok(Read::Ready(Ready { path, stamp, bytes }))
    }

    fn find_digest(&self, digest: &Digest) -> Result<Option<Kept>, PublishError> {
        match &self.previous {
            Some(previous) => previous.find_digest(digest, &self.usage),
            None => Ok(None),
        }
    }

    async fn upload_large(self: Arc<Self>, path: Vec<u8>) -> Result<Ready, PublishError> {
        let local = local_path(&self.root, &path);
        let settled = Arc::new(AtomicU64::new(0));
        for _ in 0..UPLOAD_ATTEMPTS {
            let (source, to_hash) = (self.clone(), local.clone());
            let (stamp, hashed, kept) = spawn_blocking(move || {
                let (stamp, hashed) = hash(&to_hash)?;
                let kept = source.find_digest(&hashed.digest)?;
                Ok::<_, PublishError>((stamp, hashed, kept))
            })
            .await??;
            if stamp.size == 0 {
                return Ok(Ready {
                    path,
                    stamp,
                    bytes: ReadyBytes::Empty,
                });
            }
            if let Some(kept) = kept {
                let bytes = ReadyBytes::Kept {
                    kept,
                    unchanged: false,
                };
                return Ok(Ready { path, stamp, bytes });
            }
            let upload = self
                .uploader
                .file(&local, stamp.size, hashed.digest, &settled)
                .await?;
            if upload == FileUpload::Done {
                // What was there already was not told of on the way.
                let told = settled.load(Ordering::Relaxed);
                self.progress.settled(0, stamp.size.saturating_sub(told));
                return Ok(Ready {
                    path,
                    stamp,
                    bytes: ReadyBytes::Large(hashed),
                });
            }
        }
        Err(PublishError::Changed { path: local })
    }
}

/// Puts each file in its place, in directory order: the one place where bundles are filled.
struct Settle<'report> {
    source: Arc<Source>,
    assembler: Assembler,
    report: &'report mut Report,
    next_object: u32,
    /// Objects of the previous version that the new one has taken over.
    kept: HashMap<ObjectNo, ObjectId>,
    places: HashMap<Digest, Place>,
    bundle: Bundle,
    bundle_id: ObjectId,
    /// Rows that refer to the bundle being filled: it has no digest yet.
    pending: Vec<Row>,
    uploads: JoinSet<Result<(), PublishError>>,
}

impl<'report> Settle<'report> {
    fn new(source: Arc<Source>, assembler: Assembler, report: &'report mut Report) -> Self {
        Self {
            source,
            assembler,
            report,
            next_object: 1,
            kept: HashMap::new(),
            places: HashMap::new(),
            bundle: Bundle::new(),
            bundle_id: ObjectId(0),
            pending: Vec::new(),
            uploads: JoinSet::new(),
        }
    }

    fn new_object(&mut self) -> ObjectId {
        let id = ObjectId(self.next_object);
        self.next_object += 1;
        id
    }

    async fn file(&mut self, ready: Ready) -> Result<(), PublishError> {
        let Ready { path, stamp, bytes } = ready;
        let size = stamp.size;
        let row = |kind| Row {
            path,
            mode: stamp.mode,
            modified: stamp.modified,
            kind,
        };
        let (place, digest) = match bytes {
            ReadyBytes::Directory => return self.assembler.row(row(RowKind::Directory)).await,
            ReadyBytes::Symlink { target } => {
                return self.assembler.row(row(RowKind::Symlink { target })).await;
            }
            ReadyBytes::Empty => {
                self.source.progress.settled(1, 0);
                let kind = RowKind::File {
                    size: 0,
                    place: None,
                    digest: Digest::of(b""),
                };
                return self.assembler.row(row(kind)).await;
            }
            ReadyBytes::Kept { kept, unchanged } => {
                if unchanged {
                    self.report.unchanged_files += 1;
                    self.report.unchanged_bytes += size;
                } else {
                    self.report.duplicate_files += 1;
                    self.report.duplicate_bytes += size;
                }
                self.source.progress.settled(1, size);
                let object = self.kept_object(kept.content.object).await?;
                (
                    Place {
                        object,
                        offset: kept.content.offset,
                    },
                    kept.digest,
                )
            }
            ReadyBytes::Small { bytes, digest } => {
                self.source.progress.settled(1, size);
                (self.place_small(&bytes, digest).await?, digest)
            }
            ReadyBytes::Large(Hashed { digest, sums }) => {
                // Its bytes were told of while they were uploaded.
                self.source.progress.settled(1, 0);
                let place = match self.places.get(&digest) {
                    Some(place) => self.duplicate(*place, size),
                    None => {
                        let object = self.new_object();
                        self.assembler
                            .object(object, published(&digest, size), sums)
                            .await?;
                        self.remember(digest, Place { object, offset: 0 })
                    }
                };
                (place, digest)
            }
        };
        let row = row(RowKind::File {
            size,
            place: Some(place),
            digest,
        });
        if place.object == self.bundle_id {
            self.pending.push(row);
            return Ok(());
        }
        self.assembler.row(row).await
    }

    fn duplicate(&mut self, place: Place, size: u64) -> Place {
        self.report.duplicate_files += 1;
        self.report.duplicate_bytes += size;
        place
    }

    fn remember(&mut self, digest: Digest, place: Place) -> Place {
        if self.places.len() < MAX_PLACES {
            self.places.insert(digest, place);
        }
        place
    }

    async fn kept_object(&mut self, object: ObjectNo) -> Result<ObjectId, PublishError> {
        if let Some(id) = self.kept.get(&object) {
            return Ok(*id);
        }
        let id = self.new_object();
        self.assembler.kept(id, object).await?;
        self.kept.insert(object, id);
        Ok(id)
    }

    async fn place_small(&mut self, bytes: &[u8], digest: Digest) -> Result<Place, PublishError> {
        if let Some(place) = self.places.get(&digest) {
            return Ok(self.duplicate(*place, bytes.len() as u64));
        }
        if !self.bundle.has_room_for(bytes.len()) {
            self.seal().await?;
        }
        let place = Place {
            object: self.bundle_id,
            offset: self.bundle.push(bytes),
        };
        Ok(self.remember(digest, place))
    }

    async fn seal(&mut self) -> Result<(), PublishError> {
        while self.uploads.len() >= BUNDLES_IN_FLIGHT {
            self.join_upload().await?;
        }
        let id = self.new_object();
        let id = std::mem::replace(&mut self.bundle_id, id);
        let bundle = std::mem::replace(&mut self.bundle, Bundle::new());
        let sealed = spawn_blocking(move || bundle.seal()).await?;
        let object = published(&sealed.digest, sealed.bytes.len() as u64);
        self.assembler.object(id, object, sealed.sums.clone()).await?;
        for row in self.pending.drain(..) {
            self.assembler.row(row).await?;
        }
        let source = self.source.clone();
        self.uploads
            .spawn(async move { source.uploader.bundle(sealed).await });
        Ok(())
    }

    async fn join_upload(&mut self) -> Result<(), PublishError> {
        match self.uploads.join_next().await {
            Some(result) => result?,
            None => Ok(()),
        }
    }

    /// Waits until every object is in the store.
    async fn finish(mut self) -> Result<Assembler, PublishError> {
        if !self.bundle.is_empty() {
            self.seal().await?;
        }
        while !self.uploads.is_empty() {
            self.join_upload().await?;
        }
        Ok(self.assembler)
    }
}

fn published(digest: &Digest, size: u64) -> Object {
    Object {
        key: object_key(digest),
        size,
        pin: Pin::Content,
        digest: Some(*digest),
    }
}
