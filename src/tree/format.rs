//! The bytes of a rows part: header, section table, rows, object rows.
//!
//! Owns the layout and the checks that concern nothing but the header; `docs/tree-format.md` is its
//! prose. Everything is little-endian and unaligned, so any byte slice can be read in place.
//! Must not know how a part is built, mapped or fetched.

use std::ops::Range;

use zerocopy::{
    FromBytes, Immutable, IntoBytes, KnownLayout, Unaligned,
    little_endian::{I64, U16, U32, U64},
};

use super::{Totals, TreeError};
use crate::block::BLOCK_SIZE;

pub(super) const MAGIC: [u8; 8] = *b"GRIDTREE";
pub(super) const DIGESTS_MAGIC: [u8; 8] = *b"GRIDDGST";
pub(super) const FORMAT_VERSION: u32 = 1;
/// Every section starts on a multiple of this, so that a row never straddles more cache lines than
/// it must.
pub(super) const SECTION_ALIGN: u64 = 64;
/// A section table longer than this is damage, not growth.
const MAX_SECTIONS: u32 = 256;

/// Objects carry sums: the sums part exists and section [`SUM_FRAMES`] is present.
pub(super) const FLAG_SUMS: u64 = 1;
/// Objects may carry digests: section [`OBJECT_DIGESTS`] is present.
pub(super) const FLAG_OBJECT_DIGESTS: u64 = 2;
/// A set bit that a reader does not know means that it cannot read the tree.
pub(super) const KNOWN_FLAGS: u64 = FLAG_SUMS | FLAG_OBJECT_DIGESTS;

pub(super) const ROWS: u32 = 1;
pub(super) const NAMES: u32 = 2;
pub(super) const FILE_RANKS: u32 = 3;
pub(super) const OBJECTS: u32 = 4;
pub(super) const KEYS: u32 = 5;
pub(super) const OBJECT_DIGESTS: u32 = 6;
pub(super) const SUM_FRAMES: u32 = 7;

/// Rows between two file ranks: one `u32` says how many files lie before every 64th row.
pub(super) const ROWS_PER_RANK: u32 = 64;
/// Sums in one frame of the sums part: 64 KiB, 512 MiB of data.
pub(super) const SUMS_PER_FRAME: u64 = 4096;
pub(super) const DIGEST_LEN: usize = 32;
pub(super) const MAX_NAME: usize = 255;
/// Linux's PATH_MAX less its NUL: nothing deeper can be opened by path, so nothing deeper is built.
pub(super) const MAX_PATH: usize = 4095;
pub(super) const MAX_TARGET: usize = 4095;
/// In [`Row::link`] of an empty file.
pub(super) const NO_OBJECT: u32 = u32::MAX;

pub(super) const TYPE_MASK: u16 = 0o170000;
pub(super) const TYPE_DIRECTORY: u16 = 0o040000;
pub(super) const TYPE_FILE: u16 = 0o100000;
pub(super) const TYPE_SYMLINK: u16 = 0o120000;
pub(super) const MODE_MASK: u16 = 0o7777;

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Header {
    pub magic: [u8; 8],
    pub version: U32,
    /// Bytes before the first section: this header and the section table, padded.
    pub header_len: U32,
    pub flags: U64,
    /// Bytes of the whole part.
    pub total_len: U64,
    pub files: U64,
    pub directories: U64,
    pub symlinks: U64,
    pub bytes: U64,
    pub row_len: U32,
    pub object_len: U32,
    pub row_count: U32,
    pub object_count: U32,
    pub sum_count: U64,
    pub sums_per_frame: U32,
    pub block_size: U32,
    pub section_count: U32,
    pub reserved: [u8; 28],
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Section {
    pub id: U32,
    pub reserved: U32,
    pub offset: U64,
    pub len: U64,
}

/// One directory, file or symlink.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct Row {
    pub parent: U32,
    pub name_len: U16,
    /// File type in the bits of `S_IFMT`, permissions below.
    pub mode: U16,
    /// Into the names. A symlink's target follows its name.
    pub name_offset: U64,
    pub modified_seconds: I64,
    pub modified_nanos: U32,
    /// Directory: the first child. File: its object. Symlink: the length of its target.
    pub link: U32,
    /// File: its size. Directory: children in the low half, directories among them in the high half.
    pub size: U64,
    /// File: where it starts in its object.
    pub offset: U64,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct ObjectRow {
    /// Into the keys. The pin's text follows the key.
    pub key_offset: U64,
    pub key_len: U32,
    pub pin_len: U16,
    pub pin_kind: u8,
    /// 1: the object has a digest.
    pub has_digest: u8,
    pub size: U64,
    /// Index of the sum of the object's first block.
    pub first_sum: U64,
}

pub(super) const PIN_CONTENT: u8 = 0;
pub(super) const PIN_ETAG: u8 = 1;
pub(super) const PIN_VERSION_ID: u8 = 2;

pub(super) const HEADER_LEN: usize = size_of::<Header>();
pub(super) const SECTION_LEN: usize = size_of::<Section>();
pub(super) const ROW_LEN: usize = size_of::<Row>();
pub(super) const OBJECT_LEN: usize = size_of::<ObjectRow>();

const _: () = assert!(HEADER_LEN == 128 && SECTION_LEN == 24 && ROW_LEN == 48 && OBJECT_LEN == 32);

/// The header of a digests part.
#[derive(Clone, Copy, FromBytes, IntoBytes, KnownLayout, Immutable, Unaligned)]
#[repr(C)]
pub(super) struct DigestsHeader {
    pub magic: [u8; 8],
    pub version: U32,
    pub reserved: U32,
    pub count: U64,
    pub reserved_too: U64,
}

pub(super) const DIGESTS_HEADER_LEN: usize = size_of::<DigestsHeader>();
const _: () = assert!(DIGESTS_HEADER_LEN == 32);

/// A checked header: every range lies within the part, and every table has the length its count asks.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub row_count: u32,
    pub object_count: u32,
    pub sum_count: u64,
    pub has_sums: bool,
    pub totals: Totals,
    pub rows: Range<usize>,
    pub names: Range<usize>,
    pub ranks: Range<usize>,
    pub objects: Range<usize>,
    pub keys: Range<usize>,
    /// Empty where no object has a digest.
    pub object_digests: Range<usize>,
    pub sum_frames: Range<usize>,
}

fn damaged(what: &'static str) -> TreeError {
    TreeError::Header { what }
}

impl Layout {
    /// Reads and checks the header and the section table: constant time, whatever the tree's size.
    pub fn read(part: &[u8]) -> Result<Self, TreeError> {
        let (header, rest) = Header::ref_from_prefix(part).map_err(|_| damaged("too short for a header"))?;
        if header.magic != MAGIC {
            return Err(damaged("it does not start with GRIDTREE"));
        }
        if header.version.get() != FORMAT_VERSION {
            return Err(TreeError::UnknownFormat {
                version: header.version.get(),
            });
        }
        let flags = header.flags.get();
        if flags & !KNOWN_FLAGS != 0 {
            return Err(TreeError::UnknownFeature {
                flags: flags & !KNOWN_FLAGS,
            });
        }
        if header.total_len.get() != part.len() as u64 {
            return Err(damaged("it is longer or shorter than its header says"));
        }
        if header.row_len.get() as usize != ROW_LEN || header.object_len.get() as usize != OBJECT_LEN {
            return Err(damaged("its rows have another length"));
        }
        if u64::from(header.block_size.get()) != BLOCK_SIZE
            || u64::from(header.sums_per_frame.get()) != SUMS_PER_FRAME
        {
            return Err(damaged("its blocks or frames have another size"));
        }
        let count = header.section_count.get();
        let header_len = header.header_len.get() as usize;
        if count > MAX_SECTIONS
            || header_len < HEADER_LEN + count as usize * SECTION_LEN
            || header_len > part.len()
        {
            return Err(damaged("its section table does not fit"));
        }
        let (table, _) = <[Section]>::ref_from_prefix_with_elems(rest, count as usize)
            .map_err(|_| damaged("its section table does not fit"))?;
        // Sections that this reader does not know are skipped: that is the room to grow.
        let section = |id: u32| -> Result<Option<Range<usize>>, TreeError> {
            let mut found = None;
            for section in table.iter().filter(|section| section.id.get() == id) {
                let (offset, len) = (section.offset.get(), section.len.get());
                let end = offset.checked_add(len).filter(|end| *end <= part.len() as u64);
                let Some(end) = end else {
                    return Err(damaged("a section reaches beyond its end"));
                };
                if offset < header_len as u64 {
                    return Err(damaged("a section overlaps the header"));
                }
                if found.replace(offset as usize..end as usize).is_some() {
                    return Err(damaged("a section appears twice"));
                }
            }
            Ok(found)
        };
        let need = |id| section(id)?.ok_or(damaged("a section is missing"));
        let (row_count, object_count) = (header.row_count.get(), header.object_count.get());
        let sum_count = header.sum_count.get();
        let has_sums = flags & FLAG_SUMS != 0;
        let object_digests = flags & FLAG_OBJECT_DIGESTS != 0;
        let layout = Self {
            row_count,
            object_count,
            sum_count,
            has_sums,
            totals: Totals {
                files: header.files.get(),
                directories: header.directories.get(),
                symlinks: header.symlinks.get(),
                bytes: header.bytes.get(),
            },
            rows: need(ROWS)?,
            names: need(NAMES)?,
            ranks: need(FILE_RANKS)?,
            objects: need(OBJECTS)?,
            keys: need(KEYS)?,
            object_digests: if object_digests {
                need(OBJECT_DIGESTS)?
            } else {
                0..0
            },
            sum_frames: if has_sums { need(SUM_FRAMES)? } else { 0..0 },
        };
        let is = |range: &Range<usize>, count: u64, len: usize| {
            count.checked_mul(len as u64) == Some(range.len() as u64)
        };
        let digests = if object_digests {
            u64::from(object_count)
        } else {
            0
        };
        let frames = if has_sums {
            sum_count.div_ceil(SUMS_PER_FRAME)
        } else {
            0
        };
        if !(is(&layout.rows, row_count.into(), ROW_LEN)
            && is(&layout.ranks, row_count.div_ceil(ROWS_PER_RANK).into(), 4)
            && is(&layout.objects, object_count.into(), OBJECT_LEN)
            && is(&layout.object_digests, digests, DIGEST_LEN)
            && is(&layout.sum_frames, frames, DIGEST_LEN))
        {
            return Err(damaged("a section is longer or shorter than its count says"));
        }
        if !has_sums && sum_count != 0 {
            return Err(damaged("it counts sums that it does not have"));
        }
        let totals = &layout.totals;
        let rows = totals
            .files
            .checked_add(totals.directories)
            .and_then(|sum| sum.checked_add(totals.symlinks));
        if row_count == 0 || rows != Some(row_count.into()) {
            return Err(damaged("its totals do not add up to its rows"));
        }
        Ok(layout)
    }
}

/// Why `name` cannot be the name of a file or directory; `None` if it can.
pub(super) fn name_fault(name: &[u8]) -> Option<&'static str> {
    match name {
        b"" => Some("it has an empty component"),
        b"." | b".." => Some("it has the component . or .."),
        _ if name.len() > MAX_NAME => Some("it has a component of more than 255 bytes"),
        _ if name.contains(&0) => Some("it holds a NUL"),
        _ if name.contains(&b'/') => Some("it holds a slash"),
        _ => None,
    }
}
