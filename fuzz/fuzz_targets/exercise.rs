//! Calls every accessor of a tree that may be damaged. Answers may be wrong; nothing may panic, hang or
//! leave the part. Included by the targets as a module.

use grid_mount::tree::{EntryKind, ObjectNo, RowNo, Tree};

/// Rows and objects looked at in one run: large tables add time, not cases.
const LIMIT: u32 = 1 << 10;

pub fn exercise(tree: &Tree) {
    let rows = tree.row_count();
    for row in (0..rows.min(LIMIT)).chain([rows, u32::MAX]).map(RowNo) {
        if let Ok(entry) = tree.entry(row) {
            assert!(entry.parent <= row);
            let _ = tree.lookup(entry.parent, entry.name);
            if let EntryKind::Directory { children, .. } = entry.kind {
                assert!(children.end <= rows && (children.is_empty() || children.start > row.0));
            }
        }
        if let Ok(path) = tree.path(row) {
            let _ = tree.find(&path);
        }
        let _ = (
            tree.lookup(row, b"a"),
            tree.next_file(row),
            tree.object_range(row),
        );
    }
    let objects = tree.object_count();
    for object in (0..objects.min(LIMIT)).chain([objects, u32::MAX]).map(ObjectNo) {
        let _ = tree.object(object);
        for frame in tree.sum_frames(object, 0..u64::MAX).unwrap_or_default() {
            let _ = frame.pick(&[0; 1 << 16]);
        }
    }
}
