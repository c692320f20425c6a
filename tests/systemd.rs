//! The units, under a real systemd: what it starts, restarts and stops, and what readers see of that.

#[path = "support/systemd_box.rs"]
mod systemd_box;

use std::{
    fs::{self, File, OpenOptions},
    os::unix::fs::{FileExt, OpenOptionsExt},
    path::{Path, PathBuf},
    sync::{
        Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    },
    thread,
    time::{Duration, Instant},
};

use systemd_box::{DEADLINE, SystemdBox, noise};

const SECRET: &str = "hush-this-must-be-seen-nowhere";
const MARK: &[u8] = b"this is another binary";
const BIG: usize = 24 << 20;
const FILES: u64 = 40;

fn small(number: u64) -> Vec<u8> {
    noise(number, 3000 + 997 * number as usize)
}

/// `alice:data/1`: a big file and many small ones.
fn publish(on: &SystemdBox) {
    let source = on.path("/srv/source");
    fs::create_dir_all(source.join("small")).unwrap();
    fs::write(source.join("big"), noise(1, BIG)).unwrap();
    for number in 0..FILES {
        fs::write(source.join(format!("small/{number}")), small(number)).unwrap();
    }
    on.ok("grid-mount publish /srv/source data");
}

/// Readers that never stop; each compares every byte. Dropping it does not stop them: `finish` does.
struct Readers {
    stop: AtomicBool,
    rounds: [AtomicU64; 3],
    /// The longest round of a reader whose rounds take next to no time.
    longest: Mutex<Duration>,
}

impl Readers {
    fn new() -> Self {
        Self {
            stop: AtomicBool::new(false),
            rounds: Default::default(),
            longest: Mutex::default(),
        }
    }

    fn each(&self, reader: usize, mut round: impl FnMut(u64)) {
        while !self.stop.load(Relaxed) {
            round(self.rounds[reader].load(Relaxed));
            self.rounds[reader].fetch_add(1, Relaxed);
        }
    }

    /// From now until every reader has finished two whole rounds: one may have begun before.
    fn wait_for_rounds(&self) {
        let before: Vec<u64> = self.rounds.iter().map(|rounds| rounds.load(Relaxed)).collect();
        let begun = Instant::now();
        while self
            .rounds
            .iter()
            .zip(&before)
            .any(|(rounds, before)| rounds.load(Relaxed) < before + 2)
        {
            assert!(begun.elapsed() < DEADLINE, "the readers wait for ever");
            thread::sleep(Duration::from_millis(5));
        }
    }

    fn take_longest(&self) -> Duration {
        std::mem::take(&mut *self.longest.lock().unwrap())
    }
}

/// Stops the readers also when the test fails.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Relaxed);
    }
}

/// Reads the mount at `mount` in several ways while `meanwhile` runs.
fn while_reading(mount: &Path, meanwhile: impl FnOnce(&Readers)) {
    let readers = Readers::new();
    let big = noise(1, BIG);
    thread::scope(|scope| {
        let stop = Stop(&readers.stop);
        // Past the page cache: every round asks the agent.
        scope.spawn(|| {
            let file = OpenOptions::new()
                .read(true)
                .custom_flags(nix::libc::O_DIRECT)
                .open(mount.join("big"))
                .unwrap();
            let mut buffer = Aligned([0; 64 << 10]);
            let length = buffer.0.len();
            readers.each(0, |round| {
                let at = (round as usize * 7919 * 4096) % (BIG - length) / 4096 * 4096;
                let begun = Instant::now();
                file.read_exact_at(&mut buffer.0, at as u64).unwrap();
                let mut longest = readers.longest.lock().unwrap();
                *longest = (*longest).max(begun.elapsed());
                assert!(buffer.0[..] == big[at..at + length], "wrong bytes at {at}");
            });
        });
        scope.spawn(|| {
            readers.each(1, |round| {
                let number = round % FILES;
                let bytes = fs::read(mount.join(format!("small/{number}"))).unwrap();
                assert!(bytes == small(number), "wrong bytes in small/{number}");
            });
        });
        scope.spawn(|| {
            readers.each(2, |_| {
                let names = fs::read_dir(mount.join("small")).unwrap();
                assert_eq!(names.collect::<Result<Vec<_>, _>>().unwrap().len() as u64, FILES);
                assert_eq!(
                    File::open(mount.join("big")).unwrap().metadata().unwrap().len(),
                    BIG as u64
                );
            });
        });
        readers.wait_for_rounds();
        meanwhile(&readers);
        drop(stop);
    });
}

#[repr(align(4096))]
struct Aligned([u8; 64 << 10]);

/// The agent is another one than `before`, and ready.
fn another_agent(on: &SystemdBox, before: i32) -> i32 {
    on.wait_for("another agent", || {
        let pid = on.agent();
        let ready = on.property("grid-mount.service", "ActiveState") == "active"
            && on.property("grid-mount.service", "SubState") == "running";
        (ready && pid != before && pid != 0).then_some(pid)
    })
}

#[test]
fn readers_notice_no_restart_of_any_kind_and_a_stop_leaves_nothing() {
    let Some(on) = SystemdBox::boot() else { return };
    let credentials = format!("AWS_ACCESS_KEY_ID=someone\nAWS_SECRET_ACCESS_KEY={SECRET}\n");
    on.write("/etc/credstore/grid-mount.env", &credentials);
    on.ok("chmod 0600 /etc/credstore/grid-mount.env; systemctl enable --now grid-mount.socket");
    assert_eq!(
        on.property("grid-mount.service", "ActiveState"),
        "inactive",
        "the socket alone starts no agent"
    );
    publish(&on);
    on.ok("systemctl enable grid-mount.service");
    on.ok("systemctl start 'grid-mount@alice:data-1.service'");
    assert_eq!(on.mounts(), [PathBuf::from("/datastores/data")]);
    assert_eq!(
        on.ok("findmnt --noheadings --output SOURCE,FSTYPE,TARGET /datastores/data")
            .split_whitespace()
            .collect::<Vec<_>>(),
        ["alice:data/1", "fuse.grid-mount", "/datastores/data"]
    );
    let namespace = |pid: &str| on.ok(&format!("readlink /proc/{pid}/ns/mnt"));
    assert_eq!(
        namespace("1"),
        namespace(&on.agent().to_string()),
        "the agent has a mount namespace of its own"
    );

    let mount = on.path("/datastores/data");
    while_reading(&mount, |readers| {
        let mut agent = on.agent();
        let kinds: [(&str, &dyn Fn(i32)); 4] = [
            ("kill -9", &|agent| drop(on.ok(&format!("kill -9 {agent}")))),
            ("systemctl restart", &|_| {
                drop(on.ok("systemctl restart grid-mount.service"));
            }),
            ("kill -TERM by hand", &|agent| {
                drop(on.ok(&format!("kill {agent}")))
            }),
            ("another binary", &|_| {
                on.install(&another_binary(&on));
                on.ok("systemctl daemon-reload && systemctl restart grid-mount.service");
            }),
        ];
        for (kind, restart) in kinds {
            readers.wait_for_rounds();
            readers.take_longest();
            restart(agent);
            agent = another_agent(&on, agent);
            readers.wait_for_rounds();
            eprintln!(
                "{kind}: the longest that a reader waited: {:?}",
                readers.take_longest()
            );
        }
        on.ok("systemctl daemon-reexec");
        readers.wait_for_rounds();
        assert_eq!(
            on.agent(),
            agent,
            "the agent goes on while systemd starts itself again"
        );
        on.ok(&format!("kill -9 {agent}"));
        another_agent(&on, agent);
        readers.wait_for_rounds();
    });
    assert_eq!(on.mounts(), [PathBuf::from("/datastores/data")]);
    let running = fs::read(on.path(&format!("/proc/{}/exe", on.agent()))).unwrap();
    assert!(running.ends_with(MARK), "the old binary runs");

    secrets_are_nowhere(&on);
    journal_is_readable(&on);

    on.ok("systemctl stop grid-mount.service");
    assert_eq!(on.mounts(), [] as [PathBuf; 0], "a stop leaves a mount");
    assert_eq!(on.ok("ls /run/grid-mount").trim(), "agent.sock");
    // Activation: whoever asks starts it.
    on.ok("grid-mount status");
    assert_eq!(on.property("grid-mount.service", "ActiveState"), "active");
}

/// The same program with some bytes behind it, as an upgrade would put it there.
fn another_binary(on: &SystemdBox) -> PathBuf {
    let path = on.path("/srv/another");
    fs::copy(env!("CARGO_BIN_EXE_grid-mount"), &path).unwrap();
    let mut file = OpenOptions::new().append(true).open(&path).unwrap();
    std::io::Write::write_all(&mut file, MARK).unwrap();
    path
}

fn secrets_are_nowhere(on: &SystemdBox) {
    // The key is in use: the store has it for the next agent.
    let places = [
        "journalctl --no-pager --output=verbose",
        "systemctl show 'grid-mount*' grid-mount.service",
        "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ",
        "grep -r . /run/grid-mount /var/lib/grid-mount",
        "grid-mount status --json",
        "cat /proc/mounts",
    ];
    for place in places {
        // Searched for out here: the search would find itself.
        let output = on.run(place);
        let found = String::from_utf8_lossy(&output.stdout).contains(SECRET);
        assert!(!found, "the secret is in: {place}");
    }
}

/// Plain lines with a level, no escapes, no panic.
fn journal_is_readable(on: &SystemdBox) {
    let journal = on.ok("journalctl --no-pager --output=cat -u grid-mount.service");
    assert!(!journal.contains('\u{1b}'), "{journal}");
    assert!(!journal.contains("panicked"), "{journal}");
    for part in ["mounted", "resumed", "leaving the mounts to the next agent"] {
        assert!(journal.contains(part), "{part:?} is not in:\n{journal}");
    }
    assert!(!journal.lines().any(|line| line.contains(" ERROR ")), "{journal}");
}

#[test]
fn a_line_of_fstab_is_mounted_and_an_automount_on_first_access() {
    let Some(on) = SystemdBox::boot() else { return };
    on.ok("systemctl enable --now grid-mount.socket");
    publish(&on);
    on.write(
        "/etc/fstab",
        "alice:data /data grid ro,version=1,prefetch=all,_netdev,nofail,share=all 0 0\n\
         alice:data/1 /auto grid _netdev,nofail,share=all,x-systemd.automount 0 0\n\
         alice:data/1 /home/ann/mine grid noauto,user 0 0\n\
         alice:gone/7 /gone grid _netdev,nofail 0 0\n",
    );
    on.ok("mkdir -p /data /auto /gone && systemctl daemon-reload && systemctl start remote-fs.target");
    on.wait_for("the line of fstab", || {
        (on.property("data.mount", "ActiveState") == "active").then_some(())
    });
    on.wait_for("the failure of what is not there", || {
        (on.property("gone.mount", "ActiveState") == "failed").then_some(())
    });
    let found = on.ok("findmnt --noheadings --raw --output SOURCE,FSTYPE --target /data");
    assert_eq!(found.trim(), "alice:data/1 fuse.grid-mount");
    let options = on.ok("findmnt --noheadings --raw --output OPTIONS --mountpoint /data");
    for option in ["ro", "nosuid", "nodev", "allow_other", "default_permissions"] {
        assert!(
            options.trim().split(',').any(|there| there == option),
            "{options}"
        );
    }
    let everybody = "setpriv --reuid 65534 --regid 65534 --clear-groups --";
    let sum = |path: &str| on.ok(&format!("sha256sum < {path}"));
    let theirs = on.ok(&format!("{everybody} sh -c 'sha256sum < /data/small/3'"));
    assert_eq!(theirs, sum("/srv/source/small/3"));

    // Nothing is there before somebody looks; then it is, for whoever looked.
    let kinds = "findmnt --noheadings --raw --output FSTYPE --mountpoint /auto";
    assert_eq!(on.ok(kinds).trim(), "autofs");
    assert_eq!(
        on.ok("timeout 30 ls /auto/small | wc -l").trim(),
        FILES.to_string()
    );
    assert_eq!(sum("/auto/big"), sum("/srv/source/big"));
    assert!(on.ok(kinds).contains("fuse.grid-mount"));
    on.ok("systemctl stop auto.mount");
    assert_eq!(on.ok(kinds).trim(), "autofs");

    // Again and by hand.
    on.ok("mount /data");
    on.ok("umount /data && ! findmnt --mountpoint /data");
    on.wait_for("the unit to see that", || {
        (on.property("data.mount", "ActiveState") == "inactive").then_some(())
    });
    on.ok("systemctl start data.mount && systemctl stop data.mount");
    on.ok("mount -t grid alice:data/1 /data && cmp /data/big /srv/source/big && umount /data");
    let told = on.fails("mount -t grid alice:data/1 /data -o speling");
    assert!(told.contains("speling"), "{told}");
    let told = on.fails("mount -t grid alice:date/1 /data");
    assert!(told.contains("alice:date"), "{told}");

    // As a user, where fstab permits it; nobody else then reads it.
    on.ok("useradd --create-home ann 2>/dev/null || (mkdir -p /home/ann && chown 1000 /home/ann)");
    on.ok("mkdir /home/ann/mine && chown --reference=/home/ann /home/ann/mine");
    let ann = on.ok("stat --format='setpriv --reuid %u --regid %u --clear-groups --' /home/ann");
    let ann = ann.trim();
    on.ok(&format!(
        "{ann} mount /home/ann/mine && {ann} cmp /home/ann/mine/big /srv/source/big"
    ));
    on.fails(&format!("{everybody} ls /home/ann/mine"));
    on.ok(&format!("{ann} umount /home/ann/mine"));
    assert_eq!(on.mounts(), [] as [PathBuf; 0]);
}
