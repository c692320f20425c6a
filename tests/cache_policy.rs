//! The eviction policy under the streams a mount makes, beside LRU and Belady's optimum. The figures for
//! larger caches: `cargo bench --bench policy`.

#[path = "../benches/policy/simulator.rs"]
mod simulator;

use simulator::{Ratios, Shape, cyclic, drifting, interleaved, run, shuffled, zipf};

/// Extents that fit: few, for the sake of the unoptimized build.
const CACHE: usize = 256;

const SHAPES: [Shape; 3] = [Shape::SHARDS, Shape::FILES, Shape::PASSTHROUGH];

fn seen(trace: &[usize], shape: Shape, from: usize) -> Ratios {
    let ratios = run(trace, shape, CACHE, from);
    println!("{shape:?}: {ratios:?}");
    assert!(
        ratios.ours <= ratios.belady + 0.005,
        "better than can be: {ratios:?}"
    );
    ratios
}

#[test]
fn shuffled_epochs_keep_what_fits() {
    for shape in SHAPES {
        let fits = CACHE / shape.extents;
        for (percent, aim) in [(25, 0.18), (50, 0.43), (75, 0.66), (95, 0.87)] {
            let data = fits * 100 / percent;
            let ratios = seen(&shuffled(data, 5, 3), shape, data);
            assert!(ratios.ours >= aim, "{percent} % fits, {shape:?}: {ratios:?}");
        }
    }
}

#[test]
fn a_cyclic_scan_keeps_what_fits() {
    let ratios = seen(&cyclic(2 * CACHE, 5), Shape::SHARDS, 2 * CACHE);
    assert!(ratios.ours >= 0.42 && ratios.lru == 0.0, "{ratios:?}");
}

#[test]
fn zipf_is_not_below_lru() {
    for shape in [Shape::SHARDS, Shape::PASSTHROUGH] {
        let fits = CACHE / shape.extents;
        let ratios = seen(&zipf(8 * fits, 40 * fits), shape, 10 * fits);
        assert!(ratios.ours >= ratios.lru, "{ratios:?}");
    }
}

#[test]
fn a_drifting_set_is_followed() {
    for shape in SHAPES {
        let fits = CACHE / shape.extents;
        let ratios = seen(&drifting(fits, 40 * fits, 0), shape, 10 * fits);
        assert!(ratios.ours >= 0.78, "{ratios:?}");
    }
}

#[test]
fn two_jobs_are_not_below_lru() {
    let scan = shuffled(2 * CACHE, 12, 5);
    let jobs = interleaved(&scan, &drifting(CACHE, 24 * CACHE, 1 << 20));
    let ratios = seen(&jobs, Shape::SHARDS, 10 * CACHE);
    assert!(ratios.ours >= ratios.lru, "{ratios:?}");
}

/// More passes under way at once than the window is long at first.
#[test]
fn many_readers_at_once_are_no_reuse() {
    let shape = Shape {
        streams: 16,
        ..Shape::SHARDS
    };
    let ratios = seen(&shuffled(2 * CACHE, 5, 3), shape, 2 * CACHE);
    assert!(ratios.ours >= 0.41, "{ratios:?}");
}
