//! The agent killed under a whole session's load, with the real program: sums of large files, walks of a large
//! tree, random readers of every kind. Nothing fails, no byte is wrong, and the longest stall is printed.
//!
//! `GRID_MOUNT_TEST_FULL=1` reads 2 GiB and kills ten times; without it the same is done smaller.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    collections::{BTreeSet, VecDeque},
    ffi::OsStr,
    fs::{self, File, OpenOptions},
    io::Write,
    os::unix::fs::{FileExt, OpenOptionsExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use nix::{
    fcntl::{PosixFadviseAdvice, posix_fadvise},
    mount::{MntFlags, umount2},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use sandbox::{Sandbox, skip, told};

const DEADLINE: Duration = Duration::from_secs(180);
const BETWEEN_KILLS: Duration = Duration::from_secs(2);
const RANDOM_READERS: usize = 16;
const DIRECT: usize = 4096;

struct Load {
    large: u64,
    small_files: u32,
    kills: u32,
}

fn load() -> Load {
    if std::env::var_os("GRID_MOUNT_TEST_FULL").is_some() {
        Load {
            large: 2 << 30,
            small_files: 100_000,
            kills: 10,
        }
    } else {
        Load {
            large: 192 << 20,
            small_files: 6_000,
            kills: 4,
        }
    }
}

/// Only as root are there both modes, and only there does the kernel send requests again.
fn can_run() -> bool {
    let release = nix::sys::utsname::uname().unwrap().release().to_owned();
    let release = release.to_string_lossy().into_owned();
    let mut numbers = release.split('.').map(|part| part.parse::<u32>().unwrap_or(0));
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    let why = if !Path::new("/dev/fuse").exists() {
        "there is no /dev/fuse"
    } else if !nix::unistd::geteuid().is_root() {
        "the tests do not run as root"
    } else if version < (6, 9) {
        "Linux before 6.9 cannot resend requests"
    } else {
        return true;
    };
    skip("agents killed under load", why);
    false
}

fn dice(seed: u64) -> impl FnMut(u64) -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move |below| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state % below
    }
}

fn write_noise(path: &Path, seed: u64, len: u64) {
    let mut dice = dice(seed + 1);
    let mut file = std::io::BufWriter::with_capacity(1 << 20, File::create(path).unwrap());
    for _ in 0..len / 8 {
        file.write_all(&dice(u64::MAX).to_le_bytes()).unwrap();
    }
    file.flush().unwrap();
}

fn run(sandbox: &Sandbox, program: impl AsRef<OsStr>, arguments: &[&str]) -> Vec<u8> {
    let output = sandbox.program(&program).args(arguments).output().unwrap();
    let program = program.as_ref();
    assert!(
        output.status.success(),
        "{program:?} {arguments:?}: {}",
        told(&output)
    );
    output.stdout
}

fn sha256(sandbox: &Sandbox, path: &Path) -> Vec<u8> {
    run(sandbox, "sha256sum", &[path.to_str().unwrap()])[..64].to_vec()
}

/// What `find -ls` says of every entry, apart from inode numbers, blocks, links, owners and the sizes of directories.
fn listed(sandbox: &Sandbox, dir: &Path) -> BTreeSet<String> {
    let output = sandbox
        .program("find")
        .current_dir(dir)
        .args([".", "-mindepth", "1", "-ls"])
        .output()
        .unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        told(&output)
    );
    String::from_utf8(output.stdout)
        .unwrap()
        .lines()
        .map(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            let size = if words[2].starts_with('d') { "" } else { words[6] };
            format!("{} {size} {}", words[2], words[7..].join(" "))
        })
        .collect()
}

fn wait_for<T>(what: &str, mut done: impl FnMut() -> Option<T>) -> T {
    let begun = Instant::now();
    loop {
        if let Some(value) = done() {
            return value;
        }
        assert!(begun.elapsed() < DEADLINE, "{what}");
        thread::sleep(Duration::from_millis(5));
    }
}

fn forget_pages(file: &File) {
    posix_fadvise(file, 0, 0, PosixFadviseAdvice::POSIX_FADV_DONTNEED).unwrap();
}

/// A copy of the program, of another version if asked for, in the place of whatever was there.
fn install(sandbox: &Sandbox, version: Option<&str>) -> PathBuf {
    let (path, new) = (sandbox.path("grid-mount"), sandbox.path("grid-mount.new"));
    let mut bytes = fs::read(env!("CARGO_BIN_EXE_grid-mount")).unwrap();
    if let Some(version) = version {
        let old = env!("CARGO_PKG_VERSION").as_bytes();
        assert_eq!(version.len(), old.len(), "nothing may move in the binary");
        let mut from = 0;
        while let Some(at) = memchr::memmem::find(&bytes[from..], old) {
            from += at + old.len();
            bytes[from - old.len()..from].copy_from_slice(version.as_bytes());
        }
    }
    fs::write(&new, bytes).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
    fs::rename(&new, &path).unwrap();
    path
}

/// Readers that run until told to stop, and what they met.
struct Readers {
    mount: PathBuf,
    stop: AtomicBool,
    ended: AtomicUsize,
    rounds: Vec<AtomicU64>,
    /// The longest single request, over all readers.
    stall: Mutex<(Duration, &'static str)>,
}

impl Readers {
    fn new(mount: &Path, count: usize) -> Self {
        Self {
            mount: mount.to_owned(),
            stop: AtomicBool::new(false),
            ended: AtomicUsize::new(0),
            rounds: (0..count).map(|_| AtomicU64::new(0)).collect(),
            stall: Mutex::default(),
        }
    }

    fn repeat(&self, reader: usize, mut round: impl FnMut(u64)) {
        struct Ended<'a>(&'a AtomicUsize);
        impl Drop for Ended<'_> {
            fn drop(&mut self) {
                self.0.fetch_add(1, Relaxed);
            }
        }
        let _ended = Ended(&self.ended);
        while !self.stop.load(Relaxed) {
            round(self.rounds[reader].load(Relaxed));
            self.rounds[reader].fetch_add(1, Relaxed);
        }
    }

    fn timed<T>(&self, what: &'static str, request: impl FnOnce() -> T) -> T {
        let begun = Instant::now();
        let value = request();
        let mut stall = self.stall.lock().unwrap();
        *stall = (*stall).max((begun.elapsed(), what));
        value
    }
}

/// Ends the readers; if an assertion failed, also what they wait for.
struct Stop<'a>(&'a Readers);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.stop.store(true, Relaxed);
        if thread::panicking() {
            umount2(&self.0.mount, MntFlags::MNT_FORCE).ok();
        }
    }
}

impl Stop<'_> {
    /// Nobody waits for ever.
    fn and_wait(self) {
        self.0.stop.store(true, Relaxed);
        let readers = self.0;
        wait_for("a reader hangs", || {
            (readers.ended.load(Relaxed) == readers.rounds.len()).then_some(())
        });
    }
}

/// Kills the agent on the beat; half-way the program is one of another version.
fn kill_on_the_beat(sandbox: &Sandbox, kills: u32) {
    let version = || sandbox.status()["agent"]["version"].as_str().unwrap().to_owned();
    let mut pid = sandbox.agent_pid().unwrap();
    let mut beat = Instant::now();
    for number in 0..kills {
        beat += BETWEEN_KILLS;
        thread::sleep(beat.saturating_duration_since(Instant::now()));
        if number == kills / 2 {
            assert_eq!(version(), env!("CARGO_PKG_VERSION"));
            install(sandbox, Some("9.8.7"));
        }
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        pid = wait_for("no agent again", || sandbox.agent_pid().filter(|new| *new != pid));
    }
    assert_eq!(version(), "9.8.7");
}

#[test]
fn nothing_fails_while_agents_are_killed_under_load() {
    if !can_run() {
        return;
    }
    let load = load();
    let sandbox = Sandbox::new();
    let source = sandbox.path("source");
    fs::create_dir_all(source.join("tree")).unwrap();
    write_noise(&source.join("large"), 1, load.large);
    for number in 0..load.small_files {
        let dir = source.join(format!("tree/{}", number / 500));
        if number % 500 == 0 {
            fs::create_dir(&dir).unwrap();
        }
        fs::write(dir.join(number.to_string()), number.to_string().repeat(20)).unwrap();
    }
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    let expected = Expected {
        sum: sha256(&sandbox, &source.join("large")),
        list: listed(&sandbox, &source),
        // SAFETY: nobody writes it any more.
        large: unsafe { memmap2::Mmap::map(&File::open(source.join("large")).unwrap()) }.unwrap(),
    };
    for mode in ["passthrough", "no-open"] {
        for warmth in ["cold", "warm"] {
            let cache = sandbox.path("cache/grid");
            if warmth == "cold" && cache.exists() {
                fs::remove_dir_all(cache).unwrap();
            }
            under_load(&sandbox, &load, &expected, mode, warmth);
        }
    }
}

struct Expected {
    sum: Vec<u8>,
    list: BTreeSet<String>,
    large: memmap2::Mmap,
}

fn under_load(sandbox: &Sandbox, load: &Load, expected: &Expected, mode: &str, warmth: &str) {
    let program = install(sandbox, None);
    let mount = sandbox.path("mnt/point");
    run(
        sandbox,
        program,
        &["data", mount.to_str().unwrap(), "--io-mode", mode],
    );
    let large = mount.join("large");
    let held = File::open(&large).unwrap();
    let readers = Readers::new(&mount, 2 + RANDOM_READERS);
    thread::scope(|scope| {
        let (readers, held, large, mount) = (&readers, &held, &large, &mount);
        let stop = Stop(readers);
        scope.spawn(move || {
            readers.repeat(0, |_| {
                forget_pages(held);
                assert!(sha256(sandbox, large) == expected.sum);
            })
        });
        scope.spawn(move || readers.repeat(1, |_| assert!(listed(sandbox, mount) == expected.list)));
        for reader in 2..2 + RANDOM_READERS {
            scope.spawn(move || random_reader(readers, reader, large, &expected.large));
        }
        kill_on_the_beat(sandbox, load.kills);
        stop.and_wait();
    });
    let (stall, what) = *readers.stall.lock().unwrap();
    println!(
        "{mode}, {warmth}: {} kills under {} MiB and {} entries, rounds {:?}, longest stall {} ms, by {what}",
        load.kills,
        load.large >> 20,
        expected.list.len(),
        readers.rounds,
        stall.as_millis(),
    );
    assert!(readers.rounds.iter().all(|rounds| rounds.load(Relaxed) > 0));
    drop(held);
    sandbox.ok(&["unmount", "--all"]);
    assert!(sandbox.mounts().is_empty());
    wait_for("the agent stays", || sandbox.agent_pid().is_none().then_some(()));
}

/// By pread, past the page cache or mapped; half of them with what was open before the first agent died,
/// half with files opened anew.
fn random_reader(readers: &Readers, reader: usize, path: &Path, bytes: &[u8]) {
    let mut dice = dice(reader as u64);
    let anew = reader.is_multiple_of(2);
    let plain = || File::open(path).unwrap();
    let direct = || {
        OpenOptions::new()
            .read(true)
            .custom_flags(libc::O_DIRECT)
            .open(path)
            .unwrap()
    };
    // SAFETY: files of the mount never change.
    let mapped = || unsafe { memmap2::Mmap::map(&plain()) }.unwrap();
    match reader / 2 % 3 {
        0 => {
            let kept = plain();
            readers.repeat(reader, |_| {
                let file = if anew { &plain() } else { &kept };
                let mut buf = vec![0; 1 + dice(300_000) as usize];
                let offset = dice((bytes.len() - buf.len()) as u64);
                forget_pages(file);
                readers.timed("pread", || file.read_exact_at(&mut buf, offset).unwrap());
                assert!(buf == bytes[offset as usize..][..buf.len()]);
            });
        }
        1 => {
            let kept = direct();
            let mut buf = vec![0; (256 << 10) + DIRECT];
            let start = buf.as_ptr().align_offset(DIRECT);
            readers.repeat(reader, |_| {
                let file = if anew { &direct() } else { &kept };
                let len = DIRECT << dice(7);
                let buf = &mut buf[start..start + len];
                let offset = dice((bytes.len() - len) as u64) & !(DIRECT as u64 - 1);
                readers.timed("O_DIRECT", || file.read_exact_at(buf, offset).unwrap());
                assert!(*buf == bytes[offset as usize..][..len]);
            });
        }
        _ => {
            let kept = mapped();
            readers.repeat(reader, |_| {
                // The file is closed by then: mappings outlive it.
                let map = if anew { &mapped() } else { &kept };
                for _ in 0..8 {
                    let offset = dice(bytes.len() as u64) as usize;
                    let found = readers.timed("mmap", || map[offset]);
                    assert_eq!(found, bytes[offset]);
                }
            });
        }
    }
}

/// Files that are read in parts and as wholes, so that they go from partial to complete and back again for a cache
/// that holds less than half of them.
#[test]
fn files_that_come_and_go_in_the_cache_are_read_without_a_flaw() {
    if !can_run() {
        return;
    }
    const FILES: usize = 48;
    const MAPPED: usize = 6;
    const READERS: usize = 8;
    let load = load();
    let sandbox = Sandbox::new().env("GRID_MOUNT_CACHE_SIZE", "128MiB");
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    let contents: Vec<Vec<u8>> = (0..FILES)
        .map(|number| {
            let path = source.join(number.to_string());
            // Not of whole blocks, all large enough to lie in the cache as objects of their own.
            write_noise(&path, number as u64, (5 << 20) + number as u64 * 80_000);
            fs::read(path).unwrap()
        })
        .collect();
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    let program = install(&sandbox, None);
    let mount = sandbox.path("mnt/point");
    run(
        &sandbox,
        program,
        &["data", mount.to_str().unwrap(), "--io-mode", "passthrough"],
    );
    let readers = Readers::new(&mount, READERS);
    let passed = AtomicU64::new(0);
    thread::scope(|scope| {
        let (readers, mount, contents, passed) = (&readers, &mount, &contents, &passed);
        let stop = Stop(readers);
        for reader in 0..READERS {
            scope.spawn(move || {
                let mut dice = dice(reader as u64 + 100);
                let mut maps = VecDeque::new();
                let mut kept = VecDeque::new();
                readers.repeat(reader, |_| {
                    // Some are wanted by all, so that several have them open while they are sealed.
                    let among = if dice(3) == 0 { 4 } else { FILES as u64 };
                    let number = dice(among) as usize;
                    let bytes = &contents[number];
                    let file = readers.timed("open", || File::open(mount.join(number.to_string())).unwrap());
                    if dice(3) == 0 {
                        let mut all = vec![0; bytes.len()];
                        readers.timed("read", || file.read_exact_at(&mut all, 0).unwrap());
                        assert!(all == *bytes, "{number}");
                        passed.fetch_add(all.len() as u64, Relaxed);
                    } else {
                        let mut part = vec![0; 100_000];
                        let offset = dice((bytes.len() - part.len()) as u64);
                        readers.timed("pread", || file.read_exact_at(&mut part, offset).unwrap());
                        assert!(part == bytes[offset as usize..][..part.len()], "{number}");
                        passed.fetch_add(part.len() as u64, Relaxed);
                    }
                    // SAFETY: files of the mount never change.
                    maps.push_back((number, unsafe { memmap2::Mmap::map(&file) }.unwrap()));
                    if maps.len() > MAPPED {
                        maps.pop_front();
                    }
                    for (number, map) in &maps {
                        let offset = dice(map.len() as u64) as usize;
                        let found = readers.timed("mmap", || map[offset]);
                        assert_eq!(found, contents[*number][offset], "{number}");
                    }
                    forget_pages(&file);
                    if dice(2) == 0 {
                        kept.push_back(file);
                    }
                    if kept.len() > MAPPED {
                        kept.pop_front();
                    }
                });
            });
        }
        kill_on_the_beat(&sandbox, load.kills);
        stop.and_wait();
    });
    let (stall, what) = *readers.stall.lock().unwrap();
    let status = sandbox.status();
    println!(
        "{} kills, {} MiB read, rounds {:?}, longest stall {} ms, by {what}; {}",
        load.kills,
        passed.load(Relaxed) >> 20,
        readers.rounds,
        stall.as_millis(),
        status["agent"],
    );
    let held = status["agent"]["cache_used"].as_u64().unwrap();
    let whole: usize = contents.iter().map(Vec::len).sum();
    assert!(
        held < whole as u64 / 2,
        "nothing had to be evicted: {held} of {whole}"
    );
    sandbox.ok(&["unmount", "--all"]);
    assert!(sandbox.mounts().is_empty());
}
