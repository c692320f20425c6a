//! Who keeps a mount busy: found by looking at `/proc`, never at the mount.

use std::{
    fmt, fs,
    os::unix::ffi::OsStrExt,
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use super::{DeviceNo, mountinfo};

/// A process (or a mount on top) that uses a mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    /// 0 for a mount below the mount.
    pub pid: u32,
    pub name: String,
    /// What it holds, and how: a working directory, an open file, a mapping.
    pub how: String,
}

impl fmt::Display for Holder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.pid == 0 {
            return write!(f, "{} ({})", self.name, self.how);
        }
        write!(f, "{} (process {}, {})", self.name, self.pid, self.how)
    }
}

/// Everybody this user may look at, one line per process.
pub(super) fn holders(mount_point: &Path, device: Option<DeviceNo>) -> Vec<Holder> {
    let mut found: Vec<Holder> = mountinfo::mounts()
        .unwrap_or_default()
        .into_iter()
        .filter(|mount| mount.mount_point != mount_point && mount.mount_point.starts_with(mount_point))
        .map(|mount| Holder {
            pid: 0,
            name: mount.mount_point.display().to_string(),
            how: format!("a mount of type {}", mount.kind),
        })
        .collect();
    let processes = fs::read_dir("/proc").into_iter().flatten().flatten();
    let mut pids: Vec<u32> = processes
        .filter_map(|entry| entry.file_name().to_str().and_then(|name| name.parse().ok()))
        .collect();
    pids.sort_unstable();
    for pid in pids {
        let dir = PathBuf::from(format!("/proc/{pid}"));
        if let Some(how) = use_of(&dir, mount_point, device) {
            let name = fs::read_to_string(dir.join("comm")).unwrap_or_default();
            found.push(Holder {
                pid,
                name: name.trim_end().to_owned(),
                how,
            });
        }
    }
    found
}

fn use_of(process: &Path, mount_point: &Path, device: Option<DeviceNo>) -> Option<String> {
    // What these links say is made from the kernel's names: nothing asks the file system.
    let within = |link: PathBuf| {
        fs::read_link(link)
            .ok()
            .filter(|target| target.starts_with(mount_point))
    };
    for (link, what) in [
        ("cwd", "working directory"),
        ("root", "root directory"),
        ("exe", "running"),
    ] {
        if let Some(target) = within(process.join(link)) {
            return Some(format!("{what} {}", target.display()));
        }
    }
    for descriptor in fs::read_dir(process.join("fd")).into_iter().flatten().flatten() {
        if let Some(target) = within(descriptor.path()) {
            return Some(format!("open {}", target.display()));
        }
    }
    let maps = fs::read(process.join("maps")).ok()?;
    maps.split(|byte| *byte == b'\n')
        .find_map(|line| mapped(line, mount_point, device))
}

/// `7f…-7f… r--p 00000000 00:2a 17    /mnt/file`
fn mapped(line: &[u8], mount_point: &Path, device: Option<DeviceNo>) -> Option<String> {
    let line = String::from_utf8_lossy(line);
    let mut fields = line.split_ascii_whitespace();
    let on = fields.nth(3)?;
    fields.next()?;
    let path = fields.next()?;
    let ours = match device {
        Some(device) => on == format!("{:02x}:{:02x}", device.major, device.minor),
        None => path.as_bytes().starts_with(mount_point.as_os_str().as_bytes()),
    };
    ours.then(|| format!("mapped {path}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mappings_are_told_by_their_device() {
        let device = DeviceNo { major: 0, minor: 42 };
        let line = b"7f00-7f01 r--p 00000000 00:2a 17                 /mnt/file";
        assert_eq!(
            mapped(line, Path::new("/mnt"), Some(device)).as_deref(),
            Some("mapped /mnt/file")
        );
        assert_eq!(
            mapped(line, Path::new("/mnt"), None).as_deref(),
            Some("mapped /mnt/file")
        );
        let other = DeviceNo { major: 0, minor: 43 };
        assert_eq!(mapped(line, Path::new("/mnt"), Some(other)), None);
        assert_eq!(
            mapped(b"7f00-7f01 r--p 00000000 00:00 0", Path::new("/mnt"), None),
            None
        );
    }

    #[test]
    fn a_process_is_found_by_what_it_has_open() {
        let dir = tempfile::tempdir().unwrap();
        let dir = dir.path().canonicalize().unwrap();
        assert_eq!(holders(&dir, None), Vec::new());
        let file = fs::File::create(dir.join("held")).unwrap();
        let found = holders(&dir, None);
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].pid, std::process::id());
        assert!(found[0].how.contains("held"), "{}", found[0]);
        drop(file);
        assert_eq!(holders(&dir, None), Vec::new());
    }
}
