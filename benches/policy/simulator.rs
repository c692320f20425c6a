//! Drives the real policy with request streams as a mount makes them, and counts what the cache would
//! have had.
//!
//! A *trace* is a list of objects in the order in which they are opened. Several streams take the next
//! object each and read it from the start: 64 touches per extent, one after the other, interleaved
//! with the other streams' touches, reported to the policy as `CachedObject` reports them (once per turn
//! of the policy's clock, heard in batches). Beside it LRU and Belady's optimum see the same extents in
//! the same order, once per pass.

use std::collections::{BTreeSet, HashMap, HashSet};

use grid_mount::{
    block::{BLOCKS_PER_EXTENT, EXTENT_SIZE, ExtentNo},
    cache::{
        ObjectId, Purpose,
        policy::{Policy, Unit},
    },
};
use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};

/// Reports that wait for the policy, at most: as many as one thread's share of them in the cache.
const NEWS: usize = 512;

/// How the objects of a trace are read.
#[derive(Clone, Copy, Debug)]
pub struct Shape {
    /// Extents per object.
    pub extents: usize,
    /// Objects being read at once.
    pub streams: usize,
    /// Extents that readahead is in front of the reader within an object.
    pub readahead: usize,
    /// Complete objects are sealed when they are opened again, and from then on the kernel reads them:
    /// the cache hears of the open and of nothing else.
    pub passthrough: bool,
}

impl Shape {
    pub const SHARDS: Self = Self {
        extents: 1,
        streams: 4,
        readahead: 0,
        passthrough: false,
    };
    pub const FILES: Self = Self {
        extents: 4,
        streams: 4,
        readahead: 2,
        passthrough: false,
    };
    pub const PASSTHROUGH: Self = Self {
        passthrough: true,
        ..Self::FILES
    };
}

/// Hit ratios from the given point of the trace on.
#[derive(Clone, Copy, Debug)]
pub struct Ratios {
    pub ours: f64,
    pub lru: f64,
    pub belady: f64,
}

/// A cache of `capacity` extents.
pub fn run(trace: &[usize], shape: Shape, capacity: usize, from: usize) -> Ratios {
    let (hits, order) = Simulation::new(shape, capacity).run(trace);
    let skip = from * shape.extents;
    let ratio = |hits: &[bool]| {
        let counted = &hits[skip..];
        counted.iter().filter(|hit| **hit).count() as f64 / counted.len() as f64
    };
    Ratios {
        ours: ratio(&hits),
        lru: ratio(&lru(&order, capacity)),
        belady: ratio(&belady(&order, capacity)),
    }
}

struct Stream {
    object: usize,
    id: ObjectId,
    touch: u64,
    /// Read by the kernel without asking anybody.
    sealed: bool,
    fetched: Vec<bool>,
}

struct Simulation {
    shape: Shape,
    capacity: usize,
    policy: Policy,
    resident: HashSet<Unit>,
    used: usize,
    sealed: HashSet<Unit>,
    reported: HashMap<Unit, u32>,
    news: Vec<(Unit, u64)>,
    ids: HashMap<usize, ObjectId>,
    hits: Vec<bool>,
    order: Vec<usize>,
}

impl Simulation {
    fn new(shape: Shape, capacity: usize) -> Self {
        Self {
            shape,
            capacity,
            policy: Policy::new(capacity as u64 * EXTENT_SIZE),
            resident: HashSet::new(),
            used: 0,
            sealed: HashSet::new(),
            reported: HashMap::new(),
            news: Vec::new(),
            ids: HashMap::new(),
            hits: Vec::new(),
            order: Vec::new(),
        }
    }

    /// Per extent read, in the order in which the reads began: whether it was there, and not because
    /// readahead had just fetched it for this very read.
    fn run(mut self, trace: &[usize]) -> (Vec<bool>, Vec<usize>) {
        let mut next = trace.iter();
        let mut streams: Vec<Stream> = Vec::new();
        loop {
            while streams.len() < self.shape.streams {
                let Some(object) = next.next() else { break };
                let stream = self.open(*object);
                streams.push(stream);
            }
            if streams.is_empty() {
                break;
            }
            let touches = self.shape.extents as u64 * BLOCKS_PER_EXTENT;
            streams.retain_mut(|stream| {
                self.touch(stream);
                stream.touch += 1;
                stream.touch < touches
            });
        }
        (self.hits, self.order)
    }

    fn open(&mut self, object: usize) -> Stream {
        let id = *self
            .ids
            .entry(object)
            .or_insert_with(|| ObjectId(blake3::hash(&object.to_le_bytes()).into()));
        let extents: Vec<Unit> = (0..self.shape.extents)
            .map(|extent| Unit::extent(id, ExtentNo(extent as u64)))
            .collect();
        let sealed_unit = Unit::object(id);
        let whole = extents.iter().all(|unit| self.resident.contains(unit));
        if self.shape.passthrough && whole {
            self.hear();
            extents.iter().for_each(|unit| {
                self.resident.remove(unit);
            });
            self.resident.insert(sealed_unit);
            self.sealed.insert(sealed_unit);
            self.policy.seal(sealed_unit, extents.into_iter());
        }
        let sealed = self.sealed.contains(&sealed_unit);
        if sealed {
            self.news.push((sealed_unit, self.object_bytes()));
        }
        Stream {
            object,
            id,
            touch: 0,
            sealed,
            fetched: vec![false; self.shape.extents],
        }
    }

    fn object_bytes(&self) -> u64 {
        self.shape.extents as u64 * EXTENT_SIZE
    }

    fn touch(&mut self, stream: &mut Stream) {
        let extent = (stream.touch / BLOCKS_PER_EXTENT) as usize;
        let begins = stream.touch.is_multiple_of(BLOCKS_PER_EXTENT);
        let unit = Unit::extent(stream.id, ExtentNo(extent as u64));
        // What the kernel holds open is there until it is closed, whatever the cache does.
        let there = stream.sealed || self.resident.contains(&unit);
        if begins {
            self.hits.push(there && !stream.fetched[extent]);
            self.order.push(stream.object * self.shape.extents + extent);
        }
        if stream.sealed {
            return;
        }
        if self.reported.get(&unit) != Some(&self.policy.clock()) {
            self.reported.insert(unit, self.policy.clock());
            self.news.push((unit, EXTENT_SIZE));
            if self.news.len() >= NEWS {
                self.hear();
            }
        }
        if !there {
            self.fill(unit, Purpose::Reader);
        }
        if begins {
            for ahead in extent + 1..self.shape.extents.min(extent + 1 + self.shape.readahead) {
                let unit = Unit::extent(stream.id, ExtentNo(ahead as u64));
                if !self.resident.contains(&unit) {
                    stream.fetched[ahead] = true;
                    self.fill(unit, Purpose::Readahead);
                }
            }
        }
    }

    fn hear(&mut self) {
        for (unit, bytes) in std::mem::take(&mut self.news) {
            self.policy.reference(unit, bytes);
        }
    }

    fn fill(&mut self, unit: Unit, purpose: Purpose) {
        self.hear();
        while self.used >= self.capacity {
            let victim = self
                .policy
                .victim()
                .expect("the policy knows all that is resident");
            assert!(self.resident.remove(&victim));
            self.used -= match self.sealed.remove(&victim) {
                true => self.shape.extents,
                false => 1,
            };
        }
        self.policy.insert(unit, EXTENT_SIZE, purpose);
        self.resident.insert(unit);
        self.used += 1;
    }
}

fn lru(order: &[usize], capacity: usize) -> Vec<bool> {
    let mut list = lru::LruCache::new(capacity.try_into().expect("not zero"));
    order.iter().map(|n| list.put(*n, ()).is_some()).collect()
}

/// Gives up what is needed last.
fn belady(order: &[usize], capacity: usize) -> Vec<bool> {
    let mut next = vec![usize::MAX; order.len()];
    let mut last = HashMap::new();
    for (at, n) in order.iter().enumerate().rev() {
        if let Some(later) = last.insert(n, at) {
            next[at] = later;
        }
    }
    let mut resident = HashMap::new();
    let mut by_next = BTreeSet::new();
    let mut hits = Vec::with_capacity(order.len());
    for (at, n) in order.iter().enumerate() {
        let hit = match resident.remove(n) {
            Some(due) => by_next.remove(&(due, *n)),
            None => false,
        };
        hits.push(hit);
        resident.insert(*n, next[at]);
        by_next.insert((next[at], *n));
        if resident.len() > capacity
            && let Some((_, gone)) = by_next.pop_last()
        {
            resident.remove(&gone);
        }
    }
    hits
}

/// Every object once an epoch, in a new order each time.
pub fn shuffled(data: usize, epochs: usize, seed: u64) -> Vec<usize> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..data).collect();
    let mut trace = Vec::new();
    for _ in 0..epochs {
        order.shuffle(&mut rng);
        trace.extend(&order);
    }
    trace
}

/// Every object once an epoch, always in the same order.
pub fn cyclic(data: usize, epochs: usize) -> Vec<usize> {
    (0..epochs * data).map(|at| at % data).collect()
}

/// A working set of 0.3 of the cache that moves on, so that each object is used about six times.
pub fn drifting(fits: usize, len: usize, base: usize) -> Vec<usize> {
    let mut rng = StdRng::seed_from_u64(7);
    (0..len)
        .map(|at| base + at / 6 + rng.random_range(0..fits * 3 / 10))
        .collect()
}

/// Object n is asked for in proportion to n to the power of -0.9.
pub fn zipf(data: usize, len: usize) -> Vec<usize> {
    let mut rng = StdRng::seed_from_u64(9);
    let mut sum = 0.0;
    let cumulative: Vec<f64> = (1..=data)
        .map(|rank| {
            sum += (rank as f64).powf(-0.9);
            sum
        })
        .collect();
    (0..len)
        .map(|_| {
            let at = rng.random_range(0.0..sum);
            cumulative.partition_point(|up_to| *up_to < at)
        })
        .collect()
}

/// Two jobs that take turns.
pub fn interleaved(one: &[usize], other: &[usize]) -> Vec<usize> {
    one.iter().zip(other).flat_map(|(a, b)| [*a, *b]).collect()
}
