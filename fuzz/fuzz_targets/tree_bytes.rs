//! Any bytes as a rows part, as a digests part, and as a compressed part.
#![no_main]

mod exercise;

use grid_mount::{
    digest::Digest,
    tree::{Digests, RowNo, Tree, unpack},
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let tree = Tree::from_bytes(bytes.to_vec());
    if let Ok(tree) = &tree {
        exercise::exercise(tree);
    }
    if let (Ok(tree), Ok(digests)) = (&tree, Digests::from_bytes(bytes.to_vec())) {
        let _ = digests.of(tree, RowNo(0));
    }
    if let Ok(dir) = tempfile::tempdir() {
        assert!(unpack(bytes, 1 << 10, Digest::of(b"never"), &dir.path().join("part")).is_err());
    }
});
