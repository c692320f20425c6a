//! An agent of many users under load: a hundred mounts leave nothing behind, and the control socket outlives
//! whatever is done to it.

#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/shared_agent.rs"]
mod shared_agent;

use std::{
    fs,
    io::{Read, Write},
    os::unix::net::UnixStream,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed},
    thread,
    time::Duration,
};

use shared_agent::{DEADLINE, SharedAgent};

const USERS: [u32; 5] = [40_021, 40_022, 40_023, 40_024, 40_025];
const VERSIONS: u32 = 20;

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// What a process has.
#[derive(Debug)]
struct Has {
    descriptors: usize,
    threads: usize,
    resident: u64,
}

fn has(pid: i32) -> Has {
    let count = |what| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    let pages = fs::read_to_string(format!("/proc/{pid}/statm")).unwrap();
    let pages: u64 = pages.split(' ').nth(1).unwrap().parse().unwrap();
    Has {
        descriptors: count("fd"),
        threads: count("task"),
        resident: pages * 4096,
    }
}

/// In an order that looks random.
fn shuffled<T>(mut items: Vec<T>, seed: u64) -> Vec<T> {
    let mut state = seed | 1;
    for at in (1..items.len()).rev() {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        items.swap(at, (state >> 33) as usize % (at + 1));
    }
    items
}

#[test]
fn a_hundred_mounts_of_five_users_leave_nothing_behind() {
    let Some(agent) = SharedAgent::start("catalogs = [\"CATALOG\"]") else {
        return;
    };
    for version in 1..=VERSIONS {
        let text = format!("version {version}\n").repeat(2000);
        agent.publish("data", &[("file", &text), (&format!("d/{version}"), "x")]);
    }
    // What the first round leaves is warm; what the others add is a leak.
    round(&agent, 1);
    let quiet = settled(&agent, None);
    round(&agent, 2);
    let after = settled(&agent, Some(&quiet));
    assert!(after.descriptors <= quiet.descriptors, "{quiet:?} {after:?}");
    assert!(after.threads <= quiet.threads, "{quiet:?} {after:?}");
    assert!(
        after.resident < quiet.resident + (48 << 20),
        "{quiet:?} {after:?}"
    );
    // Wherever it might be: others have mounts of their own meanwhile.
    for namespace in ["self".to_owned(), agent.pid().to_string()] {
        let table = fs::read_to_string(format!("/proc/{namespace}/mountinfo")).unwrap();
        let ours = |line: &&str| line.contains(path(&agent.path("")));
        let left: Vec<_> = table.lines().filter(ours).collect();
        assert!(left.is_empty(), "{left:?}");
    }
    eprintln!("after 100 mounts: {quiet:?}; after 200: {after:?}");
}

/// Threads and descriptors that are only kept for a while are gone.
fn settled(agent: &SharedAgent, at_most: Option<&Has>) -> Has {
    let limit = at_most.map_or(usize::MAX, |has| has.threads);
    let mut last = has(agent.pid());
    let mut same = 0;
    agent.wait_for("its threads do not end", || {
        thread::sleep(Duration::from_millis(100));
        let now = has(agent.pid());
        let steady = now.threads == last.threads && now.descriptors == last.descriptors;
        same = if steady { same + 1 } else { 0 };
        last = has(agent.pid());
        // Longer than idle threads are kept.
        (same >= 120 || (at_most.is_some() && last.threads <= limit && same >= 10)).then_some(())
    });
    last
}

fn round(agent: &SharedAgent, seed: u64) {
    let places: Vec<(u32, u32, PathBuf)> = USERS
        .iter()
        .flat_map(|user| (1..=VERSIONS).map(move |version| (*user, version)))
        .map(|(user, version)| (user, version, agent.home(user).join(format!("mnt/{version}"))))
        .collect();
    let stop = AtomicBool::new(false);
    let reads = AtomicU64::new(0);
    thread::scope(|scope| {
        struct Stop<'a>(&'a AtomicBool);
        impl Drop for Stop<'_> {
            fn drop(&mut self) {
                self.0.store(true, Relaxed);
            }
        }
        let stopping = Stop(&stop);
        let users: Vec<_> = USERS
            .iter()
            .map(|user| {
                let mine: Vec<_> = places
                    .iter()
                    .filter(|(owner, ..)| owner == user)
                    .cloned()
                    .collect();
                scope.spawn(move || {
                    for (user, version, place) in shuffled(mine, seed) {
                        agent.ok(user, &[&format!("root:data/{version}"), path(&place)]);
                    }
                })
            })
            .collect();
        users.into_iter().for_each(|user| user.join().unwrap());
        assert_eq!(agent.mounts().len(), 100);
        // Readers, for as long as there is something to read.
        for (at, user) in USERS.into_iter().enumerate() {
            let (stop, reads, places) = (&stop, &reads, &places);
            scope.spawn(move || {
                let mine: Vec<_> = places.iter().filter(|(owner, ..)| *owner == user).collect();
                for (_, version, place) in mine.iter().cycle().skip(at) {
                    if stop.load(Relaxed) {
                        return;
                    }
                    let output = agent
                        .of_user(user, "cat")
                        .arg(place.join("file"))
                        .output()
                        .unwrap();
                    if output.status.success() && !output.stdout.is_empty() {
                        let expected = format!("version {version}\n").repeat(2000);
                        assert!(output.stdout == expected.as_bytes(), "other bytes");
                        reads.fetch_add(1, Relaxed);
                    }
                }
            });
        }
        agent.wait_for("no reader reads", || (reads.load(Relaxed) >= 20).then_some(()));
        let leaving: Vec<_> = (0..2)
            .map(|half| {
                let places = shuffled(places.clone(), seed + 7);
                scope.spawn(move || {
                    for (user, _, place) in places.into_iter().skip(half).step_by(2) {
                        // Somebody may be reading just then.
                        agent.wait_for("not unmounted", || {
                            let output = agent.grid(user, &["unmount", path(&place)]).output().unwrap();
                            output.status.success().then_some(())
                        });
                    }
                })
            })
            .collect();
        leaving.into_iter().for_each(|half| half.join().unwrap());
        drop(stopping);
    });
    assert!(agent.mounts().is_empty());
    for user in USERS {
        assert!(agent.mount_points(user).is_empty());
        // The directory above them may stay: whoever made it was perhaps not the last there.
        let left = fs::read_dir(agent.home(user).join("mnt")).map_or(0, Iterator::count);
        assert_eq!(left, 0);
    }
}

#[test]
fn the_socket_outlives_garbage_slow_writers_and_a_thousand_connections() {
    let Some(agent) = SharedAgent::start("catalogs = [\"CATALOG\"]") else {
        return;
    };
    agent.status(0);
    let before = has(agent.pid());
    let connect = || {
        let stream = UnixStream::connect(agent.socket()).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.set_write_timeout(Some(DEADLINE)).unwrap();
        stream
    };
    let answer = |request: &[u8]| {
        let mut stream = connect();
        // It may be refused before it has been written.
        let _ = stream.write_all(request);
        let _ = stream.shutdown(std::net::Shutdown::Write);
        String::from_utf8_lossy(&shared_agent::read_to_end(stream)).into_owned()
    };
    let mut noise = vec![0u8; 100_000];
    blake3::Hasher::new().finalize_xof().fill(&mut noise);
    for (request, status) in [
        (noise.clone(), ""),
        (b"GET / HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(), "404"),
        (b"\x16\x03\x01\x02\x00".to_vec(), ""),
        (b"GET /v1/agent HTTP/9.9\r\n\r\n".to_vec(), ""),
        (
            [b"GET /v1/agent HTTP/1.1\r\nhost: x\r\nx: ".to_vec(), vec![b'a'; 1 << 20]].concat(),
            "431",
        ),
        (
            b"POST /v1/mounts HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9\r\n\r\nnot json!".to_vec(),
            "400",
        ),
        (
            [
                b"POST /v1/mounts HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 9999999\r\n\r\n".to_vec(),
                vec![b' '; 300_000],
            ]
            .concat(),
            "413",
        ),
        (b"DELETE /v1/mounts HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(), "405"),
    ] {
        // An answer given before everything was read can be lost with the connection: not every time.
        let mut tries = 0;
        let said = loop {
            let said = answer(&request);
            assert!(said.is_empty() || said.starts_with("HTTP/1.1 4"), "{said}");
            tries += 1;
            if said.contains(status) || tries == 50 {
                break said;
            }
        };
        assert!(said.contains(status), "{status}: {said:?}");
    }

    let slow: Vec<_> = (0..50)
        .map(|at| {
            let mut stream = connect();
            let some: &[u8] = match at % 3 {
                0 => b"",
                1 => b"GET /v1/ag",
                _ => b"POST /v1/unmount HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 99\r\n\r\n{",
            };
            stream.write_all(some).unwrap();
            stream
        })
        .collect();
    let held: Vec<_> = (0..1000).map(|_| connect()).collect();
    // Whoever asks is answered: another user, and the one who holds them all.
    agent.status(USERS[0]);
    agent.status(0);
    let now = has(agent.pid());
    assert!(now.descriptors < before.descriptors + 400, "{before:?} {now:?}");
    assert!(now.resident < before.resident + (64 << 20), "{before:?} {now:?}");
    assert!(now.threads < before.threads + 32, "{before:?} {now:?}");
    eprintln!("before: {before:?}; with 1,050 connections: {now:?}");
    // Nobody is waited for without end.
    for mut stream in held.into_iter().chain(slow) {
        let mut bytes = Vec::new();
        let ended = stream.read_to_end(&mut bytes);
        let reset = |error: &std::io::Error| error.kind() == std::io::ErrorKind::ConnectionReset;
        assert!(
            ended.as_ref().is_ok() || ended.as_ref().is_err_and(reset),
            "{ended:?}"
        );
    }
    agent.wait_for("descriptors stay", || {
        (has(agent.pid()).descriptors <= before.descriptors + 2).then_some(())
    });
    agent.status(0);
}
