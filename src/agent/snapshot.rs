//! From a request to something that can be mounted: the record, then the tree.

use std::{
    io,
    ops::Range,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures::TryStreamExt;

use super::{
    access::{Access, AccessError, Asked, Caller},
    report::Watch,
    stored::blocking,
    sums::SumsPart,
    trees::Trees,
};
use crate::{
    cache::{Cache, TreeHandle},
    catalog::{self, Catalog, CatalogError, OriginLocation, Record, TreePart},
    fetch::{FetchObject, Fetcher, Source},
    fs::{
        self, GridFs, Share,
        fetched::{Fetched, Sources},
    },
    origin::{Borrowed, OriginError, Pin, Store, StoreSettings, StoreUrl},
    prefetch_policy::PrefetchPolicy,
    reference::{PinnedReference, Reference, UserName},
    tree::{self, ObjectNo, RowNo, Tree, TreeError},
};

/// No tree takes longer than this to arrive; each of its reads has a shorter deadline of its own.
const TREE_DEADLINE: Duration = Duration::from_secs(540);
/// Chunks of a tree that may wait between the network and the decompressor.
const CHUNKS_IN_FLIGHT: usize = 16;

#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SnapshotError {
    #[error(transparent)]
    Access(#[from] AccessError),
    #[error(transparent)]
    Catalog(#[from] CatalogError),
    #[error("its tree {key} cannot be fetched from {store}")]
    Fetch {
        key: String,
        store: StoreUrl,
        #[source]
        source: OriginError,
    },
    #[error("its tree did not arrive within {} s", TREE_DEADLINE.as_secs())]
    Deadline,
    #[error("its tree {key} is damaged in {store}; its owner can publish it again")]
    Tree {
        key: String,
        store: StoreUrl,
        #[source]
        source: TreeError,
    },
    #[error("its tree cannot be kept in {dir}; free some space or name another directory with --cache-dir")]
    Keep {
        dir: PathBuf,
        #[source]
        source: io::Error,
    },
}

/// A reference resolved: what it stands for, and where that lies.
pub struct Resolved {
    pub record: Record,
    pub catalog: Arc<dyn Catalog>,
    pub catalog_url: StoreUrl,
    trees: Store,
    /// Where the objects lie; no retries of its own.
    pub origin: Store,
    /// The keys that are lent for it.
    pub loans: Vec<Arc<Borrowed>>,
    /// What came with them: for the next agent.
    pub lent: StoreSettings,
    /// Who may share its cached bytes.
    pub(super) domain: String,
}

/// Who asks, and of whom.
#[derive(Clone, Copy)]
pub struct Asking<'a> {
    pub access: &'a Access,
    pub caller: &'a Caller,
    /// The caller's.
    pub settings: &'a StoreSettings,
}

/// A snapshot whose tree is here.
pub struct Snapshot {
    pub resolved: Resolved,
    pub tree: Arc<Tree>,
    /// Keeps the tree's file from being evicted; `None` where the cache could not keep it.
    pub kept: Option<TreeHandle>,
}

impl Resolved {
    pub async fn new(
        reference: &Reference,
        catalog_url: &StoreUrl,
        user: &UserName,
        asking: Asking<'_>,
    ) -> Result<Self, SnapshotError> {
        let granted = asking
            .access
            .grant(asking.caller, catalog_url, Asked::Catalog, asking.settings)?;
        let catalog = catalog::connect(catalog_url, &granted.settings).await?;
        let record = catalog.resolve(reference, user).await?;
        Self::with(record, catalog, catalog_url, asking).await
    }

    /// As it was resolved before, its tree in `store`: asks nobody who may be down.
    pub async fn again(
        record: Record,
        catalog_url: &StoreUrl,
        store: Option<&StoreUrl>,
        asking: Asking<'_>,
    ) -> Result<Self, SnapshotError> {
        let granted = asking
            .access
            .grant(asking.caller, catalog_url, Asked::Catalog, asking.settings)?;
        let catalog = catalog::reconnect(catalog_url, &granted.settings, store).await?;
        Self::with(record, catalog, catalog_url, asking).await
    }

    async fn with(
        record: Record,
        catalog: Arc<dyn Catalog>,
        catalog_url: &StoreUrl,
        asking: Asking<'_>,
    ) -> Result<Self, SnapshotError> {
        let grant = |url| {
            asking
                .access
                .grant(asking.caller, url, Asked::Origin, asking.settings)
        };
        let store = catalog.store().url();
        let granted = match &record.origin {
            OriginLocation::Catalog => grant(store)?,
            OriginLocation::Url(url) => grant(url)?,
        };
        let mut settings = granted.settings;
        // A control plane names a store of its own.
        if record.origin != OriginLocation::Catalog && store != catalog_url {
            settings.extend(&grant(store)?.settings);
        }
        let settings = settings.with_lent(&asking.settings.lent());
        let reading = catalog.reading(&record, &settings).await?;
        Ok(Self {
            record,
            catalog,
            catalog_url: catalog_url.clone(),
            trees: reading.trees,
            origin: reading.objects,
            loans: reading.loans,
            lent: reading.lent,
            domain: granted.domain,
        })
    }

    pub fn reference(&self) -> PinnedReference {
        self.record.reference()
    }

    /// Where trees lie, and sums.
    pub fn tree_store(&self) -> &Store {
        &self.trees
    }

    /// Maps the tree; fetches it first if the cache has not got it. A tree that somebody is fetching is
    /// waited for, one that somebody has mapped is shared.
    pub async fn fetch_tree(self, cache: &Arc<Cache>, trees: &Trees) -> Result<Snapshot, SnapshotError> {
        let part = &self.record.tree.rows;
        let fetched = tokio::time::timeout(TREE_DEADLINE, self.open_or_fetch(cache, trees, part)).await;
        let (tree, kept) = fetched.map_err(|_| SnapshotError::Deadline)??;
        Ok(Snapshot {
            resolved: self,
            tree,
            kept,
        })
    }

    async fn open_or_fetch(
        &self,
        cache: &Arc<Cache>,
        trees: &Trees,
        part: &TreePart,
    ) -> Result<(Arc<Tree>, Option<TreeHandle>), SnapshotError> {
        let _turn = trees.turn(&part.digest).await;
        let handle = {
            let (cache, digest) = (Arc::clone(cache), part.digest);
            // It may be read as a whole.
            blocking(move || cache.tree(&digest)).await
        };
        // Mapped by somebody, it needs no file.
        if let Some(tree) = trees.get(&part.digest) {
            return Ok((tree, handle));
        }
        if let Some(handle) = handle {
            match Tree::open_replaceable(handle.path()) {
                Ok(tree) => {
                    let tree = Arc::new(tree);
                    trees.add(part.digest, &tree);
                    return Ok((tree, Some(handle)));
                }
                // Damage in the cache costs a fetch, never an answer.
                Err(error) => {
                    tracing::warn!(path = %handle.path().display(), %error, "a cached tree is damaged; fetching it anew");
                    cache.discard_tree(handle);
                }
            }
        }
        let (tree, kept) = match cache.tree_staging(&part.digest) {
            Some(staging) => match self.fetch_rows(&staging, part).await {
                Ok(()) => self.keep(cache, part, &staging)?,
                Err(SnapshotError::Keep { source, .. }) => {
                    cache.tree_not_kept(&source);
                    (self.fetch_unkept(part).await?, None)
                }
                Err(error) => return Err(error),
            },
            None => (self.fetch_unkept(part).await?, None),
        };
        let tree = Arc::new(tree);
        trees.add(part.digest, &tree);
        Ok((tree, kept))
    }

    /// Makes what was fetched a part of the cache. One that has no room for it leaves it to its mapping.
    fn keep(
        &self,
        cache: &Arc<Cache>,
        part: &TreePart,
        staging: &Path,
    ) -> Result<(Tree, Option<TreeHandle>), SnapshotError> {
        let damaged = |source| self.damaged(part, source);
        match cache.adopt_tree(&part.digest, staging) {
            Ok(handle) => {
                let tree = Tree::open_replaceable(handle.path()).map_err(damaged)?;
                Ok((tree, Some(handle)))
            }
            Err(error) => {
                cache.tree_not_kept(&error);
                let tree = Tree::open(staging).map_err(damaged);
                // What stays takes space until the next start.
                if let Err(error) = std::fs::remove_file(staging) {
                    tracing::warn!(path = %staging.display(), %error, "a tree that is not kept could not be removed");
                }
                Ok((tree?, None))
            }
        }
    }

    /// The tree as a mapping of a file that is gone already: for when the cache cannot keep it.
    async fn fetch_unkept(&self, part: &TreePart) -> Result<Tree, SnapshotError> {
        let dir = tempfile::Builder::new()
            .prefix("grid-mount-")
            .tempdir()
            .map_err(|source| SnapshotError::Keep {
                dir: std::env::temp_dir(),
                source,
            })?;
        let path = dir.path().join("tree");
        self.fetch_rows(&path, part).await?;
        Tree::open(&path).map_err(|source| self.damaged(part, source))
    }

    /// Streams the part through the decompressor into the file `out`.
    async fn fetch_rows(&self, out: &Path, part: &TreePart) -> Result<(), SnapshotError> {
        let failed = |source| SnapshotError::Fetch {
            key: part.key.clone(),
            store: self.tree_store().url().clone(),
            source,
        };
        let mut stream = self
            .tree_store()
            .get_range(&part.key, &Pin::Content, 0..part.wire_size)
            .await
            .map_err(failed)?;
        let (sender, receiver) = tokio::sync::mpsc::channel(CHUNKS_IN_FLIGHT);
        let (size, digest, path) = (part.size, part.digest, out.to_owned());
        let unpacking = tokio::task::spawn_blocking(move || {
            tree::unpack(
                ChunkReader {
                    receiver,
                    chunk: bytes::Bytes::new(),
                },
                size,
                digest,
                &path,
            )
        });
        let mut arrived = Ok(());
        loop {
            match stream.try_next().await {
                Ok(Some(chunk)) => {
                    // The decompressor has given up: its error says why.
                    if sender.send(Ok(chunk)).await.is_err() {
                        break;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    let _ = sender.send(Err(io::Error::other("the stream broke off"))).await;
                    arrived = Err(failed(error));
                    break;
                }
            }
        }
        drop(sender);
        let unpacked = match unpacking.await {
            Ok(unpacked) => unpacked,
            Err(panic) => std::panic::resume_unwind(panic.into_panic()),
        };
        arrived?;
        match unpacked {
            Ok(()) => Ok(()),
            Err(TreeError::Io { source, .. }) => Err(SnapshotError::Keep {
                dir: out.parent().unwrap_or(out).to_owned(),
                source,
            }),
            Err(source) => Err(self.damaged(part, source)),
        }
    }

    fn damaged(&self, part: &TreePart, source: TreeError) -> SnapshotError {
        SnapshotError::Tree {
            key: part.key.clone(),
            store: self.tree_store().url().clone(),
            source,
        }
    }
}

impl Snapshot {
    fn sources(&self) -> TreeSources {
        let resolved = &self.resolved;
        let sums = resolved
            .record
            .tree
            .sums
            .as_ref()
            .filter(|_| self.tree.has_sums())
            .map(|part| {
                SumsPart::new(
                    Arc::clone(&self.tree),
                    resolved.tree_store().clone(),
                    part.key.clone(),
                )
            });
        TreeSources {
            tree: Arc::clone(&self.tree),
            origin: resolved.origin.clone(),
            sums,
        }
    }

    /// One object of the tree as the mounts of whoever asked for it open it.
    pub fn object(&self, fetcher: &Arc<Fetcher>, number: ObjectNo) -> Result<Arc<FetchObject>, TreeError> {
        Ok(fetcher.open(&self.resolved.domain, self.sources().source(number)?))
    }

    /// The snapshot as a file system of the owner's that `watch` names.
    pub(super) fn file_system(
        &self,
        watch: &Watch,
        share: Share,
        prefetch: PrefetchPolicy,
        runtime: &tokio::runtime::Handle,
    ) -> GridFs {
        let owner = watch.owner();
        let content = Arc::new(Fetched::new(
            Arc::clone(watch.fetcher()),
            self.sources(),
            self.resolved.domain.clone(),
            prefetch,
            runtime,
        ));
        let reference = self.resolved.reference().to_string();
        GridFs::new(
            fs::Snapshot {
                reference,
                tree: Arc::clone(&self.tree),
                content: watch.over(content),
            },
            owner,
        )
        .shared(share)
    }
}

/// The tree's objects in the version's origin.
struct TreeSources {
    tree: Arc<Tree>,
    origin: Store,
    sums: Option<Arc<SumsPart>>,
}

impl Sources for TreeSources {
    fn source(&self, number: ObjectNo) -> Result<Source, TreeError> {
        let object = self.tree.object(number)?;
        Ok(Source {
            store: self.origin.clone(),
            key: object.key,
            pin: object.pin,
            size: object.size,
            sums: self.sums.as_ref().map(|sums| sums.of(number)),
        })
    }

    fn total_bytes(&self) -> u64 {
        self.tree.totals().bytes
    }

    fn files(&self) -> Box<dyn Iterator<Item = (ObjectNo, Range<u64>)> + Send + '_> {
        let rows = (0..self.tree.row_count()).map(RowNo);
        Box::new(rows.filter_map(|row| self.tree.object_range(row).ok().flatten()))
    }
}

/// Chunks from the network as a blocking reader.
struct ChunkReader {
    receiver: tokio::sync::mpsc::Receiver<io::Result<bytes::Bytes>>,
    chunk: bytes::Bytes,
}

impl io::Read for ChunkReader {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        while self.chunk.is_empty() {
            match self.receiver.blocking_recv() {
                Some(chunk) => self.chunk = chunk?,
                None => return Ok(0),
            }
        }
        let taken = self.chunk.split_to(self.chunk.len().min(buf.len()));
        buf[..taken.len()].copy_from_slice(&taken);
        Ok(taken.len())
    }
}
