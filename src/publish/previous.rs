//! The version before: what an unchanged file refers to.
//!
//! Only objects in the catalog's own store can be referred to, since a record names one origin, and
//! only those with digests and sums, since published data has both for every file.

use std::{
    fs::File,
    io::{Seek, SeekFrom, Write},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    sync::OnceLock,
};

use futures::StreamExt;

use super::{PublishError, bundle::slot, content::Stamp};
use crate::{
    block::block_count,
    catalog::{Catalog, CatalogError, OriginLocation, Record, TreePart},
    digest::{BlockSum, Digest},
    origin::{Pin, Store},
    reference::{PinnedReference, QualifiedName, VersionNumber},
    tree::{Content, Digests, EntryKind, Object, ObjectNo, RowNo, SumFrame, Tree, TreeError, unpack},
};

pub(super) struct Previous {
    pub version: VersionNumber,
    tree: Tree,
    digests: Digests,
    sums: File,
    sums_path: PathBuf,
    /// (start of digest, row) of every file, sorted; made when the first changed file asks.
    by_digest: OnceLock<Vec<(u64, RowNo)>>,
}

/// A file of the previous version.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Kept {
    pub size: u64,
    pub content: Content,
    pub digest: Digest,
}

impl Previous {
    /// The highest version's tree, brought here; `None` if there is none to refer to.
    pub async fn fetch(
        catalog: &dyn Catalog,
        name: &QualifiedName,
        scratch: &Path,
    ) -> Result<Option<Self>, PublishError> {
        let versions = match catalog.versions(name).await {
            Ok(versions) => versions,
            Err(CatalogError::NoSuchUser { .. } | CatalogError::NoSuchDatastore { .. }) => {
                return Ok(None);
            }
            Err(error) => return Err(error.into()),
        };
        let Some(version) = versions.into_iter().max() else {
            return Ok(None);
        };
        let record = catalog
            .record(&PinnedReference {
                name: name.clone(),
                version,
            })
            .await?;
        let Record {
            tree: parts,
            origin: OriginLocation::Catalog,
            ..
        } = record
        else {
            return Ok(None);
        };
        let (Some(digests), Some(sums)) = (parts.digests, parts.sums) else {
            return Ok(None);
        };
        let store = catalog.store();
        let rows = fetch_packed(store, &parts.rows, scratch, "previous.rows").await?;
        let digests = fetch_packed(store, &digests, scratch, "previous.digests").await?;
        let sums_path = scratch.join("previous.sums");
        let sums = download(store, &sums, &sums_path).await?;
        let (tree, digests) = (Tree::open(&rows)?, Digests::open(&digests)?);
        if !tree.has_sums() {
            return Ok(None);
        }
        Ok(Some(Self {
            version,
            tree,
            digests,
            sums,
            sums_path,
            by_digest: OnceLock::new(),
        }))
    }

    /// The file at this path.
    pub fn find(&self, path: &[u8]) -> Result<Option<(RowNo, u64)>, PublishError> {
        let Some(row) = self.tree.find(path)? else {
            return Ok(None);
        };
        match self.tree.entry(row)?.kind {
            EntryKind::File {
                size,
                content: Some(_),
            } => Ok(Some((row, size))),
            _ => Ok(None),
        }
    }

    /// Whether the file at this row has the size and the modification time of the source's.
    pub fn looks_unchanged(&self, row: RowNo, stamp: &Stamp) -> Result<bool, PublishError> {
        let entry = self.tree.entry(row)?;
        let same_size = matches!(entry.kind, EntryKind::File { size, .. } if size == stamp.size);
        Ok(same_size && entry.modified == stamp.modified)
    }

    /// `None` if the row is not a file with bytes and a digest.
    pub fn kept(&self, row: RowNo) -> Result<Option<Kept>, PublishError> {
        let EntryKind::File {
            size,
            content: Some(content),
        } = self.tree.entry(row)?.kind
        else {
            return Ok(None);
        };
        let digest = self.digests.of(&self.tree, row)?;
        Ok(digest.map(|digest| Kept {
            size,
            content,
            digest,
        }))
    }

    /// A file of the previous version with these bytes, wherever it lay, in an object that is kept.
    pub fn find_digest(&self, digest: &Digest, usage: &Usage) -> Result<Option<Kept>, PublishError> {
        let index = match self.by_digest.get() {
            Some(index) => index,
            None => {
                let index = self.index()?;
                self.by_digest.get_or_init(|| index)
            }
        };
        let prefix = prefix_of(digest);
        let start = index.partition_point(|(other, _)| *other < prefix);
        for (_, row) in index[start..].iter().take_while(|(other, _)| *other == prefix) {
            if let Some(kept) = self.kept(*row)?
                && kept.digest == *digest
                && usage.keeps(kept.content.object)
            {
                return Ok(Some(kept));
            }
        }
        Ok(None)
    }

    fn index(&self) -> Result<Vec<(u64, RowNo)>, PublishError> {
        let mut index = Vec::with_capacity(usize::try_from(self.tree.totals().files).unwrap_or(0));
        for row in (0..self.tree.row_count()).map(RowNo) {
            if let Some(kept) = self.kept(row)? {
                index.push((prefix_of(&kept.digest), row));
            }
        }
        index.sort_unstable_by_key(|(prefix, row)| (*prefix, row.0));
        Ok(index)
    }

    pub fn object(&self, object: ObjectNo) -> Result<Object, PublishError> {
        Ok(self.tree.object(object)?)
    }

    /// The sums of all blocks of an object, each frame verified.
    pub fn sums(&self, object: ObjectNo, frames: &mut FrameCache) -> Result<Vec<BlockSum>, PublishError> {
        let size = self.tree.object(object)?.size;
        let mut sums = Vec::with_capacity(usize::try_from(block_count(size)).unwrap_or(0));
        for frame in self.tree.sum_frames(object, 0..block_count(size))? {
            sums.extend(frames.sums(&frame, &self.sums, &self.sums_path)?);
        }
        Ok(sums)
    }

    pub fn usage(&self) -> Usage {
        Usage {
            used: vec![0; self.tree.object_count() as usize],
            repack: Vec::new(),
        }
    }
}

fn prefix_of(digest: &Digest) -> u64 {
    let mut prefix = [0; 8];
    prefix.copy_from_slice(&digest.as_bytes()[..8]);
    u64::from_be_bytes(prefix)
}

/// The frame that was read last: the sums of neighbouring small objects lie in one.
#[derive(Default)]
pub(super) struct FrameCache(Option<(u64, Vec<u8>)>);

impl FrameCache {
    fn sums(&mut self, frame: &SumFrame, file: &File, path: &Path) -> Result<Vec<BlockSum>, PublishError> {
        if let Some((number, bytes)) = &self.0
            && *number == frame.number
        {
            return Ok(frame.pick(bytes)?);
        }
        let length = frame.range.end.saturating_sub(frame.range.start);
        let mut bytes = vec![0; usize::try_from(length).map_err(|_| TreeError::ShortFrame)?];
        file.read_exact_at(&mut bytes, frame.range.start)
            .map_err(PublishError::scratch(path))?;
        let sums = frame.sums(&bytes)?;
        self.0 = Some((frame.number, bytes));
        Ok(sums)
    }
}

/// How much of each object of the previous version the new one refers to.
#[derive(Debug)]
pub(super) struct Usage {
    /// By object: bytes, counted in slots of a bundle. Files with the same bytes count each, so
    /// this errs on the side of keeping.
    used: Vec<u64>,
    repack: Vec<bool>,
}

impl Usage {
    /// Without a previous version.
    pub fn none() -> Self {
        Self {
            used: Vec::new(),
            repack: Vec::new(),
        }
    }

    pub fn count(&mut self, kept: &Kept) {
        if let Some(used) = self.used.get_mut(kept.content.object.0 as usize) {
            *used = used.saturating_add(slot(kept.size));
        }
    }

    /// Decides which objects are worth keeping: a bundle of which less than half is in use is
    /// bundled anew. Returns how many will be.
    pub fn decide(&mut self, previous: &Previous) -> Result<u64, PublishError> {
        let mut repacked = 0;
        self.repack = Vec::with_capacity(self.used.len());
        for (number, used) in (0..).map(ObjectNo).zip(&self.used) {
            let repack = *used > 0 && worth_repacking(*used, previous.object(number)?.size);
            repacked += u64::from(repack);
            self.repack.push(repack);
        }
        Ok(repacked)
    }

    pub fn keeps(&self, object: ObjectNo) -> bool {
        self.repack.get(object.0 as usize) == Some(&false)
    }
}

fn worth_repacking(used: u64, size: u64) -> bool {
    used < slot(size) / 2
}

async fn fetch_packed(
    store: &Store,
    part: &TreePart,
    scratch: &Path,
    name: &str,
) -> Result<PathBuf, PublishError> {
    let (packed, out) = (scratch.join(format!("{name}.zst")), scratch.join(name));
    let file = download(store, part, &packed).await?;
    let (size, digest, path) = (part.size, part.digest, out.clone());
    tokio::task::spawn_blocking(move || unpack(file, size, digest, &path)).await??;
    std::fs::remove_file(&packed).map_err(PublishError::scratch(&packed))?;
    Ok(out)
}

/// A part as it is on the wire, in a local file, read from its start.
async fn download(store: &Store, part: &TreePart, path: &Path) -> Result<File, PublishError> {
    let scratch = || PublishError::scratch(path);
    let mut file = File::options()
        .read(true)
        .write(true)
        .create_new(true)
        .open(path)
        .map_err(scratch())?;
    if part.wire_size == 0 {
        return Ok(file);
    }
    let mut stream = store
        .get_range(&part.key, &Pin::Content, 0..part.wire_size)
        .await?;
    while let Some(bytes) = stream.next().await {
        let bytes = bytes?;
        file.write_all(&bytes).map_err(scratch())?;
    }
    file.seek(SeekFrom::Start(0)).map_err(scratch())?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bundle_is_repacked_below_half_and_small_files_count_by_slot() {
        // 100 files of 10 bytes each take a bundle of 99 slots and 10 bytes: all in use.
        assert!(!worth_repacking(100 * slot(10), 99 * 4096 + 10));
        assert!(!worth_repacking(50 * slot(10), 99 * 4096 + 10));
        assert!(worth_repacking(49 * slot(10), 99 * 4096 + 10));
        // A file that is a whole object is in use or not at all.
        assert!(!worth_repacking(slot(1 << 30), 1 << 30));
    }
}
