//! Access profiles: what one mount noted down, the next fetches, in that order and nothing else.

#[path = "support/s3_origin.rs"]
mod s3_origin;
#[path = "support/sandbox.rs"]
mod sandbox;
#[path = "support/shape.rs"]
mod shape;

use std::{
    collections::BTreeSet,
    fs,
    time::{Duration, Instant},
};

use s3_origin::{S3Origin, Shape};
use sandbox::Sandbox;

const CATALOG: &str = "s3://bucket/team";
const BLOCK: usize = 128 << 10;
/// Larger than anything a reader's neighbours bring along.
const FILE: usize = 24 << 20;
const FILES: [&str; 6] = ["a", "b", "c", "d", "e", "f"];
const POINT: &str = "mnt/point";
/// Of the mebibytes there are, half.
const READS: u64 = 72;
/// Ranges that are on their way at once when a profile is followed, and a few whose order at the origin is
/// not that of their sending.
const AT_ONCE: usize = 48 + 8;

struct World {
    _runtime: tokio::runtime::Runtime,
    origin: S3Origin,
    sandbox: Sandbox,
}

/// `alice:data/1` on an origin that tells what it was asked.
fn world() -> Option<World> {
    if !std::path::Path::new("/dev/fuse").exists() {
        sandbox::skip("profiles", "there is no /dev/fuse");
        return None;
    }
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let origin = runtime.block_on(S3Origin::start(Shape::default()));
    let mut sandbox = Sandbox::new()
        .env("GRID_MOUNT_CATALOG", CATALOG)
        // What is asked for first comes first.
        .env("GRID_MOUNT_CONNECTIONS", "1")
        .env("GRID_MOUNT_USER", "alice");
    for (name, value) in origin.settings() {
        sandbox = sandbox.env(&name, &value);
    }
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    for (number, name) in FILES.iter().enumerate() {
        let mut bytes = vec![0; FILE];
        blake3::Hasher::new()
            .update(&[number as u8])
            .finalize_xof()
            .fill(&mut bytes);
        fs::write(source.join(name), bytes).unwrap();
    }
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    Some(World {
        _runtime: runtime,
        origin,
        sandbox,
    })
}

impl World {
    /// GETs of objects, from the `before`th on: key, offset, length.
    fn gets(&self, before: usize) -> Vec<(String, u64, u64)> {
        let mut ranges = self.origin.ranges().split_off(before);
        ranges.retain(|(key, ..)| key.contains("/objects/"));
        ranges
    }

    /// A block here and there, in no order that a reader could be seen through.
    fn read(&self) {
        use std::os::unix::fs::FileExt;
        for step in 0..READS {
            let place = step * 61 % READS;
            let name = FILES[place as usize % FILES.len()];
            let offset = place / FILES.len() as u64 * (1 << 20);
            let block = |dir: &str| {
                let mut bytes = vec![0; BLOCK];
                let file = fs::File::open(self.sandbox.path(dir).join(name)).unwrap();
                file.read_exact_at(&mut bytes, offset).unwrap();
                bytes
            };
            assert!(
                block(POINT) == block("source"),
                "{name} is not what was published"
            );
        }
    }
}

/// As on another host: nothing cached, nothing of its own.
fn forget(sandbox: &Sandbox) {
    let until = Instant::now() + Duration::from_secs(30);
    while !sandbox.status()["agent"].is_null() {
        assert!(Instant::now() < until, "the agent stays");
        std::thread::sleep(Duration::from_millis(10));
    }
    // It may still be writing there.
    fs::rename(sandbox.path("cache"), sandbox.path("another-hosts-cache")).unwrap();
    fs::create_dir(sandbox.path("cache")).unwrap();
}

/// Which mebibyte of which object, in the order it was first asked for.
fn units(gets: &[(String, u64, u64)]) -> Vec<(String, u64)> {
    let mut seen = BTreeSet::new();
    gets.iter()
        .flat_map(|(key, offset, length)| {
            let units = offset >> 20..=(offset + length - 1) >> 20;
            units.map(move |unit| (key.clone(), unit))
        })
        .filter(|unit| seen.insert(unit.clone()))
        .collect()
}

/// As a profile is followed: what lies in the same four mebibytes comes with the first of it.
fn together(order: &[(String, u64)]) -> Vec<(String, u64)> {
    let place = |unit: &(String, u64)| (unit.0.clone(), unit.1 / 4);
    let first = |unit: &(String, u64)| order.iter().position(|other| place(other) == place(unit));
    let mut order_of_places = order.to_vec();
    order_of_places.sort_by_key(|unit| first(unit));
    order_of_places
}

#[test]
fn the_next_mount_fetches_what_was_read_in_that_order() {
    let Some(world) = world() else { return };
    let sandbox = &world.sandbox;
    let fails = sandbox.fails(1, &["profile", "record", "data"]);
    assert!(fails.contains("no agent is running"), "{fails}");

    let before = world.origin.ranges().len();
    sandbox.ok(&["mount", "data", POINT, "--record-profile", "--prefetch", "none"]);
    world.read();
    let recorded = world.gets(before);
    assert!(units(&recorded).len() as u64 >= READS);

    let mut shape = shape::Shape::of("profile record");
    let kept = shape.take(&sandbox.ok(&["profile", "record", "data", "--json"]));
    shape.was_all_seen_but("error");
    let (blocks, bytes) = (
        kept[0]["blocks"].as_u64().unwrap(),
        kept[0]["bytes"].as_u64().unwrap(),
    );
    assert!((READS..2 * READS).contains(&blocks), "{kept}");
    assert!(bytes < 4096, "{kept}");
    let shared = kept[0]["shared_at"].as_str().unwrap();
    assert!(
        shared.starts_with(CATALOG) && shared.ends_with(".profile"),
        "{kept}"
    );
    let said = sandbox.ok(&["profile", "record", "data"]);
    assert!(
        said.contains("is kept for everybody, at s3://bucket/team/"),
        "{said}"
    );
    // Neither a name nor a user is in it.
    let local = fs::read(kept[0]["kept_at"].as_str().unwrap()).unwrap();
    assert!(!local.windows(5).any(|part| part == b"alice"));
    sandbox.ok(&["unmount", "data"]);

    forget(sandbox);
    let before = world.origin.ranges().len();
    sandbox.ok(&["mount", "data", POINT]);
    let until = Instant::now() + Duration::from_secs(30);
    // Nobody reads: whatever comes, comes by the profile.
    let log = sandbox.path("run/grid-mount/agent.log");
    while !fs::read_to_string(&log)
        .unwrap()
        .contains("followed the access profile")
    {
        assert!(Instant::now() < until, "{}", fs::read_to_string(&log).unwrap());
        std::thread::sleep(Duration::from_millis(10));
    }
    let followed = world.gets(before);
    assert_eq!(units(&followed).len() as u64, READS);
    let (order, came) = (together(&units(&recorded)), units(&followed));
    let order: Vec<_> = order.iter().filter(|unit| came.contains(unit)).collect();
    for (position, unit) in came.iter().enumerate() {
        let wanted = order.iter().position(|other| *other == unit);
        let wanted = wanted.unwrap_or_else(|| panic!("{unit:?} was not read"));
        assert!(
            wanted <= position + AT_ONCE,
            "wanted as number {wanted}, fetched as number {position}"
        );
    }
    // An answer that is slow to come, on a busy machine, is asked for a second time: one in twenty at most.
    let once: BTreeSet<_> = followed.iter().collect();
    let twice = followed.len() - once.len();
    assert!(twice <= followed.len() / 20, "{twice} twice: {followed:?}");
    let total: u64 = once.iter().map(|(.., length)| length).sum();
    assert!(total <= blocks * BLOCK as u64, "{total} bytes: {followed:?}");
    world.read();
    // And is not asked for again.
    let again: u64 = world
        .gets(before)
        .iter()
        .filter(|get| followed.contains(get))
        .count() as u64;
    assert_eq!(again, followed.len() as u64);
    let refused = sandbox.fails(1, &["profile", "record", "data"]);
    assert!(refused.contains("--record-profile"), "{refused}");
    sandbox.ok(&["unmount", "data"]);
}

#[test]
fn damage_in_a_profile_costs_its_benefit_only() {
    let Some(world) = world() else { return };
    let sandbox = &world.sandbox;
    sandbox.ok(&["mount", "data", POINT, "--record-profile", "--prefetch", "none"]);
    world.read();
    // Unmounting keeps it, too.
    sandbox.ok(&["unmount", "data"]);
    let written = world.origin.written();
    let (key, _) = written
        .iter()
        .find(|(key, _)| key.ends_with(".profile"))
        .unwrap_or_else(|| panic!("{written:?}"));
    world
        .origin
        .put(key, b"gm-prof\x01 and then something else entirely".to_vec());
    forget(sandbox);
    sandbox.ok(&["mount", "data", POINT]);
    world.read();
    sandbox.ok(&["unmount", "data"]);
}
