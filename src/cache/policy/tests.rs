//! A trace simulator: the real policy under the streams a mount makes, beside LRU and Belady.

use std::collections::{BTreeSet, HashMap, HashSet, VecDeque};

use rand::{RngExt, SeedableRng, rngs::StdRng, seq::SliceRandom};

use super::*;

const CACHE: usize = 1000;

fn unit(n: usize) -> Unit {
    Unit::extent(ObjectId(blake3::hash(&n.to_le_bytes()).into()), ExtentNo(0))
}

/// Four passes at a time, each touching its extent 64 times; readahead is up to four extents ahead.
/// Per access: whether a reader found its extent there, and not because readahead had fetched it
/// for this very access.
fn adaptive(trace: &[usize]) -> Vec<bool> {
    let units: HashMap<usize, Unit> = trace.iter().map(|n| (*n, unit(*n))).collect();
    let mut policy = Policy::new(CACHE as u64 * EXTENT_SIZE);
    let mut resident: HashSet<Unit> = HashSet::new();
    let mut hits = vec![true; trace.len()];
    let mut passes: VecDeque<usize> = VecDeque::new();
    let fetch = |policy: &mut Policy, resident: &mut HashSet<Unit>, unit: Unit, purpose| -> bool {
        if resident.contains(&unit) {
            return false;
        }
        while resident.len() >= CACHE {
            assert!(resident.remove(&policy.victim().expect("the policy knows all that is resident")));
        }
        policy.insert(unit, EXTENT_SIZE, purpose);
        resident.insert(unit)
    };
    for at in 0..trace.len() {
        for (ahead, next) in trace.iter().enumerate().skip(at).take(5) {
            // Readahead knows what comes next in a file, not in the next one.
            if ahead == at || next % 4 != 0 {
                let purpose = if ahead == at {
                    Purpose::Reader
                } else {
                    Purpose::Readahead
                };
                let unit = units[next];
                if ahead == at {
                    policy.reference(unit, EXTENT_SIZE);
                }
                if fetch(&mut policy, &mut resident, unit, purpose) {
                    hits[ahead] = false;
                }
            }
        }
        passes.push_back(trace[at]);
        for touch in 0..16 {
            let pass = passes[touch % passes.len()];
            policy.reference(units[&pass], EXTENT_SIZE);
        }
        if passes.len() > 4 {
            passes.pop_front();
        }
    }
    assert_eq!(policy.len(), resident.len());
    hits
}

fn lru(trace: &[usize]) -> Vec<bool> {
    let mut list = LruCache::new(CACHE.try_into().unwrap());
    trace.iter().map(|n| list.put(*n, ()).is_some()).collect()
}

/// Gives up what is needed last.
fn belady(trace: &[usize]) -> Vec<bool> {
    let mut next = vec![usize::MAX; trace.len()];
    let mut last = HashMap::new();
    for (at, n) in trace.iter().enumerate().rev() {
        if let Some(later) = last.insert(n, at) {
            next[at] = later;
        }
    }
    let mut resident = HashMap::new();
    let mut by_next = BTreeSet::new();
    let mut step = |at: usize, n: &usize| {
        let hit = match resident.remove(n) {
            Some(due) => by_next.remove(&(due, *n)),
            None => false,
        };
        resident.insert(*n, next[at]);
        by_next.insert((next[at], *n));
        if resident.len() > CACHE {
            let (_, gone) = by_next.pop_last().unwrap();
            resident.remove(&gone);
        }
        hit
    };
    trace.iter().enumerate().map(|(at, n)| step(at, n)).collect()
}

fn ratio(hits: &[bool]) -> f64 {
    hits.iter().filter(|hit| **hit).count() as f64 / hits.len() as f64
}

/// Prints one line; (adaptive, LRU), from access `from` on.
fn compare(name: &str, trace: &[usize], from: usize) -> (f64, f64) {
    let [ours, lru, best] = [adaptive(trace), lru(trace), belady(trace)].map(|hits| ratio(&hits[from..]));
    println!("{name:<28} adaptive {ours:.3}  LRU {lru:.3}  Belady {best:.3}");
    (ours, lru)
}

fn shuffled(data: usize, epochs: usize, seed: u64) -> Vec<usize> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut order: Vec<usize> = (0..data).collect();
    let mut trace = Vec::new();
    for _ in 0..epochs {
        order.shuffle(&mut rng);
        trace.extend(&order);
    }
    trace
}

/// A working set that fits, moving on so that each extent is used about six times.
fn drifting(len: usize, base: usize) -> Vec<usize> {
    let mut rng = StdRng::seed_from_u64(7);
    (0..len)
        .map(|at| base + at / 6 + rng.random_range(0..CACHE * 3 / 10))
        .collect()
}

fn zipf(data: usize, len: usize) -> Vec<usize> {
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

#[test]
fn shuffled_epochs_keep_what_fits() {
    for (percent, aim) in [(25, 0.2), (50, 0.45), (75, 0.69), (95, 0.89)] {
        let data = CACHE * 100 / percent;
        let (ours, _) = compare(
            &format!("shuffled, {percent} % fits"),
            &shuffled(data, 6, 3),
            data,
        );
        assert!(ours >= aim, "{ours} at {percent} %");
    }
}

#[test]
fn a_cyclic_scan_keeps_what_fits() {
    let data = 2 * CACHE;
    let trace: Vec<usize> = (0..6 * data).map(|at| at % data).collect();
    let (ours, lru) = compare("cyclic, 50 % fits", &trace, data);
    assert!(ours >= 0.45 && lru == 0.0, "{ours}");
}

#[test]
fn zipf_is_not_below_lru() {
    let (ours, lru) = compare("Zipf 0.9", &zipf(8 * CACHE, 60_000), 10_000);
    assert!(ours >= lru, "{ours} {lru}");
}

#[test]
fn a_drifting_set_is_followed() {
    let (ours, _) = compare("drifting", &drifting(60_000, 0), 10_000);
    assert!(ours >= 0.78, "{ours}");
}

#[test]
fn two_jobs_get_the_better_of_both() {
    let (scan, drift) = (shuffled(2 * CACHE, 20, 5), drifting(40_000, 1 << 20));
    let trace: Vec<usize> = scan.iter().zip(&drift).flat_map(|(a, b)| [*a, *b]).collect();
    let (ours, lru) = compare("two jobs", &trace, 10_000);
    assert!(ours >= lru - 0.02, "{ours} {lru}");
}
