//! How much memory this process may have.

use std::{fs, path::Path};

use nix::sys::sysinfo::sysinfo;

/// The machine's memory, or the least that a control group which this process is in allows, where that is
/// less. `None`: neither can be read.
pub fn allowed() -> Option<u64> {
    let machine = sysinfo().ok().map(|info| info.ram_total());
    let groups = fs::read_to_string("/proc/self/cgroup").ok();
    let group = groups.and_then(|groups| least(&groups, Path::new("/sys/fs/cgroup")));
    machine.into_iter().chain(group).min()
}

/// `groups`: lines of `hierarchy:controllers:path`, as in cgroups(7). A group is bounded by those above it, too.
fn least(groups: &str, mounted: &Path) -> Option<u64> {
    let limits = groups.lines().filter_map(|line| {
        let mut parts = line.splitn(3, ':');
        let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
        let (top, file) = match controllers {
            "" => (mounted.to_owned(), "memory.max"),
            named if named.split(',').any(|name| name == "memory") => {
                (mounted.join("memory"), "memory.limit_in_bytes")
            }
            _ => return None,
        };
        let group = top.join(path.trim_start_matches('/'));
        let limits = group.ancestors().take_while(|above| above.starts_with(&top));
        // "max" is no number, and no limit.
        let read = |above: &Path| {
            fs::read_to_string(above.join(file))
                .ok()?
                .trim()
                .parse::<u64>()
                .ok()
        };
        limits.filter_map(read).min()
    });
    limits.min()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_narrowest_group_above_counts() {
        let dir = tempfile::tempdir().unwrap();
        let write = |path: &str, text: &str| {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        };
        write("a/memory.max", "1000\n");
        write("a/b/memory.max", "2000\n");
        write("a/b/c/memory.max", "max\n");
        write("memory/job/memory.limit_in_bytes", "700\n");
        let least = |groups| least(groups, dir.path());
        assert_eq!(least("0::/a/b/c\n"), Some(1000));
        assert_eq!(least("0::/\n"), None);
        assert_eq!(least("0::/gone/long/ago\n"), None);
        assert_eq!(least("5:cpu:/a\n4:hugetlb,memory:/job\n0::/a/b/c\n"), Some(700));
        assert_eq!(least("nonsense"), None);
    }
}
