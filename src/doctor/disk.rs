//! The cache's disk: room, speed, and whether space is given back in parts.

use std::{
    fs::{self, File, Permissions},
    io::{self, Write as _},
    os::unix::fs::{MetadataExt as _, PermissionsExt as _},
    path::Path,
    time::Instant,
};

use nix::fcntl::{FallocateFlags, fallocate};

use super::{Finding, Patient, Verdict};

/// Written to learn the speed, without a name.
const WRITTEN: usize = 32 << 20;
/// A slower disk is slower than the network of a session host.
const SLOW: f64 = 200e6;

pub(super) fn examine(patient: &Patient) -> Vec<Finding> {
    let dir = &patient.cache_dir;
    let existing = dir.ancestors().find(|dir| dir.is_dir()).unwrap_or(dir);
    let mut findings = vec![directory(patient, dir)];
    findings.extend(room(patient, existing));
    findings.extend(trial(existing));
    findings
}

fn directory(patient: &Patient, dir: &Path) -> Finding {
    let shown = dir.display();
    match fs::metadata(dir) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Finding::good(
            "cache-directory",
            format!("{shown} will be made by the first mount"),
        ),
        Err(error) => Finding::new("cache-directory", Verdict::Bad, format!("{shown}: {error}"))
            .costs("nothing can be mounted")
            .mend("name another directory: --cache-dir, GRID_MOUNT_CACHE_DIR, cache_dir"),
        Ok(metadata) if metadata.mode() & 0o077 != 0 => Finding::new(
            "cache-directory",
            Verdict::Warning,
            format!("others may look into {shown}"),
        )
        .costs("other users may read what you have read")
        .mend(format!("`chmod 700 {shown}`"))
        .fixed_by(patient.fix, || {
            fs::set_permissions(dir, Permissions::from_mode(0o700))
        }),
        Ok(_) => Finding::good("cache-directory", format!("{shown} is yours alone")),
    }
}

fn room(patient: &Patient, existing: &Path) -> Option<Finding> {
    let disk = nix::sys::statvfs::statvfs(existing).ok()?;
    let free = disk.blocks_available() * disk.fragment_size();
    let left = free.saturating_sub(patient.cache_min_free);
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30));
    let found = format!(
        "{} free, of which {} are left to others; the cache may take {}",
        gib(free),
        gib(patient.cache_min_free),
        gib(patient.cache_size)
    );
    Some(if left == 0 {
        Finding::new("cache-space", Verdict::Warning, found)
            .costs("nothing is cached: what is read again is fetched again")
            .mend("free space, or name another disk with --cache-dir")
    } else {
        Finding::good("cache-space", found)
    })
}

/// Writes, reads and punches a file that has no name and so goes whatever happens.
fn trial(existing: &Path) -> Vec<Finding> {
    let tried = (|| -> io::Result<_> {
        let mut file = tempfile::tempfile_in(existing)?;
        let started = Instant::now();
        // Not zeros: some disks do not write those.
        let chunk: Vec<u8> = (0..1 << 20).map(|_| rand::random::<u8>()).collect();
        for _ in 0..WRITTEN / chunk.len() {
            file.write_all(&chunk)?;
        }
        file.sync_data()?;
        let rate = WRITTEN as f64 / started.elapsed().as_secs_f64();
        let before = file.metadata()?.blocks();
        let punched = punch(&file).is_ok() && file.metadata()?.blocks() < before;
        Ok((rate, punched))
    })();
    let (rate, punched) = match tried {
        Ok(tried) => tried,
        Err(error) => {
            return vec![
                Finding::new(
                    "cache-speed",
                    Verdict::Bad,
                    format!("{} cannot be written to: {error}", existing.display()),
                )
                .costs("nothing is cached")
                .mend("free space or inodes, or name another disk with --cache-dir"),
            ];
        }
    };
    let found = format!("{} takes {:.0} MB/s", existing.display(), rate / 1e6);
    let speed = if rate < SLOW {
        Finding::new("cache-speed", Verdict::Warning, found)
            .costs("what arrives faster than that is not cached, and is fetched again")
            .mend("put the cache on a local SSD: --cache-dir")
    } else {
        Finding::good("cache-speed", found)
    };
    let holes = if punched {
        Finding::good("cache-holes", "parts of files give their space back")
    } else {
        Finding::new(
            "cache-holes",
            Verdict::Warning,
            "the file system does not give back parts of files",
        )
        .costs("space is freed by whole objects only: more is fetched again")
        .mend("put the cache on ext4, XFS or btrfs: --cache-dir")
    };
    vec![speed, holes]
}

fn punch(file: &File) -> nix::Result<()> {
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    fallocate(file, flags, 0, (WRITTEN / 2) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Fix;

    fn patient(dir: &Path) -> Patient {
        Patient {
            root: "/".into(),
            is_root: false,
            cache_dir: dir.to_owned(),
            cache_size: 1 << 20,
            cache_min_free: 0,
            catalog: "file:///nowhere".parse().unwrap(),
            user: "alice".parse().unwrap(),
            store_settings: Default::default(),
            origins: Vec::new(),
            loans: Vec::new(),
            fix: false,
        }
    }

    #[test]
    fn an_open_cache_is_closed_on_demand() {
        let scratch = tempfile::tempdir().unwrap();
        let dir = scratch.path().join("cache");
        let mut patient = patient(&dir);
        assert_eq!(directory(&patient, &dir).verdict, Verdict::Good);
        fs::create_dir(&dir).unwrap();
        fs::set_permissions(&dir, Permissions::from_mode(0o700)).unwrap();
        assert_eq!(directory(&patient, &dir).verdict, Verdict::Good);
        fs::set_permissions(&dir, Permissions::from_mode(0o755)).unwrap();
        assert_eq!(directory(&patient, &dir).fix, Fix::Possible);
        patient.fix = true;
        assert_eq!(directory(&patient, &dir).fix, Fix::Done);
        assert_eq!(fs::metadata(&dir).unwrap().mode() & 0o777, 0o700);
    }

    #[test]
    fn no_room_is_found() {
        let scratch = tempfile::tempdir().unwrap();
        let mut patient = patient(scratch.path());
        let verdict = |patient: &Patient| room(patient, scratch.path()).unwrap().verdict;
        assert_eq!(verdict(&patient), Verdict::Good);
        patient.cache_min_free = u64::MAX;
        assert_eq!(verdict(&patient), Verdict::Warning);
    }
}
