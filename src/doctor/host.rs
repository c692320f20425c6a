//! The kernel, its FUSE, the programs and files around it, and this process's limits.

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{MetadataExt as _, OpenOptionsExt as _},
    path::{Path, PathBuf},
};

use super::{Finding, Patient, Verdict};

/// RESEND and passthrough came with it.
const GOOD_KERNEL: (u32, u32) = (6, 9);
/// fsopen and friends, with which root mounts.
const LEAST_KERNEL: (u32, u32) = (5, 2);
/// The pages of the largest request that is asked for, 1 MiB.
const WANTED_PAGES: u64 = 256;
/// Each mount keeps up to 768 descriptors of cached objects.
const WANTED_FILES: u64 = 4096;
const KIND: &str = "fuse.grid-mount";

pub(super) fn examine(patient: &Patient) -> Vec<Finding> {
    let mut findings = vec![kernel(patient), device(patient)];
    findings.extend(fusermount(patient));
    findings.push(open_files(patient));
    findings.extend(pages(patient));
    findings.extend(timeouts(patient));
    findings.extend(updatedb(patient));
    findings
}

fn read(patient: &Patient, path: &str) -> Option<String> {
    fs::read_to_string(patient.root.join(path))
        .ok()
        .map(|text| text.trim().to_owned())
}

fn number(patient: &Patient, path: &str) -> Option<u64> {
    read(patient, path)?.parse().ok()
}

fn kernel(patient: &Patient) -> Finding {
    let release = read(patient, "proc/sys/kernel/osrelease").unwrap_or_default();
    let mut numbers = release
        .split(|c: char| !c.is_ascii_digit())
        .map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let found = format!("Linux {release}");
    if version < LEAST_KERNEL {
        Finding::new("kernel", Verdict::Bad, found)
            .costs("root cannot mount: the system calls for it came with Linux 5.2")
            .mend("boot a newer kernel; Linux 6.9 has everything")
    } else if version < GOOD_KERNEL {
        Finding::new("kernel", Verdict::Warning, found)
            .costs(
                "no passthrough (large files are read at less than half the disk's speed), and what was under way when an agent dies is lost",
            )
            .mend("boot Linux 6.9 or newer")
    } else if !patient.is_root {
        Finding::new("kernel", Verdict::Note, found)
            .costs("passthrough needs an agent with CAP_SYS_ADMIN, which yours has not")
            .mend("have the system's agent mount, where there is one")
    } else {
        Finding::good("kernel", format!("{found}: passthrough and resending"))
    }
}

fn device(patient: &Patient) -> Finding {
    let path = patient.root.join("dev/fuse");
    let bad = |found: String, mend: &str| {
        Finding::new("dev-fuse", Verdict::Bad, found)
            .costs("nothing can be mounted")
            .mend(mend)
    };
    if !path.exists() {
        return bad(
            "there is no /dev/fuse".into(),
            "`modprobe fuse`; for a container: `--device /dev/fuse`",
        );
    }
    let opened: std::io::Result<File> = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(nix::libc::O_CLOEXEC)
        .open(&path);
    match opened {
        Ok(_) => Finding::good("dev-fuse", "/dev/fuse can be opened"),
        Err(error) => bad(
            format!("/dev/fuse cannot be opened: {error}"),
            "`chmod 666 /dev/fuse` (udev has a rule for it); for a container: allow the device 10:229",
        ),
    }
}

/// What ordinary users need; root mounts without.
fn fusermount(patient: &Patient) -> Vec<Finding> {
    let program = on_path("fusermount3");
    let is_set_uid = |path: &PathBuf| {
        fs::metadata(path).is_ok_and(|metadata| metadata.uid() == 0 && metadata.mode() & 0o4000 != 0)
    };
    // To root it matters only for others.
    let worst = if patient.is_root {
        Verdict::Note
    } else {
        Verdict::Bad
    };
    let helper = match &program {
        None => Finding::new("fusermount3", worst, "fusermount3 is not on the PATH")
            .costs("ordinary users cannot mount")
            .mend("install the package fuse3"),
        Some(path) if !is_set_uid(path) => Finding::new(
            "fusermount3",
            worst,
            format!("{} is not set-uid root", path.display()),
        )
        .costs("ordinary users cannot mount")
        .mend(format!("`chown root {0} && chmod 4755 {0}`", path.display())),
        Some(path) => Finding::good("fusermount3", format!("{} is set-uid root", path.display())),
    };
    let conf = read(patient, "etc/fuse.conf").unwrap_or_default();
    let allowed = conf.lines().any(|line| line.trim() == "user_allow_other");
    let share = if allowed || patient.is_root {
        Finding::good("user-allow-other", "mounts can be shared with others")
    } else {
        Finding::new(
            "user-allow-other",
            Verdict::Note,
            "/etc/fuse.conf does not have user_allow_other",
        )
        .costs("your agent cannot make a mount that other users may read")
        .mend("an administrator adds the line `user_allow_other` to /etc/fuse.conf, if that is wanted")
    };
    vec![helper, share]
}

fn on_path(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_else(|| "/usr/bin:/bin".into());
    std::env::split_paths(&path)
        .map(|dir| dir.join(name))
        .find(|file| file.is_file())
}

fn open_files(patient: &Patient) -> Finding {
    let limits = read(patient, "proc/self/limits").unwrap_or_default();
    let soft = limits
        .lines()
        .find_map(|line| line.strip_prefix("Max open files"))
        .and_then(|line| line.split_whitespace().next().map(str::to_owned));
    let Some(soft) = soft else {
        return Finding::new(
            "open-files",
            Verdict::Note,
            "the limit of open files is not known",
        );
    };
    match soft.parse::<u64>() {
        Ok(limit) if limit < WANTED_FILES => Finding::new(
            "open-files",
            Verdict::Warning,
            format!("a process may have {limit} files open"),
        )
        .costs("with several mounts of many objects the agent runs out, and reads fail or miss the cache")
        .mend(format!(
            "`ulimit -n {WANTED_FILES}` before the agent starts; `LimitNOFILE={WANTED_FILES}` in its unit"
        )),
        _ => Finding::good("open-files", format!("a process may have {soft} files open")),
    }
}

fn pages(patient: &Patient) -> Option<Finding> {
    // Linux 6.13; before, 256 is built in.
    let limit = number(patient, "proc/sys/fs/fuse/max_pages_limit")?;
    Some(if limit < WANTED_PAGES {
        Finding::new(
            "max-pages-limit",
            Verdict::Warning,
            format!("requests are of {limit} pages at most (fs.fuse.max_pages_limit)"),
        )
        .costs("large reads become many small requests")
        .mend(format!("`sysctl fs.fuse.max_pages_limit={WANTED_PAGES}`"))
    } else {
        Finding::good("max-pages-limit", format!("requests may be of {limit} pages"))
    })
}

fn timeouts(patient: &Patient) -> Vec<Finding> {
    ["default_request_timeout", "max_request_timeout"]
        .into_iter()
        .filter_map(|name| {
            let seconds = number(patient, &format!("proc/sys/fs/fuse/{name}"))?;
            let check = match name {
                "default_request_timeout" => "default-request-timeout",
                _ => "max-request-timeout",
            };
            Some(match seconds {
                0 => Finding::good(check, format!("fs.fuse.{name} is 0")),
                seconds => Finding::new(check, Verdict::Bad, format!("fs.fuse.{name} is {seconds} s"))
                    .costs("a mount whose agent takes longer, or is being restarted, is ended by the kernel")
                    .mend(format!("`sysctl fs.fuse.{name}=0`")),
            })
        })
        .collect()
}

/// `updatedb` reads every directory there is, every night.
fn updatedb(patient: &Patient) -> Option<Finding> {
    let path = patient.root.join("etc/updatedb.conf");
    let text = fs::read_to_string(&path).ok()?;
    let is_pruned = |line: &str| {
        let value = line
            .trim()
            .strip_prefix("PRUNEFS")?
            .trim_start()
            .strip_prefix('=')?;
        Some(
            value
                .trim()
                .trim_matches('"')
                .split_whitespace()
                .any(|kind| kind == KIND || kind == "fuse"),
        )
    };
    if text.lines().find_map(is_pruned) == Some(true) {
        return Some(Finding::good("updatedb", "updatedb leaves mounts alone"));
    }
    let finding = Finding::new(
        "updatedb",
        Verdict::Warning,
        "PRUNEFS in /etc/updatedb.conf does not name fuse.grid-mount",
    )
    .costs("every night updatedb walks through all mounts it may read")
    .mend("add fuse.grid-mount to PRUNEFS in /etc/updatedb.conf");
    Some(match patient.is_root {
        false => finding,
        true => finding.fixed_by(patient.fix, || prune(&path, &text)),
    })
}

fn prune(path: &Path, text: &str) -> std::io::Result<()> {
    let mut named = false;
    let mut lines: Vec<String> = Vec::new();
    for line in text.lines() {
        let bare = line.trim_start();
        let value = bare
            .strip_prefix("PRUNEFS")
            .and_then(|rest| rest.trim_start().strip_prefix('='))
            .filter(|_| !named);
        match value {
            Some(value) => {
                named = true;
                let kinds = value.trim().trim_matches('"').trim();
                lines.push(format!("PRUNEFS=\"{}\"", format!("{kinds} {KIND}").trim()));
            }
            None => lines.push(line.to_owned()),
        }
    }
    if !named {
        lines.push(format!("PRUNEFS=\"{KIND}\""));
    }
    // Whole or not at all, with the mode it had.
    let dir = path.parent().unwrap_or(Path::new("/"));
    let mut new = tempfile::NamedTempFile::new_in(dir)?;
    std::io::Write::write_all(&mut new, (lines.join("\n") + "\n").as_bytes())?;
    new.as_file().set_permissions(fs::metadata(path)?.permissions())?;
    new.as_file().sync_all()?;
    new.persist(path).map_err(|error| error.error)?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Fix;

    /// A host of files.
    fn host(files: &[(&str, &str)]) -> (tempfile::TempDir, Patient) {
        let dir = tempfile::tempdir().unwrap();
        for (path, text) in files {
            let path = dir.path().join(path);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        let patient = Patient {
            root: dir.path().to_owned(),
            is_root: true,
            cache_dir: dir.path().join("cache"),
            cache_size: 1 << 30,
            cache_min_free: 0,
            catalog: "file:///nowhere".parse().unwrap(),
            user: "alice".parse().unwrap(),
            store_settings: Default::default(),
            origins: Vec::new(),
            loans: Vec::new(),
            fix: false,
        };
        (dir, patient)
    }

    fn found(patient: &Patient, check: &str) -> Option<Verdict> {
        let findings = examine(patient);
        let mut named = findings.iter().filter(|finding| finding.check == check);
        let verdict = named.next().map(|finding| {
            // What is not good says what it costs and how to mend it.
            assert_eq!(finding.costs.is_some(), finding.verdict != Verdict::Good);
            assert_eq!(finding.mend.is_some(), finding.verdict != Verdict::Good);
            finding.verdict
        });
        assert!(named.next().is_none(), "{check} comes twice");
        verdict
    }

    #[test]
    fn kernels_are_told_apart() {
        for (release, verdict) in [
            ("4.18.0-553.el8", Verdict::Bad),
            ("5.15.0-100-generic", Verdict::Warning),
            ("6.8.0", Verdict::Warning),
            ("6.9.0-rc1", Verdict::Good),
            ("7.0.1", Verdict::Good),
        ] {
            let (_dir, patient) = host(&[("proc/sys/kernel/osrelease", release)]);
            assert_eq!(found(&patient, "kernel"), Some(verdict), "{release}");
        }
    }

    #[test]
    fn limits_that_are_in_the_way_are_found() {
        let limits = "Limit  Soft Limit  Hard Limit  Units\nMax open files            1024   4096   files\n";
        let (_dir, patient) = host(&[
            ("proc/self/limits", limits),
            ("proc/sys/fs/fuse/max_pages_limit", "32\n"),
            ("proc/sys/fs/fuse/default_request_timeout", "30\n"),
            ("proc/sys/fs/fuse/max_request_timeout", "0\n"),
        ]);
        assert_eq!(found(&patient, "open-files"), Some(Verdict::Warning));
        assert_eq!(found(&patient, "max-pages-limit"), Some(Verdict::Warning));
        assert_eq!(found(&patient, "default-request-timeout"), Some(Verdict::Bad));
        assert_eq!(found(&patient, "max-request-timeout"), Some(Verdict::Good));
        assert_eq!(found(&patient, "dev-fuse"), Some(Verdict::Bad));
        // Older kernels have none of these.
        let (_dir, patient) = host(&[]);
        assert_eq!(found(&patient, "max-pages-limit"), None);
        assert_eq!(found(&patient, "default-request-timeout"), None);
        assert_eq!(found(&patient, "updatedb"), None);
    }

    #[test]
    fn updatedb_is_told_once() {
        let conf = "# mine\nPRUNE_BIND_MOUNTS=\"yes\"\nPRUNEFS=\"NFS nfs4\"\n";
        let (dir, mut patient) = host(&[("etc/updatedb.conf", conf)]);
        let path = dir.path().join("etc/updatedb.conf");
        let of = |patient: &Patient| {
            let findings = examine(patient);
            let finding = findings.into_iter().find(|finding| finding.check == "updatedb");
            finding.unwrap()
        };
        assert_eq!(of(&patient).fix, Fix::Possible);
        assert_eq!(fs::read_to_string(&path).unwrap(), conf);
        patient.fix = true;
        assert_eq!(of(&patient).fix, Fix::Done);
        assert_eq!(
            fs::read_to_string(&path).unwrap(),
            conf.replace("nfs4", "nfs4 fuse.grid-mount")
        );
        assert_eq!(of(&patient).verdict, Verdict::Good);
        patient.is_root = false;
        fs::write(&path, conf).unwrap();
        assert_eq!(of(&patient).fix, Fix::No);
    }
}
