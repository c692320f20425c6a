//! What earlier runs left, brought in on a background thread: the saved order, then a scan.
//!
//! Owns the scan. Nothing waits for it: an object is opened by its name, and until the scan has come past
//! it its bytes are part of an estimate.

use std::{
    collections::HashSet,
    fs::{self, File},
    io::{self, Read},
    os::unix::fs::MetadataExt,
    path::Path,
    sync::{Arc, atomic::Ordering},
};

use super::{
    ObjectId, Shared, disk, order,
    policy::Unit,
    slot::{HEADER_LEN, Header, SLOT_LEN},
};
use crate::block::{BLOCKS_PER_EXTENT, EXTENT_SIZE, ExtentNo};

/// How far the scan has come: it takes the 256 fan-out directories in order.
#[derive(Default)]
pub struct Scan {
    passed: u16,
    /// Objects opened before the scan came to them: whoever opened them counted them.
    opened: HashSet<ObjectId>,
}

const FANS: u16 = 256;

impl Scan {
    /// Of a cache in which there is nothing to find.
    pub fn needless() -> Self {
        Self {
            passed: FANS,
            ..Self::default()
        }
    }

    pub fn finished(&self) -> bool {
        self.passed == FANS
    }

    /// True when the object has not been counted: the caller does it.
    pub fn meets(&mut self, id: &ObjectId) -> bool {
        if u16::from(id.0[0]) < self.passed {
            return false;
        }
        self.opened.insert(*id)
    }

    /// The scan has listed this directory; which of `ids` it is to count.
    fn pass(&mut self, fan: u16, ids: impl Iterator<Item = ObjectId>) -> Vec<bool> {
        let count = ids.map(|id| !self.opened.contains(&id)).collect();
        self.opened.retain(|id| u16::from(id.0[0]) > fan);
        self.passed = fan + 1;
        count
    }
}

/// Names in a directory; none when it cannot be read.
pub fn names(dir: &Path) -> Vec<String> {
    let Ok(entries) = fs::read_dir(dir) else {
        return Vec::new();
    };
    entries
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .collect()
}

/// Moves what cannot be trusted out of the way; it is deleted in the background.
pub fn set_aside(dir: &Path) -> io::Result<()> {
    for sub in ["objects", "trees"] {
        let from = dir.join(sub);
        if from.exists() {
            let aside = (0u32..)
                .map(|n| dir.join(format!("trash-{n}")))
                .find(|path| !path.exists());
            if let Some(aside) = aside {
                fs::rename(from, aside)?;
            }
        }
    }
    disk::unlink(&dir.join("order.log"))?;
    disk::unlink(&dir.join("order"))
}

/// Removes what a dead agent was putting together: whole tree parts are named by their digest alone,
/// everything else begins with a dot.
pub fn remove_staged(trees: &Path) {
    for name in names(trees).iter().filter(|name| name.starts_with('.')) {
        // What stays takes space that nobody counts, and is tried again next time.
        if let Err(error) = disk::unlink(&trees.join(name)) {
            tracing::warn!(name, %error, "a half-finished tree could not be removed");
        }
    }
}

/// The background thread.
pub fn run(shared: &Arc<Shared>) {
    let stopped = || shared.stop.load(Ordering::Acquire);
    let dir = &shared.config.dir;
    if let Some((units, learned)) = order::saved(dir) {
        shared.policy.lock().recall(learned);
        for units in units.chunks(1024) {
            let mut policy = shared.policy.lock();
            units.iter().for_each(|unit| policy.restore(*unit));
        }
    }
    let estimate = shared.space.used();
    for fan in 0..FANS {
        if stopped() {
            return;
        }
        scan_fan(shared, fan);
        shared
            .space
            .set_unscanned(estimate / u64::from(FANS) * u64::from(FANS - 1 - fan));
    }
    shared.space.set_unscanned(0);
    for name in names(&dir.join("trees")) {
        if let (Ok(metadata), Some(id)) = (
            fs::symlink_metadata(dir.join("trees").join(&name)),
            ObjectId::from_hex(&name),
        ) && shared.trees.first_met(&id)
        {
            shared.space.recount(0, metadata.blocks() * 512);
            shared.policy.lock().restore(Unit::tree(id));
        }
    }
    shared.wake();
    for name in names(dir).iter().filter(|name| name.starts_with("trash-")) {
        if let Err(error) = fs::remove_dir_all(dir.join(name)) {
            shared.trouble("removing what cannot be trusted", &error);
        }
    }
}

struct Leftover {
    id: ObjectId,
    bytes: u64,
    units: Vec<Unit>,
}

fn scan_fan(shared: &Arc<Shared>, fan: u16) {
    let dir = shared.config.dir.join("objects").join(format!("{fan:02x}"));
    let left: Vec<Leftover> = names(&dir)
        .iter()
        .filter_map(|name| {
            let id = ObjectId::from_hex(name).filter(|id| u16::from(id.0[0]) == fan)?;
            leftover(shared, id)
        })
        .collect();
    // One step for the whole directory: an object is counted by the scan or by who opened it.
    let count = shared.scan.lock().pass(fan, left.iter().map(|left| left.id));
    let mut policy = shared.policy.lock();
    for (left, count) in left.into_iter().zip(count) {
        if count {
            shared.space.recount(0, left.bytes);
            shared.counters.objects.fetch_add(1, Ordering::Relaxed);
        }
        if !policy.contains(&Unit::object(left.id)) {
            left.units.into_iter().for_each(|unit| policy.restore(unit));
        }
    }
}

fn leftover(shared: &Shared, id: ObjectId) -> Option<Leftover> {
    let (data, sidecar) = shared.paths(&id);
    let metadata = fs::symlink_metadata(&data).ok()?;
    let mut bytes = metadata.blocks() * 512;
    let mut units = Vec::new();
    if metadata.len() > EXTENT_SIZE
        && let Ok(mut file) = File::open(sidecar)
    {
        bytes += disk::allocated(&file).unwrap_or(0);
        let mut header = [0; HEADER_LEN];
        if file.read_exact(&mut header).is_ok() {
            if Header::decode(&id, &header).is_some_and(|header| header.sealed) {
                units.push(Unit::object(id));
            } else {
                let mut slots = [0; SLOT_LEN * BLOCKS_PER_EXTENT as usize];
                for number in (0..metadata.len().div_ceil(EXTENT_SIZE)).map(ExtentNo) {
                    let Ok(read) = fill(&mut file, &mut slots) else {
                        break;
                    };
                    if slots[..read].iter().any(|byte| *byte != 0) {
                        units.push(Unit::extent(id, number));
                    }
                }
            }
        }
    }
    if units.is_empty() {
        // A small object; or one with nothing in it or no sidecar, which goes at its first turn.
        units.push(Unit::extent(id, ExtentNo(0)));
    }
    Some(Leftover { id, bytes, units })
}

fn fill(file: &mut File, buf: &mut [u8]) -> io::Result<usize> {
    let mut have = 0;
    while have < buf.len() {
        match file.read(&mut buf[have..])? {
            0 => break,
            read => have += read,
        }
    }
    Ok(have)
}
