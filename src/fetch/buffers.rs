//! The memory that blocks arrive in, used again and again.
//!
//! A block is as large as what the allocator maps and unmaps each time: without this, every block costs page
//! faults, which measured as much as its copies.

use std::sync::Arc;

use bytes::Bytes;
use parking_lot::Mutex;

use crate::block::BLOCK_SIZE;

/// Idle buffers kept: 32 MiB.
const MOST_IDLE: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Buffers {
    idle: Mutex<Vec<Vec<u8>>>,
}

impl Buffers {
    /// An empty buffer with room for a block.
    pub fn take(&self) -> Vec<u8> {
        let idle = self.idle.lock().pop();
        idle.unwrap_or_else(|| Vec::with_capacity(usize::try_from(BLOCK_SIZE).unwrap_or(0)))
    }

    /// The buffer as bytes; it comes back when the last of them is dropped.
    pub fn freeze(self: &Arc<Self>, bytes: Vec<u8>) -> Bytes {
        Bytes::from_owner(Lent {
            bytes,
            home: Arc::clone(self),
        })
    }
}

struct Lent {
    bytes: Vec<u8>,
    home: Arc<Buffers>,
}

impl AsRef<[u8]> for Lent {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Lent {
    fn drop(&mut self) {
        let mut bytes = std::mem::take(&mut self.bytes);
        bytes.clear();
        let mut idle = self.home.idle.lock();
        if idle.len() < MOST_IDLE {
            idle.push(bytes);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_comes_back_empty_when_the_last_slice_of_it_goes() {
        let buffers = Arc::new(Buffers::default());
        let mut first = buffers.take();
        first.extend_from_slice(b"block");
        let at = first.as_ptr();
        let bytes = buffers.freeze(first);
        let slice = bytes.slice(1..3);
        drop(bytes);
        let other = buffers.take();
        assert_ne!(other.as_ptr(), at, "lent twice");
        assert_eq!(&slice[..], b"lo");
        drop(slice);
        // `other` is still out, so this is the only idle one.
        let again = buffers.take();
        drop(other);
        assert!(again.is_empty() && again.as_ptr() == at);
    }
}
