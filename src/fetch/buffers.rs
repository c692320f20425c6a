//! The memory that blocks arrive in, used again and again.
//!
//! A block is as large as what the allocator maps and unmaps each time: without this, every block costs page
//! faults, which measured as much as its copies. So blocks are pieces of slabs, which are large enough for the
//! kernel's huge pages and go back to it only when none of their pieces is used.

use std::{
    collections::{BTreeMap, BTreeSet},
    ptr::NonNull,
    sync::Arc,
};

use bytes::{Bytes, BytesMut};
use nix::sys::mman::{MmapAdvise, madvise};
use parking_lot::Mutex;

use crate::block::BLOCK_SIZE;

const PIECE: usize = BLOCK_SIZE as usize;
const PIECES: usize = 64;
/// Slabs begin where a huge page may.
const HUGE_PAGE: usize = 2 << 20;
/// Unused pieces kept: 32 MiB.
const MOST_IDLE: usize = 256;
/// Unused answers kept, each as long as the longest read that it served: a mebibyte, from a kernel.
const MOST_ANSWERS: usize = 16;
const LONGEST_KEPT: usize = 1 << 20;

#[derive(Debug, Default)]
pub(super) struct Buffers {
    state: Mutex<State>,
    answers: Mutex<Vec<Vec<u8>>>,
}

#[derive(Debug, Default)]
struct State {
    slabs: BTreeMap<u64, Slab>,
    /// Those that have an unused piece. The oldest gives first, so that the youngest become empty.
    with_room: BTreeSet<u64>,
    idle: usize,
    made: u64,
}

#[derive(Debug)]
struct Slab {
    idle: Vec<BytesMut>,
}

/// An empty piece of memory with room for one block.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: BytesMut,
    slab: u64,
    home: Arc<Buffers>,
}

impl Buffers {
    pub fn take(self: &Arc<Self>) -> Buffer {
        let taken = self.state.lock().take();
        let (slab, bytes) = taken.unwrap_or_else(|| {
            // The kernel is asked for memory without the lock; two may do so at once.
            let pieces = new_slab();
            self.state.lock().add(pieces)
        });
        Buffer {
            bytes,
            slab,
            home: Arc::clone(self),
        }
    }

    /// An empty buffer for the blocks of one read together.
    pub fn answer(&self) -> Vec<u8> {
        self.answers.lock().pop().unwrap_or_default()
    }

    /// The answer as bytes; its memory is used again when the last of them is dropped.
    pub fn freeze(self: &Arc<Self>, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(Answer {
            bytes,
            home: Arc::clone(self),
        })
    }

    fn put_back(&self, slab: u64, bytes: BytesMut) {
        // What is given back to the kernel is given back without the lock.
        let _superfluous = self.state.lock().put_back(slab, bytes);
    }
}

impl State {
    fn take(&mut self) -> Option<(u64, BytesMut)> {
        let number = *self.with_room.first()?;
        let slab = self.slabs.get_mut(&number)?;
        let piece = slab.idle.pop()?;
        self.idle -= 1;
        if slab.idle.is_empty() {
            self.with_room.remove(&number);
        }
        Some((number, piece))
    }

    /// Adds a slab and takes its first piece.
    fn add(&mut self, mut pieces: Vec<BytesMut>) -> (u64, BytesMut) {
        let number = self.made;
        self.made += 1;
        let first = pieces.pop().unwrap_or_default();
        self.idle += pieces.len();
        self.slabs.insert(number, Slab { idle: pieces });
        self.with_room.insert(number);
        (number, first)
    }

    fn put_back(&mut self, number: u64, piece: BytesMut) -> Option<Slab> {
        let slab = self.slabs.get_mut(&number)?;
        slab.idle.push(piece);
        self.idle += 1;
        self.with_room.insert(number);
        let superfluous = slab.idle.len() == PIECES && self.idle >= MOST_IDLE + PIECES;
        if !superfluous {
            return None;
        }
        self.idle -= PIECES;
        self.with_room.remove(&number);
        self.slabs.remove(&number)
    }
}

/// Pieces of one allocation, each with exactly its own room.
fn new_slab() -> Vec<BytesMut> {
    let mut whole = BytesMut::with_capacity(PIECES * PIECE + HUGE_PAGE);
    let start = whole.spare_capacity_mut().as_mut_ptr();
    let mut rest = whole.split_off(start.align_offset(HUGE_PAGE).min(HUGE_PAGE));
    let room = rest.spare_capacity_mut();
    if let Some(start) = NonNull::new(room.as_mut_ptr()) {
        // SAFETY: the range is memory that `rest` owns, and this advice changes what backs it, never what it
        // holds. Where the kernel does not take it, pages are small.
        let _only_advice = unsafe { madvise(start.cast(), PIECES * PIECE, MmapAdvise::MADV_HUGEPAGE) };
    }
    (0..PIECES)
        .map(|_| {
            let after = rest.split_off(PIECE);
            std::mem::replace(&mut rest, after)
        })
        .collect()
}

impl Buffer {
    /// Appends what fits of `bytes` within `length` bytes in all, at most a block, and takes that much off.
    pub fn take_from(&mut self, bytes: &mut Bytes, length: usize) {
        let room = length.min(PIECE).saturating_sub(self.bytes.len());
        self.bytes
            .extend_from_slice(&bytes.split_to(room.min(bytes.len())));
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The buffer as bytes; its memory is used again when the last of them is dropped.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        self.home.put_back(self.slab, bytes);
    }
}

struct Answer {
    bytes: Vec<u8>,
    home: Arc<Buffers>,
}

impl AsRef<[u8]> for Answer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Answer {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        let mut answers = self.home.answers.lock();
        if answers.len() < MOST_ANSWERS && bytes.capacity() <= LONGEST_KEPT {
            answers.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn filled(buffers: &Arc<Buffers>, with: u8) -> Bytes {
        let mut buffer = buffers.take();
        let mut bytes = Bytes::from(vec![with; 2 * PIECE]);
        buffer.take_from(&mut bytes, PIECE);
        assert_eq!((buffer.len(), bytes.len()), (PIECE, PIECE));
        buffer.freeze()
    }

    #[test]
    fn a_piece_comes_back_when_the_last_slice_of_it_goes() {
        let buffers = Arc::new(Buffers::default());
        let first = filled(&buffers, 1);
        let slice = first.slice(1..3);
        drop(first);
        let others: Vec<_> = (1..PIECES).map(|_| filled(&buffers, 2)).collect();
        assert_eq!(buffers.state.lock().slabs.len(), 1);
        assert_eq!(&slice[..], [1, 1]);
        drop(slice);
        let last = filled(&buffers, 3);
        assert_eq!(buffers.state.lock().slabs.len(), 1, "the piece did not come back");
        assert!(others.iter().all(|bytes| bytes.iter().all(|byte| *byte == 2)) && last[0] == 3);
    }

    #[test]
    fn what_is_no_longer_used_goes_back_to_the_kernel() {
        let buffers = Arc::new(Buffers::default());
        let many: Vec<_> = (0..20 * PIECES).map(|_| filled(&buffers, 1)).collect();
        drop(many);
        let state = buffers.state.lock();
        assert!(state.idle < MOST_IDLE + PIECES, "{} pieces are kept", state.idle);
        assert_eq!(state.slabs.len() * PIECES, state.idle);
    }

    proptest! {
        /// Whatever is taken and dropped in whatever order, nobody's bytes are somebody else's, and the memory
        /// is at most what was in use at once, and a little.
        #[test]
        fn pieces_are_never_shared(steps in prop::collection::vec(any::<(bool, prop::sample::Index)>(), 1..400)) {
            let buffers = Arc::new(Buffers::default());
            let mut held: Vec<(u8, Bytes)> = Vec::new();
            let mut most = 0;
            for (number, (take, index)) in steps.into_iter().enumerate() {
                if take || held.is_empty() {
                    let with = number as u8;
                    held.push((with, filled(&buffers, with)));
                } else {
                    let (with, bytes) = held.swap_remove(index.index(held.len()));
                    prop_assert!(bytes.iter().all(|byte| *byte == with));
                }
                most = most.max(held.len());
            }
            prop_assert!(held.iter().all(|(with, bytes)| bytes.iter().all(|byte| byte == with)));
            let slabs = buffers.state.lock().slabs.len();
            prop_assert!(slabs <= most.div_ceil(PIECES), "{slabs} slabs for {most} pieces at once");
        }
    }
}
