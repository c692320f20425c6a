//! Independent oracles: `diff`, and every entry's name, type, size, mode, mtime and link target as
//! `find` prints them.

use std::path::Path;

use super::sandbox::{Sandbox, told};

/// Panics with the differences, if there are any between `source` and `mount`.
pub fn assert_same_tree(sandbox: &Sandbox, source: &Path, mount: &Path) {
    let diff = sandbox
        .program("diff")
        .args(["-r", "--no-dereference"])
        .arg(source)
        .arg(mount)
        .output()
        .unwrap();
    assert!(
        diff.status.success() && diff.stdout.is_empty(),
        "diff: {}",
        told(&diff)
    );
    let of_source = listing(sandbox, source);
    let of_mount = listing(sandbox, mount);
    if of_source != of_mount {
        let differing: Vec<_> = of_source
            .iter()
            .zip(&of_mount)
            .filter(|(a, b)| a != b)
            .take(5)
            .map(|(a, b)| format!("{}\n{}", String::from_utf8_lossy(a), String::from_utf8_lossy(b)))
            .collect();
        panic!(
            "{} entries against {}; the first that differ:\n{}",
            of_source.len(),
            of_mount.len(),
            differing.join("\n\n")
        );
    }
    assert!(of_source.len() > 1, "nothing was compared");
}

/// One line per entry, sorted: path, type, size (directories have none that compares), mode, mtime to the
/// nanosecond, link target.
fn listing(sandbox: &Sandbox, dir: &Path) -> Vec<Vec<u8>> {
    let found = sandbox
        .program("find")
        .arg(dir)
        .args(["-type", "d", "-printf", "%P\\t%y\\t%#m\\t%T@\\0", "-o"])
        .args(["-printf", "%P\\t%y\\t%s\\t%#m\\t%T@\\t%l\\0"])
        .output()
        .unwrap();
    assert!(found.status.success(), "find: {}", told(&found));
    let mut lines: Vec<Vec<u8>> = found
        .stdout
        .split(|byte| *byte == 0)
        .map(<[u8]>::to_vec)
        .collect();
    lines.sort();
    lines
}
