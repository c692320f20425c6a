//! Building trees: paths in any order in, the parts of a tree out, in bounded memory.
//!
//! Owns validation, implied directories, ordering and the composition of the parts. Paths go through an
//! external sort, everything else straight to scratch files; what stays in memory is the sort's arena
//! and 8 bytes per object. Must not know where paths or objects come from.

mod node;
mod objects;
mod part;
mod rows;
mod scratch;
mod sort;

use std::{
    collections::HashMap,
    path::{Path, PathBuf},
};

use zerocopy::{FromZeros, IntoBytes};

use super::{
    Content, Object, ObjectNo, Timestamp, Totals, TreeError,
    format::{self, DigestsHeader, Header, Row, Section},
};
use crate::{
    block::BLOCK_SIZE,
    digest::{BlockSum, Digest},
};
use node::Attributes;
use objects::ObjectTable;
use part::PartWriter;
use rows::{Children, Rows};
use sort::Sorter;

pub use part::BuiltPart;

/// A reasonable memory limit: ten million entries sort in about ten runs.
pub const DEFAULT_MEMORY_LIMIT: usize = 256 << 20;

/// The parts of a tree, ready to travel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BuiltTree {
    /// zstd-compressed.
    pub rows: BuiltPart,
    /// zstd-compressed; present when files came with digests.
    pub digests: Option<BuiltPart>,
    /// Present when objects came with sums. As it is: hashes do not compress, and uncompressed frames
    /// can be fetched by range.
    pub sums: Option<BuiltPart>,
    pub totals: Totals,
}

/// Collects one version's entries. Everything it writes meanwhile lies in its own directory under
/// `scratch`, which goes when it does.
pub struct TreeBuilder {
    scratch: tempfile::TempDir,
    sorter: Sorter,
    objects: ObjectTable,
    implied: Implied,
    key: Vec<u8>,
}

/// Directories that must exist because something lies below them, and the newest time below each.
struct Implied {
    newest: HashMap<Vec<u8>, Timestamp>,
    /// Estimated size of the map, and when to give it to the sort.
    bytes: usize,
    limit: usize,
    /// The parent of what was added last: mostly the next one's too.
    parent: Vec<u8>,
    newest_in_parent: Option<Timestamp>,
}

/// What a map entry costs beside its path.
const IMPLIED_OVERHEAD: usize = 80;

impl TreeBuilder {
    /// A builder that sorts within about `memory_limit` bytes.
    pub fn new(scratch: &Path, memory_limit: usize) -> Result<Self, TreeError> {
        let dir = tempfile::Builder::new().prefix("tree-").tempdir_in(scratch);
        let dir = dir.map_err(|source| TreeError::Io {
            path: scratch.to_owned(),
            source,
        })?;
        let for_implied = memory_limit / 8;
        Ok(Self {
            sorter: Sorter::new(dir.path(), memory_limit - for_implied),
            objects: ObjectTable::create(dir.path())?,
            implied: Implied {
                newest: HashMap::new(),
                bytes: 0,
                limit: for_implied,
                parent: Vec::new(),
                newest_in_parent: None,
            },
            key: Vec::new(),
            scratch: dir,
        })
    }

    /// Adds an object; files refer to it by the number returned. `sums`: one per block, in order; either
    /// every object of a tree has them or none.
    pub fn add_object(&mut self, object: Object, sums: Option<&[BlockSum]>) -> Result<ObjectNo, TreeError> {
        self.objects.add(&object, sums)
    }

    /// Adds a directory. It may come before or after what lies in it, and again with the same attributes.
    pub fn add_directory(&mut self, path: &[u8], mode: u16, modified: Timestamp) -> Result<(), TreeError> {
        check_path(path)?;
        check_attributes(path, mode, modified)?;
        self.add(path, Attributes::new(node::DIRECTORY, mode, modified), &[])
    }

    /// Adds a file. `content` is `None` exactly for an empty one; its object must have been added.
    #[allow(clippy::too_many_arguments)] // each is one attribute of the file, and all are needed
    pub fn add_file(
        &mut self,
        path: &[u8],
        mode: u16,
        modified: Timestamp,
        size: u64,
        content: Option<Content>,
        digest: Option<Digest>,
    ) -> Result<(), TreeError> {
        check_not_root(path)?;
        check_attributes(path, mode, modified)?;
        let mut attributes = Attributes::new(node::FILE, mode, modified);
        attributes.size = size.into();
        match content {
            None if size > 0 => return Err(bad_entry(path, "it has a size but no bytes")),
            Some(_) if size == 0 => return Err(bad_entry(path, "it is empty but has bytes")),
            None => {}
            Some(Content { object, offset }) => {
                let object_size = self.objects.size(object).ok_or(TreeError::NoSuchObject(object))?;
                if offset.checked_add(size).is_none_or(|end| end > object_size) {
                    return Err(bad_entry(path, "it reaches beyond the end of its object"));
                }
                attributes.object = object.0.into();
                attributes.offset = offset.into();
            }
        }
        attributes.has_digest = digest.is_some().into();
        self.add(
            path,
            attributes,
            digest.as_ref().map_or(&[], |digest| digest.as_bytes()),
        )
    }

    /// Adds a symlink; its target is kept as it is.
    pub fn add_symlink(
        &mut self,
        path: &[u8],
        mode: u16,
        modified: Timestamp,
        target: &[u8],
    ) -> Result<(), TreeError> {
        check_not_root(path)?;
        check_attributes(path, mode, modified)?;
        if target.is_empty() || target.len() > format::MAX_TARGET || target.contains(&0) {
            return Err(bad_entry(
                path,
                "its target is empty, longer than 4095 bytes, or holds a NUL",
            ));
        }
        self.add(path, Attributes::new(node::SYMLINK, mode, modified), target)
    }

    fn add(&mut self, path: &[u8], attributes: Attributes, tail: &[u8]) -> Result<(), TreeError> {
        if let Some(parent) = node::parent(path) {
            self.note_parent(parent, attributes.modified())?;
        }
        node::write_key(&mut self.key, path);
        self.sorter.push(&self.key, &[attributes.as_bytes(), tail])
    }

    fn note_parent(&mut self, parent: &[u8], modified: Timestamp) -> Result<(), TreeError> {
        let implied = &mut self.implied;
        if implied.newest_in_parent.is_none() || implied.parent != parent {
            implied.close_parent();
            implied.parent.clear();
            implied.parent.extend_from_slice(parent);
            implied.newest_in_parent = Some(modified);
            if implied.bytes > implied.limit {
                self.imply()?;
            }
        } else {
            implied.newest_in_parent = implied.newest_in_parent.max(Some(modified));
        }
        Ok(())
    }

    /// Gives the implied directories, and their ancestors, to the sort. The same directory may be given
    /// many times; the sort brings its records together.
    fn imply(&mut self) -> Result<(), TreeError> {
        let mut newest = std::mem::take(&mut self.implied.newest);
        self.implied.bytes = 0;
        let given: Vec<(Vec<u8>, Timestamp)> =
            newest.iter().map(|(path, time)| (path.clone(), *time)).collect();
        for (path, time) in given {
            let mut below = path.as_slice();
            while let Some(ancestor) = node::parent(below) {
                match newest.get_mut(ancestor) {
                    // Whoever brought this time brought it, or a newer one, further up.
                    Some(known) if *known >= time => break,
                    Some(known) => *known = time,
                    None => {
                        newest.insert(ancestor.to_vec(), time);
                    }
                }
                below = ancestor;
            }
        }
        for (path, time) in newest {
            let attributes = Attributes::new(node::IMPLIED, node::IMPLIED_MODE, time);
            node::write_key(&mut self.key, &path);
            self.sorter.push(&self.key, &[attributes.as_bytes()])?;
        }
        Ok(())
    }

    /// Sorts, checks and writes the parts into `out_dir` as `rows.zst`, `digests.zst` and `sums`, replacing
    /// what has these names. After an error, what lies there is not a part.
    pub fn finish(mut self, out_dir: &Path) -> Result<BuiltTree, TreeError> {
        self.implied.close_parent();
        self.imply()?;
        if self.sorter.is_empty() {
            let root = Attributes::new(node::IMPLIED, node::IMPLIED_MODE, Timestamp::default());
            node::write_key(&mut self.key, b"");
            self.sorter.push(&self.key, &[root.as_bytes()])?;
        }
        let mut rows = Rows::place(self.sorter.finish()?, self.scratch.path())?;
        let mut objects = self.objects;
        objects.end()?;
        let digests = match rows.has_digests {
            Some(true) => Some(compose_digests(&mut rows, out_dir.join("digests.zst"))?),
            _ => None,
        };
        let totals = rows.totals;
        let part = compose_rows(&mut rows, &mut objects, out_dir.join("rows.zst"))?;
        let sums = match objects.has_sums {
            Some(true) => Some(part::part_as_is(
                objects.sums,
                &objects.sums_hasher,
                &out_dir.join("sums"),
            )?),
            _ => None,
        };
        Ok(BuiltTree {
            rows: part,
            digests,
            sums,
            totals,
        })
    }
}

impl Implied {
    /// Moves what was learnt about the current parent into the map.
    fn close_parent(&mut self) {
        let Some(time) = self.newest_in_parent.take() else {
            return;
        };
        match self.newest.get_mut(&self.parent) {
            Some(known) => *known = time.max(*known),
            None => {
                self.bytes += self.parent.len() + IMPLIED_OVERHEAD;
                self.newest.insert(self.parent.clone(), time);
            }
        }
    }
}

fn check_path(path: &[u8]) -> Result<(), TreeError> {
    let bad = |why| {
        Err(TreeError::BadPath {
            path: node::display(path),
            why,
        })
    };
    if path.is_empty() {
        return Ok(());
    }
    if path.len() > format::MAX_PATH {
        return bad("it is longer than 4095 bytes");
    }
    match path.split(|byte| *byte == b'/').find_map(format::name_fault) {
        Some(why) => bad(why),
        None => Ok(()),
    }
}

fn check_not_root(path: &[u8]) -> Result<(), TreeError> {
    if path.is_empty() {
        return Err(TreeError::BadPath {
            path: String::new(),
            why: "the root can only be a directory",
        });
    }
    check_path(path)
}

fn check_attributes(path: &[u8], mode: u16, modified: Timestamp) -> Result<(), TreeError> {
    if mode & !format::MODE_MASK != 0 {
        return Err(bad_entry(path, "its mode has more than permission bits"));
    }
    if modified.nanos >= 1_000_000_000 {
        return Err(bad_entry(path, "its modification time has too many nanoseconds"));
    }
    Ok(())
}

fn bad_entry(path: &[u8], why: &'static str) -> TreeError {
    TreeError::BadEntry {
        path: node::display(path),
        why,
    }
}

fn compose_digests(rows: &mut Rows, out: PathBuf) -> Result<BuiltPart, TreeError> {
    let header = DigestsHeader {
        magic: format::DIGESTS_MAGIC,
        version: format::FORMAT_VERSION.into(),
        reserved: 0.into(),
        count: rows.totals.files.into(),
        reserved_too: 0.into(),
    };
    let mut part = PartWriter::create(out, format::DIGESTS_HEADER_LEN as u64 + rows.digests.len())?;
    part.write(header.as_bytes())?;
    part.append(&mut rows.digests)?;
    part.finish()
}

fn compose_rows(rows: &mut Rows, objects: &mut ObjectTable, out: PathBuf) -> Result<BuiltPart, TreeError> {
    let has_sums = objects.has_sums == Some(true);
    let has_object_digests = objects.digests.len() > 0;
    let mut lens = vec![
        (format::ROWS, rows.rows.len()),
        (format::NAMES, rows.names.len()),
        (format::FILE_RANKS, rows.ranks.len()),
        (format::OBJECTS, objects.rows.len()),
        (format::KEYS, objects.keys.len()),
    ];
    let mut flags = 0;
    if has_object_digests {
        flags |= format::FLAG_OBJECT_DIGESTS;
        lens.push((format::OBJECT_DIGESTS, objects.digests.len()));
    }
    if has_sums {
        flags |= format::FLAG_SUMS;
        lens.push((format::SUM_FRAMES, objects.frames.len()));
    }
    let table_end = format::HEADER_LEN + lens.len() * format::SECTION_LEN;
    let header_len = (table_end as u64).next_multiple_of(format::SECTION_ALIGN);
    let mut end = header_len;
    let sections: Vec<Section> = lens
        .iter()
        .map(|(id, len)| {
            let offset = end.next_multiple_of(format::SECTION_ALIGN);
            end = offset + len;
            Section {
                id: (*id).into(),
                reserved: 0.into(),
                offset: offset.into(),
                len: (*len).into(),
            }
        })
        .collect();
    let totals = rows.totals;
    let header = Header {
        magic: format::MAGIC,
        version: format::FORMAT_VERSION.into(),
        header_len: (header_len as u32).into(),
        flags: flags.into(),
        total_len: end.into(),
        files: totals.files.into(),
        directories: totals.directories.into(),
        symlinks: totals.symlinks.into(),
        bytes: totals.bytes.into(),
        row_len: (format::ROW_LEN as u32).into(),
        object_len: (format::OBJECT_LEN as u32).into(),
        row_count: rows.row_count.into(),
        object_count: objects.count().into(),
        sum_count: objects.sum_count.into(),
        sums_per_frame: (format::SUMS_PER_FRAME as u32).into(),
        block_size: (BLOCK_SIZE as u32).into(),
        section_count: (sections.len() as u32).into(),
        reserved: [0; 28],
    };
    let mut part = PartWriter::create(out, end)?;
    part.write(header.as_bytes())?;
    part.write(sections.as_bytes())?;
    for section in &sections {
        part.pad_to(section.offset.get())?;
        match section.id.get() {
            format::ROWS => write_rows(&mut part, rows)?,
            format::NAMES => part.append(&mut rows.names)?,
            format::FILE_RANKS => part.append(&mut rows.ranks)?,
            format::OBJECTS => part.append(&mut objects.rows)?,
            format::KEYS => part.append(&mut objects.keys)?,
            format::OBJECT_DIGESTS => part.append(&mut objects.digests)?,
            _ => part.append(&mut objects.frames)?,
        }
    }
    part.finish()
}

/// The rows, each directory's joined with its children.
fn write_rows(part: &mut PartWriter, rows: &mut Rows) -> Result<(), TreeError> {
    let mut placed = rows.rows.reader()?;
    let mut all_children = rows.children.reader()?;
    let mut row = Row::new_zeroed();
    let mut children = Children::default();
    // The compressor is asked for a chunk at a time: a call for every row costs more than the row.
    let mut chunk = Vec::with_capacity(1024 * format::ROW_LEN);
    for _ in 0..rows.row_count {
        placed.read_exact(row.as_mut_bytes())?;
        if row.mode.get() & format::TYPE_MASK == format::TYPE_DIRECTORY {
            all_children.read_exact(children.as_mut_bytes())?;
            row.link = children.first;
            row.size =
                (u64::from(children.subdirectories.get()) << 32 | u64::from(children.count.get())).into();
        }
        chunk.extend_from_slice(row.as_bytes());
        if chunk.len() == chunk.capacity() {
            part.write(&chunk)?;
            chunk.clear();
        }
    }
    part.write(&chunk)
}

#[cfg(test)]
mod tests;
