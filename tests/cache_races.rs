//! The protocol of `src/cache/extent.rs` under a model checker: that very file, its atomics in the hands of
//! `shuttle`, which decides after each of them who goes on.
//!
//! The invariants, over all schedules tried:
//! - what a reader has pinned and found present is whole as long as it reads: never a hole, never half written;
//! - two evictions, or an eviction and a reader or filler, are never in one extent at once;
//! - what has been handed out sealed is complete and never changes again;
//! - when everybody is gone, what is present is whole.
//!
//! The checker takes every atomic operation as sequentially consistent: it finds wrong orders of steps, not
//! memory orderings that are too weak.

// The parts that meet files, loading and doubt, are of no use here.
#[allow(dead_code)]
#[path = "../src/cache/extent.rs"]
mod extent;
mod sync {
    pub use shuttle::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
}

use extent::{Extent, Seal};
use shuttle::{
    sync::{Arc, Mutex, atomic::Ordering},
    thread,
};
use sync::{AtomicBool, AtomicU64};

const BLOCKS: usize = 2;
const WHOLE: u64 = (1 << BLOCKS) - 1;
const HOLE: u64 = 0;
/// A block is written in two halves.
const HALF: u64 = 1;
const DATA: u64 = 3;

struct Object {
    extents: [Extent; 2],
    seal: Seal,
    /// Sealing is one at a time: the second would hand out what the first may yet withdraw.
    lifecycle: Mutex<()>,
    disk: [[AtomicU64; BLOCKS]; 2],
    /// Evictions that are punching, by extent.
    punching: [AtomicU64; 2],
    handed: AtomicBool,
}

impl Object {
    fn new() -> Self {
        Self {
            extents: Default::default(),
            seal: Seal::new(false),
            lifecycle: Mutex::new(()),
            disk: Default::default(),
            punching: Default::default(),
            handed: AtomicBool::new(false),
        }
    }

    fn fill(&self, number: usize, block: usize) {
        let extent = &self.extents[number];
        let Some(_pin) = extent.pin() else { return };
        let claim = extent.claim(1 << block);
        if claim.blocks == 0 || self.seal.is_set() {
            return;
        }
        let place = &self.disk[number][block];
        assert_eq!(place.swap(HALF, Ordering::SeqCst), HOLE, "written twice");
        place.store(DATA, Ordering::SeqCst);
        assert!(!self.handed.load(Ordering::SeqCst), "wrote what the kernel has");
        assert_eq!(
            self.punching[number].load(Ordering::SeqCst),
            0,
            "filled while punched"
        );
        extent.publish(1 << block);
    }

    fn read(&self, number: usize, block: usize) {
        let extent = &self.extents[number];
        let Some(_pin) = extent.pin() else { return };
        if extent.present() & 1 << block != 0 {
            assert_eq!(
                self.disk[number][block].load(Ordering::SeqCst),
                DATA,
                "read a hole"
            );
        }
    }

    fn evict(&self, number: usize) {
        let Some(taken) = self.extents[number].take(&self.seal) else {
            return;
        };
        assert_eq!(
            self.punching[number].fetch_add(1, Ordering::SeqCst),
            0,
            "evicted twice at once"
        );
        taken.clear();
        for block in &self.disk[number] {
            assert!(!self.handed.load(Ordering::SeqCst), "punched what the kernel has");
            block.store(HOLE, Ordering::SeqCst);
        }
        self.punching[number].fetch_sub(1, Ordering::SeqCst);
    }

    /// As `CachedObject::seal`: looks, and then with the lifecycle lock marks and looks again.
    fn seal(&self) {
        for extent in &self.extents {
            let Some(_pin) = extent.pin() else { return };
            if extent.present() & WHOLE != WHOLE {
                return;
            }
        }
        let _turn = self.lifecycle.lock().unwrap();
        if !self.seal.set() && !self.extents.iter().all(|extent| extent.stands(WHOLE)) {
            self.seal.withdraw();
            return;
        }
        self.handed.store(true, Ordering::SeqCst);
        self.whole_where_present(WHOLE);
    }

    fn whole_where_present(&self, least: u64) {
        for (extent, disk) in self.extents.iter().zip(&self.disk) {
            let present = extent.present();
            assert_eq!(present & least, least);
            for (block, place) in disk.iter().enumerate() {
                if present & 1 << block != 0 {
                    assert_eq!(place.load(Ordering::SeqCst), DATA, "present and not whole");
                }
            }
        }
    }
}

fn race(complete: bool, with: &'static [fn(&Object)]) {
    shuttle::check_pct(
        move || {
            let object = Arc::new(Object::new());
            if complete {
                for (number, block) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
                    object.fill(number, block);
                }
            }
            let threads: Vec<_> = with
                .iter()
                .map(|step| {
                    let object = object.clone();
                    thread::spawn(move || step(&object))
                })
                .collect();
            for thread in threads {
                thread.join().unwrap();
            }
            let handed = object.handed.load(Ordering::SeqCst);
            object.whole_where_present(if handed { WHOLE } else { 0 });
            // Nobody left a gate shut.
            assert!(object.extents.iter().all(|extent| extent.pin().is_some()));
        },
        4000,
        4,
    );
}

#[test]
fn readers_never_see_what_eviction_or_a_filler_has_in_its_hands() {
    race(
        true,
        &[
            |o| o.evict(0),
            |o| o.read(0, 0),
            |o| o.evict(0),
            |o| o.fill(0, 0),
            |o| o.read(0, 1),
        ],
    );
    race(
        false,
        &[
            |o| o.fill(0, 0),
            |o| o.fill(0, 0),
            |o| o.read(0, 0),
            |o| o.evict(0),
        ],
    );
}

#[test]
fn what_was_handed_out_sealed_is_whole_for_ever() {
    race(
        true,
        &[|o| o.seal(), |o| o.seal(), |o| o.evict(0), |o| o.read(0, 0)],
    );
    race(
        true,
        &[
            |o| o.seal(),
            |o| o.evict(0),
            |o| o.evict(1),
            |o| o.fill(1, 1),
            |o| o.read(1, 1),
        ],
    );
}
