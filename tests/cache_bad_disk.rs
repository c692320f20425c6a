//! A cache on a disk that fails (EIO): between the real agent and the C library stands a shim that fails the
//! reads and writes of cached blocks as long as a file says so.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    fs,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use sandbox::{Sandbox, skip};

const SHIM: &str = r#"
#define _GNU_SOURCE
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

static int fails(int fd, const char *what) {
    char flag[4096], link[64], path[4096];
    const char *dir = getenv("EIO_DIR");
    if (!dir || snprintf(flag, sizeof flag, "%s/%s", dir, what) >= (int)sizeof flag) return 0;
    if (access(flag, F_OK) != 0) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t len = readlink(link, path, sizeof path - 1);
    if (len < 0) return 0;
    path[len] = 0;
    return strstr(path, "/grid/objects/") != 0;
}
ssize_t pread64(int fd, void *buf, size_t len, off_t at) {
    if (fails(fd, "reads-fail")) { errno = EIO; return -1; }
    return syscall(SYS_pread64, fd, buf, len, at);
}
ssize_t pwrite64(int fd, const void *buf, size_t len, off_t at) {
    if (fails(fd, "writes-fail")) { errno = EIO; return -1; }
    return syscall(SYS_pwrite64, fd, buf, len, at);
}
ssize_t pwritev(int fd, const struct iovec *parts, int count, off_t at) {
    if (fails(fd, "writes-fail")) { errno = EIO; return -1; }
    return syscall(SYS_pwritev, fd, parts, (long)count, (long)at, 0L);
}
"#;

fn same(sandbox: &Sandbox, source: &Path, mount: &Path) {
    for path in ["large", "small"] {
        // From the agent, not from what the kernel keeps.
        let file = fs::File::open(mount.join(path)).unwrap();
        let advice = nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED;
        nix::fcntl::posix_fadvise(&file, 0, 0, advice).unwrap();
        assert!(
            fs::read(mount.join(path)).unwrap() == fs::read(source.join(path)).unwrap(),
            "{path} is wrong: {}",
            sandbox.status()
        );
    }
}

fn published(sandbox: &Sandbox, name: &str) -> std::path::PathBuf {
    let source = sandbox.path(&format!("source-{name}"));
    fs::create_dir(&source).unwrap();
    let mut bytes = vec![0; 12 << 20];
    blake3::Hasher::new()
        .update(name.as_bytes())
        .finalize_xof()
        .fill(&mut bytes);
    fs::write(source.join("large"), &bytes).unwrap();
    fs::write(source.join("small"), &bytes[..300_000]).unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), name]);
    source
}

#[test]
fn a_disk_that_fails_costs_hits_but_never_an_answer() {
    if !Path::new("/dev/fuse").exists() {
        return skip("a disk that fails", "there is no /dev/fuse");
    }
    let sandbox = Sandbox::new();
    let (code, library) = (sandbox.path("shim.c"), sandbox.path("shim.so"));
    fs::write(&code, SHIM).unwrap();
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]).args([&library, &code]);
    match compiler.output() {
        Ok(output) if output.status.success() => {}
        Ok(output) => panic!("{}", sandbox::told(&output)),
        Err(error) => return skip("a disk that fails", &format!("there is no cc: {error}")),
    }
    let flag = |what: &str| sandbox.path(what);
    let (reads, writes) = (flag("reads-fail"), flag("writes-fail"));
    let eio_dir = sandbox.path("");
    let sandbox = sandbox
        .env("LD_PRELOAD", library.to_str().unwrap())
        .env("EIO_DIR", eio_dir.to_str().unwrap());
    let mount = |name: &str| {
        let point = sandbox.path("mnt").join(name);
        sandbox.ok(&[name, point.to_str().unwrap(), "--io-mode", "no-open"]);
        point
    };
    let degraded = || {
        sandbox.status()["agent"]["cache_degraded"]
            .as_str()
            .map(str::to_owned)
    };
    let (one, other) = (published(&sandbox, "one"), published(&sandbox, "other"));
    let point = mount("one");
    sandbox.ok(&["warm", "one"]);
    same(&sandbox, &one, &point);
    assert_eq!(degraded(), None);

    fs::write(&reads, "").unwrap();
    same(&sandbox, &one, &point);
    let cause = degraded().unwrap();
    assert!(cause.contains("Input/output error"), "{cause}");
    fs::write(&writes, "").unwrap();
    let second = mount("other");
    same(&sandbox, &other, &second);
    same(&sandbox, &other, &second);
    same(&sandbox, &one, &point);
    assert!(degraded().unwrap().contains("Input/output error"));
    assert!(sandbox.ok(&["cache", "status"]).contains("Input/output error"));
    let log = fs::read_to_string(sandbox.path("run/grid-mount/agent.log")).unwrap();
    assert_eq!(log.matches("the cache is not storing").count(), 1, "{log}");

    // The disk is well again.
    fs::remove_file(&reads).unwrap();
    fs::remove_file(&writes).unwrap();
    let begun = Instant::now();
    while degraded().is_some() {
        assert!(
            begun.elapsed() < Duration::from_secs(60),
            "the cache stays degraded"
        );
        same(&sandbox, &other, &second);
        // Says so as long as the cache rests.
        let _ = sandbox.grid(&["warm", "other"]).output().unwrap();
    }
    same(&sandbox, &one, &point);
    let checked = sandbox.ok(&["cache", "verify", "--json"]);
    assert!(
        checked.contains("\"damaged\":0") || checked.contains("\"damaged\": 0"),
        "{checked}"
    );
    sandbox.ok(&["unmount", "--all"]);
}
