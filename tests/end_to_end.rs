//! The main job on real input: publish, mount through /dev/fuse, compare, use, unmount.

#[path = "support/compare.rs"]
mod compare;
#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    fs,
    os::unix::fs::{MetadataExt, PermissionsExt, symlink},
    path::{Path, PathBuf},
    process::Command,
};

use compare::assert_same_tree;
use sandbox::{Sandbox, skip, told};

fn fuse_is_here(what: &str) -> bool {
    let here = Path::new("/dev/fuse").exists();
    if !here {
        skip(what, "there is no /dev/fuse");
    }
    here
}

/// A real tree that every builder of this project has: large and small files, symlinks.
fn toolchain() -> PathBuf {
    let output = Command::new(std::env::var("RUSTC").unwrap_or_else(|_| "rustc".into()))
        .args(["--print", "sysroot"])
        .output()
        .unwrap();
    PathBuf::from(String::from_utf8(output.stdout).unwrap().trim())
}

/// Small, with everything that a tree can hold.
fn odd_tree(dir: &Path) {
    fs::create_dir_all(dir.join("sub/empty")).unwrap();
    fs::write(dir.join("hello.txt"), "hello\n").unwrap();
    fs::write(dir.join("empty.bin"), "").unwrap();
    fs::write(dir.join("sub/ümläut and space"), vec![7u8; 200_000]).unwrap();
    let big: Vec<u8> = (0..3_000_000u32)
        .flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes())
        .collect();
    fs::write(dir.join("sub/big.bin"), big).unwrap();
    fs::write(dir.join("run.sh"), "#!/bin/sh\necho ran\n").unwrap();
    fs::set_permissions(dir.join("run.sh"), fs::Permissions::from_mode(0o755)).unwrap();
    symlink("../hello.txt", dir.join("sub/link")).unwrap();
    symlink("/nowhere/at/all", dir.join("dangling")).unwrap();
    fs::hard_link(dir.join("hello.txt"), dir.join("hard.txt")).unwrap();
    for i in 0..200 {
        fs::write(
            dir.join(format!("sub/small-{i:03}")),
            format!("file {i}\n").repeat(i),
        )
        .unwrap();
    }
}

fn readable_by_all(dir: &Path) {
    let status = Command::new("chmod")
        .args(["-R", "a+rX"])
        .arg(dir)
        .status()
        .unwrap();
    assert!(status.success());
}

fn published_is_equal(sandbox: &Sandbox, source: &Path, name: &str) {
    let printed = sandbox.ok(&["publish", source.to_str().unwrap(), name]);
    assert_eq!(printed.trim(), format!("alice:{name}/1"));
    let mount = sandbox.path("mnt/point");
    let printed = sandbox.ok(&[&format!("alice:{name}"), mount.to_str().unwrap()]);
    assert!(printed.contains(&format!("alice:{name}/1")), "{printed}");
    assert_same_tree(sandbox, source, &mount);
    sandbox.ok(&["unmount", mount.to_str().unwrap()]);
    assert!(sandbox.mounts().is_empty());
    assert!(!mount.exists(), "the mount point that was made stays behind");
}

#[test]
fn what_is_mounted_equals_what_was_published() {
    if !fuse_is_here("mounting") {
        return;
    }
    let sandbox = Sandbox::new();
    let source = sandbox.path("source");
    odd_tree(&source);
    published_is_equal(&sandbox, &source, "odd");
}

#[test]
fn what_an_ordinary_user_mounts_equals_what_was_published() {
    if !fuse_is_here("mounting as an ordinary user") {
        return;
    }
    let Some(sandbox) = Sandbox::ordinary() else {
        return;
    };
    let source = sandbox.path("source");
    odd_tree(&source);
    readable_by_all(&source);
    published_is_equal(&sandbox, &source, "odd");
}

#[test]
fn the_rust_toolchain_survives_the_way() {
    if !fuse_is_here("mounting the toolchain") {
        return;
    }
    let sandbox = Sandbox::new();
    published_is_equal(&sandbox, &toolchain().join("lib"), "toolchain");
}

#[test]
fn every_attempt_to_write_fails_and_changes_nothing() {
    if !fuse_is_here("write attempts") {
        return;
    }
    for sandbox in [Some(Sandbox::new()), Sandbox::ordinary()].into_iter().flatten() {
        let source = sandbox.path("source");
        odd_tree(&source);
        readable_by_all(&source);
        sandbox.ok(&["publish", source.to_str().unwrap(), "odd"]);
        let mount = sandbox.path("mnt/point");
        sandbox.ok(&["odd", mount.to_str().unwrap()]);
        let attempts = r#"
import errno, os, sys
m = sys.argv[1]
f, d = m + "/hello.txt", m + "/sub"
def write(flags):
    os.close(os.open(f, flags))
attempts = {
    "create": lambda: os.close(os.open(m + "/new", os.O_CREAT | os.O_WRONLY)),
    "write": lambda: write(os.O_WRONLY),
    "append": lambda: write(os.O_WRONLY | os.O_APPEND),
    "open rw": lambda: write(os.O_RDWR),
    "open trunc": lambda: write(os.O_WRONLY | os.O_TRUNC),
    "truncate": lambda: os.truncate(f, 0),
    "chmod": lambda: os.chmod(f, 0o600),
    "chown": lambda: os.chown(f, os.getuid(), os.getgid()),
    "rename": lambda: os.rename(f, m + "/other"),
    "unlink": lambda: os.unlink(f),
    "mkdir": lambda: os.mkdir(m + "/newdir"),
    "rmdir": lambda: os.rmdir(m + "/sub/empty"),
    "symlink": lambda: os.symlink("x", m + "/newlink"),
    "link": lambda: os.link(f, m + "/newhard"),
    "mknod": lambda: os.mkfifo(m + "/fifo"),
    "setxattr": lambda: os.setxattr(f, "user.x", b"1"),
    "removexattr": lambda: os.removexattr(f, "user.grid.reference"),
    "utimes": lambda: os.utime(f, (1, 1)),
    "lutimes": lambda: os.utime(m + "/dangling", (1, 1), follow_symlinks=False),
}
wrong = []
for name, attempt in attempts.items():
    try:
        attempt()
        wrong.append(name + " succeeded")
    except OSError as e:
        if e.errno != errno.EROFS:
            wrong.append(f"{name}: {e}")
print("; ".join(wrong))
"#;
        let output = sandbox
            .program("python3")
            .args(["-c", attempts])
            .arg(&mount)
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", told(&output));
        assert_eq!(String::from_utf8_lossy(&output.stdout).trim(), "");
        assert_same_tree(&sandbox, &source, &mount);
    }
}

#[test]
fn programs_run_on_the_mount() {
    if !fuse_is_here("programs on a mount") {
        return;
    }
    let sandbox = Sandbox::new();
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    let sh = |script: &str| {
        let output = sandbox.program("sh").args(["-euc", script]).output().unwrap();
        assert!(output.status.success(), "{script}: {}", told(&output));
        String::from_utf8(output.stdout).unwrap()
    };
    sh(
        "cd source && git init -q repo && cd repo && echo one > a && git add a &&
        git -c user.name=t -c user.email=t@example.org commit -qm one",
    );
    sh("cd source && mkdir -p py/pack && echo 'VALUE = 42' > py/pack/__init__.py");
    sh("cd source && mkdir -p crate/src && echo 'fn main(){}' > crate/src/main.rs &&
        printf '[package]\\nname=\"c\"\\nversion=\"0.1.0\"\\nedition=\"2021\"\\n' > crate/Cargo.toml && printf '# This file is automatically @generated by Cargo.\\n# It is not intended for manual editing.\\nversion = 4\\n\\n[[package]]\\nname = \"c\"\\nversion = \"0.1.0\"\\n' > crate/Cargo.lock");
    sh("python3 -c \"
import sqlite3
db = sqlite3.connect('source/t.db'); db.execute('create table t(x)')
db.executemany('insert into t values(?)', [(i,) for i in range(10000)]); db.commit()\"");
    sandbox.ok(&["publish", source.to_str().unwrap(), "things"]);
    let mount = sandbox.path("mnt/point");
    sandbox.ok(&["things", mount.to_str().unwrap()]);

    sh("git -c safe.directory='*' clone -q mnt/point/repo tmp/clone && test \"$(cat tmp/clone/a)\" = one");
    assert_eq!(
        sh("PYTHONPATH=mnt/point/py PYTHONDONTWRITEBYTECODE=1 python3 -c 'import pack; print(pack.VALUE)'")
            .trim(),
        "42"
    );
    sh(
        "tar -C mnt/point -cf tmp/all.tar . && mkdir tmp/out && tar -C tmp/out -xf tmp/all.tar && diff -r source tmp/out",
    );
    let sum = sh("python3 -c \"
import sqlite3
print(sqlite3.connect('file:mnt/point/t.db?mode=ro&immutable=1', uri=True).execute('select sum(x) from t').fetchone()[0])\"");
    assert_eq!(sum.trim(), "49995000");
    if sandbox.program("sqlite3").arg("--version").output().is_ok() {
        assert_eq!(
            sh("sqlite3 -readonly mnt/point/t.db 'select count(*) from t'").trim(),
            "10000"
        );
    } else {
        skip("sqlite3", "it is not installed");
    }
    sh("python3 -c \"
import mmap
f = open('mnt/point/t.db', 'rb')
m = mmap.mmap(f.fileno(), 0, prot=mmap.PROT_READ)
assert m[:] == open('source/t.db', 'rb').read()\"");
    let mut cargo = sandbox.program(env!("CARGO"));
    cargo.args([
        "metadata",
        "--offline",
        "--format-version",
        "1",
        "--manifest-path",
    ]);
    for name in ["CARGO_HOME", "RUSTUP_HOME", "RUSTUP_TOOLCHAIN"] {
        if let Some(value) = std::env::var_os(name) {
            cargo.env(name, value);
        }
    }
    let output = cargo.arg(mount.join("crate/Cargo.toml")).output().unwrap();
    assert!(output.status.success(), "{}", told(&output));
}

#[test]
fn two_mounts_share_one_agent_that_goes_with_the_last() {
    if !fuse_is_here("two mounts") {
        return;
    }
    let sandbox = Sandbox::new();
    let source = sandbox.path("source");
    odd_tree(&source);
    sandbox.ok(&["publish", source.to_str().unwrap(), "odd"]);
    fs::write(source.join("hello.txt"), "hello again\n").unwrap();
    assert_eq!(
        sandbox.ok(&["publish", source.to_str().unwrap(), "odd"]).trim(),
        "alice:odd/2"
    );

    let (one, two) = (sandbox.path("mnt/1"), sandbox.path("mnt/2"));
    sandbox.ok(&["odd/1", one.to_str().unwrap()]);
    let first = sandbox.agent_pid().unwrap();
    sandbox.ok(&["alice:odd", two.to_str().unwrap()]);
    assert_eq!(sandbox.agent_pid(), Some(first));
    assert_eq!(fs::read_to_string(one.join("hello.txt")).unwrap(), "hello\n");
    assert_eq!(
        fs::read_to_string(two.join("hello.txt")).unwrap(),
        "hello again\n"
    );

    // Version 1's big file is version 2's: read through one mount, it is there for the other.
    let read = |path: &Path| fs::read(path.join("sub/big.bin")).unwrap();
    let bytes = read(&one);
    let fetched = sandbox.status()["agent"]["bytes_from_origin"].as_u64().unwrap();
    assert_eq!(read(&two), bytes);
    assert_eq!(
        sandbox.status()["agent"]["bytes_from_origin"].as_u64().unwrap(),
        fetched
    );

    // Mounting the same again is not an error; something else there is.
    sandbox.ok(&["odd/1", one.to_str().unwrap()]);
    let refused = sandbox.fails(1, &["odd/2", one.to_str().unwrap()]);
    assert!(
        refused.contains("alice:odd/1") && refused.contains("example"),
        "{refused}"
    );

    sandbox.ok(&["unmount", "odd/1"]);
    assert_eq!(sandbox.mounts(), std::slice::from_ref(&two));
    sandbox.ok(&["unmount", "--all"]);
    assert!(sandbox.mounts().is_empty());
    assert!(ended(first), "the agent outlives its last mount");
    assert_eq!(sandbox.status()["agent"], serde_json::Value::Null);
}

/// Waits for a process that is not our child to end.
fn ended(pid: i32) -> bool {
    let pid = nix::unistd::Pid::from_raw(pid);
    for _ in 0..400 {
        if nix::sys::signal::kill(pid, None).is_err() {
            return true;
        }
        std::thread::sleep(std::time::Duration::from_millis(25));
    }
    false
}

#[test]
fn a_mount_in_use_says_who_holds_it() {
    if !fuse_is_here("a mount in use") {
        return;
    }
    let sandbox = Sandbox::new();
    let source = sandbox.path("source");
    odd_tree(&source);
    sandbox.ok(&["publish", source.to_str().unwrap(), "odd"]);
    let mount = sandbox.path("mnt/point");
    sandbox.ok(&["odd", mount.to_str().unwrap()]);
    let held = fs::File::open(mount.join("hello.txt")).unwrap();
    let said = sandbox.fails(1, &["unmount", "odd"]);
    assert!(said.contains(&std::process::id().to_string()), "{said}");
    assert_eq!(sandbox.mounts(), std::slice::from_ref(&mount));
    sandbox.ok(&["unmount", "odd", "--lazy"]);
    assert!(sandbox.mounts().is_empty());
    drop(held);
}

#[test]
fn ctrl_c_and_sigterm_unmount_cleanly() {
    use nix::sys::signal::{Signal, kill};
    if !fuse_is_here("signals") {
        return;
    }
    for signal in [Signal::SIGINT, Signal::SIGTERM] {
        let sandbox = Sandbox::new();
        let source = sandbox.path("source");
        odd_tree(&source);
        sandbox.ok(&["publish", source.to_str().unwrap(), "odd"]);
        let mount = sandbox.path("mnt/point");
        let mut child = sandbox
            .grid(&["odd", mount.to_str().unwrap(), "--foreground"])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        // It prints what the reference resolved to once the mount answers.
        let mut line = String::new();
        std::io::BufRead::read_line(
            &mut std::io::BufReader::new(child.stdout.take().unwrap()),
            &mut line,
        )
        .unwrap();
        assert!(line.contains("alice:odd/1"), "{line}");
        assert_eq!(fs::read_to_string(mount.join("hello.txt")).unwrap(), "hello\n");
        kill(nix::unistd::Pid::from_raw(child.id() as i32), signal).unwrap();
        assert!(child.wait().unwrap().success());
        assert!(sandbox.mounts().is_empty());
        assert!(!mount.exists());
    }
}

#[test]
fn a_killed_keeper_and_agent_leave_a_cache_that_the_next_one_uses() {
    use nix::sys::signal::{Signal, kill};
    if !fuse_is_here("a killed agent") {
        return;
    }
    let sandbox = Sandbox::new();
    let source = sandbox.path("source");
    odd_tree(&source);
    sandbox.ok(&["publish", source.to_str().unwrap(), "odd"]);
    let mount = sandbox.path("mnt/point");
    sandbox.ok(&["odd", mount.to_str().unwrap()]);
    let big = fs::read(mount.join("sub/big.bin")).unwrap();
    assert_eq!(big, fs::read(source.join("sub/big.bin")).unwrap());
    let reader = {
        let mount = mount.clone();
        std::thread::spawn(move || while fs::read(mount.join("sub/small-199")).is_ok() {})
    };
    let pid = sandbox.agent_pid().unwrap();
    // The parent first, or it starts the agent again.
    let keeper = sandbox::parent(pid).unwrap();
    for pid in [keeper, pid] {
        kill(nix::unistd::Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        assert!(ended(pid));
    }
    // No agent is needed to clear a path whose agent is dead.
    sandbox.ok(&["unmount", "--lazy", mount.to_str().unwrap()]);
    assert!(sandbox.mounts().is_empty());
    reader.join().unwrap();

    sandbox.ok(&["odd", mount.to_str().unwrap()]);
    assert_eq!(fs::read(mount.join("sub/big.bin")).unwrap(), big);
    let agent = &sandbox.status()["agent"];
    assert_eq!(agent["bytes_from_origin"].as_u64(), Some(0), "{agent}");
    assert_same_tree(&sandbox, &source, &mount);
}

#[test]
fn the_help_fits_on_a_screen_and_has_examples() {
    let sandbox = Sandbox::new();
    for arguments in [
        vec!["--help"],
        vec!["mount", "--help"],
        vec!["publish", "--help"],
        vec!["agent", "--help"],
    ] {
        let help = sandbox.ok(&arguments);
        assert!(
            help.lines().count() <= 45,
            "{arguments:?}: {} lines",
            help.lines().count()
        );
        assert!(help.contains("Example"), "{arguments:?}");
    }
}

#[test]
fn the_default_mount_point_is_made_below_home_and_told_apart_by_owner() {
    if !fuse_is_here("the default mount point") {
        return;
    }
    let Some(sandbox) = Sandbox::ordinary() else {
        return;
    };
    let source = sandbox.path("source");
    odd_tree(&source);
    readable_by_all(&source);
    sandbox.ok(&["publish", source.to_str().unwrap(), "odd"]);
    sandbox.ok(&["publish", source.to_str().unwrap(), "odd", "--user", "bob"]);
    sandbox.ok(&["alice:odd"]);
    let point = sandbox.path("home/datastores/odd");
    assert_eq!(sandbox.mounts(), std::slice::from_ref(&point));
    let refused = sandbox.fails(1, &["bob:odd"]);
    assert!(
        refused.contains("alice:odd/1") && refused.contains("datastores/bob-odd-1"),
        "{refused}"
    );
    sandbox.ok(&[
        "bob:odd",
        sandbox.path("home/datastores/bob-odd-1").to_str().unwrap(),
    ]);
    assert_eq!(sandbox.mounts().len(), 2);
    sandbox.ok(&["unmount", "alice:odd"]);
    assert_eq!(sandbox.mounts().len(), 1);
    assert!(!point.exists());
}

#[test]
fn attributes_tell_where_a_file_comes_from() {
    if !fuse_is_here("extended attributes") {
        return;
    }
    let sandbox = Sandbox::new();
    let source = sandbox.path("source");
    odd_tree(&source);
    sandbox.ok(&["publish", source.to_str().unwrap(), "odd"]);
    let mount = sandbox.path("mnt/point");
    sandbox.ok(&["odd", mount.to_str().unwrap()]);
    let read = sandbox
        .program("python3")
        .args([
            "-c",
            "import os,sys; print(os.getxattr(sys.argv[1], 'user.grid.reference').decode())",
        ])
        .arg(mount.join("hello.txt"))
        .output()
        .unwrap();
    assert_eq!(
        String::from_utf8_lossy(&read.stdout).trim(),
        "alice:odd/1",
        "{}",
        told(&read)
    );
    let metadata = fs::metadata(&mount).unwrap();
    assert_eq!(metadata.nlink(), 3, "two and one subdirectory");
}
