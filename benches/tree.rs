//! What trees cost: `cargo bench --bench tree -- [ENTRIES]…` (default: 1,000,000 and 10,000,000 files).
//!
//! Each size runs in a process of its own, so that its peak memory is its own. Files lie 1,000 to a
//! directory and have the names, times, objects and ETags that a registered bucket would give them,
//! added in the order of a listing and then, to make the sort work, in random order.

use std::{
    hint::black_box,
    path::Path,
    process::Command,
    time::{Duration, Instant},
};

use grid_mount::{
    digest::{BlockSum, Digest},
    origin::Pin,
    tree::{
        Content, EntryKind, Object, RowNo, Timestamp, Tree,
        builder::{DEFAULT_MEMORY_LIMIT, TreeBuilder},
        unpack,
    },
};

type Failure = Box<dyn std::error::Error>;

fn main() -> Result<(), Failure> {
    let arguments: Vec<String> = std::env::args()
        .skip(1)
        .filter(|argument| !argument.starts_with("--"))
        .collect();
    if let [kind, count] = arguments.as_slice()
        && let Ok(kind) = kind.parse()
    {
        return measure(kind, count.parse()?);
    }
    if !std::env::args().any(|argument| argument == "--bench") {
        // `cargo test --all-targets` runs benchmarks too, to see that they start.
        return Ok(());
    }
    let counts = match arguments.as_slice() {
        [] => vec!["1000000".to_owned(), "10000000".to_owned()],
        counts => counts.to_vec(),
    };
    for count in counts {
        for kind in ["registered", "shuffled", "published"] {
            let status = Command::new(std::env::current_exe()?)
                .args([kind, &count])
                .status()?;
            if !status.success() {
                return Err(format!("{kind} {count}: {status}").into());
            }
        }
    }
    Ok(())
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    /// One object per file, with an ETag; in listing order.
    Registered,
    /// The same in random order.
    Shuffled,
    /// Bundled files with digests and sums.
    Published,
}

impl std::str::FromStr for Kind {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "registered" => Ok(Self::Registered),
            "shuffled" => Ok(Self::Shuffled),
            "published" => Ok(Self::Published),
            _ => Err(()),
        }
    }
}

/// A bijection on `0..2^bits` (odd multiplications and xor-shifts): a shuffle that needs no memory.
fn shuffled(index: u64, count: u64) -> u64 {
    let bits = 64 - count.leading_zeros();
    let mask = (1 << bits) - 1;
    let mut value = index;
    loop {
        value = value.wrapping_mul(0x9e37_79b9_7f4a_7c15) & mask;
        value ^= value >> (bits / 2);
        value = value.wrapping_mul(0xbf58_476d_1ce4_e5b9) & mask;
        value ^= value >> (bits / 2);
        if value < count {
            return value;
        }
    }
}

fn path(index: u64) -> String {
    format!(
        "train/n{:08}/n{:08}_{:06}.JPEG",
        index / 1000,
        index / 1000,
        index % 1000
    )
}

const BUNDLED_FILE: u64 = 100 << 10;
const BUNDLE: u64 = 64 << 20;

fn build(kind: Kind, count: u64, dir: &Path) -> Result<grid_mount::tree::builder::BuiltTree, Failure> {
    let mut builder = TreeBuilder::new(dir, DEFAULT_MEMORY_LIMIT)?;
    let per_bundle = BUNDLE / BUNDLED_FILE;
    let mut bundle = None;
    for step in 0..count {
        let index = if kind == Kind::Shuffled {
            shuffled(step, count)
        } else {
            step
        };
        let path = path(index);
        let noise = blake3::hash(&index.to_le_bytes());
        let random = u64::from_le_bytes(*noise.as_bytes().first_chunk().ok_or("short hash")?);
        let modified = Timestamp {
            seconds: 1_700_000_000 + (random % 10_000_000) as i64,
            nanos: (random >> 34) as u32 % 1_000_000_000,
        };
        let (size, content, digest) = if kind == Kind::Published {
            if step % per_bundle == 0 {
                let digest = Digest::from(noise);
                let sums: Vec<BlockSum> = (0..512u64)
                    .map(|block| BlockSum::of(&[step, block].map(u64::to_le_bytes).concat()))
                    .collect();
                let object = Object {
                    key: format!("objects/{digest}"),
                    size: BUNDLE,
                    pin: Pin::Content,
                    digest: Some(digest),
                };
                bundle = Some(builder.add_object(object, Some(&sums))?);
            }
            let offset = step % per_bundle * BUNDLED_FILE;
            (
                BUNDLED_FILE - random % 4096,
                bundle.map(|object| Content { object, offset }),
                Some(Digest::from(noise)),
            )
        } else {
            let size = 50_000 + random % 100_000;
            let etag = noise.to_hex();
            let pin = Pin::ETag(format!("\"{}\"", etag.get(..32).unwrap_or_default()));
            let object = builder.add_object(
                Object {
                    key: path.clone(),
                    size,
                    pin,
                    digest: None,
                },
                None,
            )?;
            (size, Some(Content { object, offset: 0 }), None)
        };
        builder.add_file(path.as_bytes(), 0o644, modified, size, content, digest)?;
    }
    Ok(builder.finish(dir)?)
}

/// In MiB, from /proc.
fn memory(field: &str) -> Result<u64, Failure> {
    let status = std::fs::read_to_string("/proc/self/status")?;
    let line = status
        .lines()
        .find_map(|line| line.strip_prefix(field))
        .ok_or("no such field in /proc/self/status")?;
    Ok(line
        .split_whitespace()
        .next()
        .ok_or("no figure")?
        .parse::<u64>()?
        / 1024)
}

fn rate(count: u64, time: Duration) -> String {
    format!(
        "{:.2} M/s ({:.0} ns each)",
        count as f64 / time.as_secs_f64() / 1e6,
        time.as_nanos() as f64 / count as f64
    )
}

fn measure(kind: Kind, count: u64) -> Result<(), Failure> {
    const MIB: f64 = (1 << 20) as f64;
    let dir = tempfile::tempdir()?;
    println!("{kind:?}, {count} files");
    let start = Instant::now();
    let built = build(kind, count, dir.path())?;
    println!(
        "  build            {:.1} s, peak memory {} MiB",
        start.elapsed().as_secs_f64(),
        memory("VmHWM:")?
    );
    for (name, part) in [
        ("rows", Some(&built.rows)),
        ("digests", built.digests.as_ref()),
        ("sums", built.sums.as_ref()),
    ] {
        if let Some(part) = part {
            println!(
                "  {name:<16} {:.1} MiB on the wire, {:.1} MiB as used",
                part.wire_size as f64 / MIB,
                part.size as f64 / MIB
            );
        }
    }
    let rows = dir.path().join("rows");
    let start = Instant::now();
    unpack(
        std::fs::File::open(&built.rows.path)?,
        built.rows.size,
        built.rows.digest,
        &rows,
    )?;
    println!("  unpack           {:.2} s", start.elapsed().as_secs_f64());
    let start = Instant::now();
    let tree = Tree::open(&rows)?;
    println!("  open             {:.0} µs", start.elapsed().as_secs_f64() * 1e6);

    let lookups = 1_000_000;
    let directories: Vec<RowNo> = match tree.find(b"train")?.map(|row| tree.entry(row)).transpose()? {
        Some(entry) => match entry.kind {
            EntryKind::Directory { children, .. } => children.map(RowNo).collect(),
            _ => return Err("train is not a directory".into()),
        },
        None => return Err("train is missing".into()),
    };
    let names: Vec<(RowNo, String)> = (0..lookups)
        .map(|step| {
            let index = shuffled(step % count, count);
            (
                directories[(index / 1000) as usize],
                format!("n{:08}_{:06}.JPEG", index / 1000, index % 1000),
            )
        })
        .collect();
    let before = memory("RssAnon:")?;
    let start = Instant::now();
    let mut bytes = 0;
    for row in 0..tree.row_count() {
        if let EntryKind::File { size, .. } = tree.entry(RowNo(row))?.kind {
            bytes += size;
        }
    }
    if bytes != tree.totals().bytes {
        return Err("the sizes do not add up".into());
    }
    println!(
        "  scan of all rows {}",
        rate(tree.row_count().into(), start.elapsed())
    );
    let start = Instant::now();
    for (directory, name) in &names {
        if black_box(tree.lookup(*directory, name.as_bytes())?).is_none() {
            return Err(format!("{name} is missing").into());
        }
    }
    println!("  random lookups   {}", rate(lookups, start.elapsed()));
    let start = Instant::now();
    for (directory, name) in &names {
        black_box(tree.lookup(
            *directory,
            name.get(..name.len() - 1).unwrap_or_default().as_bytes(),
        )?);
    }
    println!("  absent names     {}", rate(lookups, start.elapsed()));
    let start = Instant::now();
    for step in 0..lookups {
        black_box(tree.entry(RowNo(shuffled(step, tree.row_count().into()) as u32))?);
    }
    println!("  random entries   {}", rate(lookups, start.elapsed()));
    println!(
        "  memory           +{} MiB beside mapped pages, over all of that",
        memory("RssAnon:")?.saturating_sub(before)
    );
    Ok(())
}
