//! Bundles: objects that hold several small files.
//!
//! Owns the layout: files in the order given, each from a 4 KiB boundary, at most 64 MiB. The same
//! files in the same order always make the same bundles, so an interrupted publish finds what it
//! has already uploaded under the same digests.

use bytes::{Bytes, BytesMut};

use super::content::block_sums;
use crate::digest::{BlockSum, Digest};

/// Files of this size and over become objects of their own.
pub(super) const LARGE_FILE: u64 = 1 << 20;
/// No bundle is longer.
pub(super) const MAX_BUNDLE: usize = 64 << 20;
/// Each file starts at a multiple of this: a page, so that no two files share a cached page.
pub(super) const ALIGNMENT: u64 = 4 << 10;

/// What a file of `size` bytes takes up in a bundle.
pub(super) fn slot(size: u64) -> u64 {
    size.div_ceil(ALIGNMENT).saturating_mul(ALIGNMENT)
}

/// A bundle being filled.
pub(super) struct Bundle {
    bytes: BytesMut,
    limit: usize,
}

/// A bundle that takes no more files.
#[derive(Debug)]
pub(super) struct SealedBundle {
    pub bytes: Bytes,
    pub digest: Digest,
    pub sums: Vec<BlockSum>,
}

impl Bundle {
    pub fn new() -> Self {
        Self::with_limit(MAX_BUNDLE)
    }

    fn with_limit(limit: usize) -> Self {
        Self {
            bytes: BytesMut::new(),
            limit,
        }
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn next_offset(&self) -> usize {
        self.bytes.len().next_multiple_of(ALIGNMENT as usize)
    }

    /// An empty bundle takes any file, so that packing always gets on.
    pub fn has_room_for(&self, size: usize) -> bool {
        self.is_empty() || self.next_offset().saturating_add(size) <= self.limit
    }

    /// Adds one file's bytes and says where they begin.
    pub fn push(&mut self, bytes: &[u8]) -> u64 {
        let offset = self.next_offset();
        self.bytes.resize(offset, 0);
        self.bytes.extend_from_slice(bytes);
        offset as u64
    }

    /// Hashes the bundle: work for a blocking thread.
    pub fn seal(self) -> SealedBundle {
        let bytes = self.bytes.freeze();
        SealedBundle {
            digest: Digest::of(&bytes),
            sums: block_sums(&bytes),
            bytes,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn pack(files: &[Vec<u8>], limit: usize) -> Vec<(SealedBundle, Vec<(usize, u64)>)> {
        let mut sealed = Vec::new();
        let (mut bundle, mut places) = (Bundle::with_limit(limit), Vec::new());
        for (number, file) in files.iter().enumerate() {
            if !bundle.has_room_for(file.len()) {
                let full = std::mem::replace(&mut bundle, Bundle::with_limit(limit));
                sealed.push((full.seal(), std::mem::take(&mut places)));
            }
            places.push((number, bundle.push(file)));
        }
        sealed.push((bundle.seal(), places));
        sealed
    }

    proptest! {
        #[test]
        fn every_file_is_where_the_bundle_says(
            files in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 1..20_000), 1..30),
            limit in 20_000usize..100_000,
        ) {
            let bundles = pack(&files, limit);
            let mut seen = 0;
            for (bundle, places) in &bundles {
                prop_assert!(bundle.bytes.len() <= limit);
                prop_assert_eq!(bundle.digest, Digest::of(&bundle.bytes));
                let mut end = 0;
                for (number, offset) in places {
                    let (start, file) = (*offset as usize, &files[*number]);
                    prop_assert_eq!(*number, seen);
                    prop_assert_eq!(start as u64 % ALIGNMENT, 0);
                    prop_assert!(start >= end && start - end < ALIGNMENT as usize);
                    prop_assert_eq!(&bundle.bytes[start..start + file.len()], &file[..]);
                    end = start + file.len();
                    seen += 1;
                }
                prop_assert_eq!(end, bundle.bytes.len());
            }
            prop_assert_eq!(seen, files.len());
            // Deterministic: the same files in the same order are the same bundles.
            let again: Vec<_> = pack(&files, limit).iter().map(|(b, _)| b.digest).collect();
            prop_assert_eq!(again, bundles.iter().map(|(b, _)| b.digest).collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_slot_is_what_a_file_takes_up() {
        assert_eq!([0, 1, 4096, 4097].map(slot), [0, 4096, 4096, 8192]);
    }
}
