//! Hit ratios of the eviction policy beside LRU and Belady's optimum, over traces.
//!
//!     cargo bench --bench policy
//!
//! No clock and no disk take part: the figures are the same on every machine.

#[path = "policy/simulator.rs"]
mod simulator;

use simulator::{Shape, cyclic, drifting, interleaved, run, shuffled, zipf};

/// Extents that fit.
const CACHE: usize = 1024;

fn line(name: &str, trace: &[usize], shape: Shape, from: usize) {
    let ratios = run(trace, shape, CACHE, from);
    println!(
        "{name:<44} ours {:.3}  LRU {:.3}  Belady {:.3}",
        ratios.ours, ratios.lru, ratios.belady
    );
}

fn main() {
    for (how, shape) in [
        ("shards of one extent", Shape::SHARDS),
        (
            "48 readers at once",
            Shape {
                streams: 48,
                ..Shape::SHARDS
            },
        ),
        ("files of 4 extents, readahead", Shape::FILES),
        ("the same, passthrough", Shape::PASSTHROUGH),
    ] {
        println!("{how}:");
        let fits = CACHE / shape.extents;
        for percent in [25, 50, 75, 95] {
            let data = fits * 100 / percent;
            let name = format!("  shuffled epochs, {percent} % fits, from the 2nd on");
            line(&name, &shuffled(data, 6, 3), shape, data);
        }
        line("  cyclic scan, 50 % fits", &cyclic(2 * fits, 6), shape, 2 * fits);
        line("  Zipf 0.9", &zipf(8 * fits, 60 * fits), shape, 10 * fits);
        line("  drifting", &drifting(fits, 60 * fits, 0), shape, 10 * fits);
        let jobs = interleaved(&shuffled(2 * fits, 20, 5), &drifting(fits, 40 * fits, 1 << 20));
        line("  two jobs: shuffled and drifting", &jobs, shape, 10 * fits);
        let elsewhere: Vec<usize> = zipf(8 * fits, 40 * fits).iter().map(|n| n + (1 << 20)).collect();
        let jobs = interleaved(&shuffled(2 * fits, 20, 5), &elsewhere);
        line("  two jobs: shuffled and Zipf", &jobs, shape, 10 * fits);
    }
}
