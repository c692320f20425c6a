//! Metrics as a scraper reads them: well-formed, named by the rules, written down in docs/metrics.md, and
//! true of what was read.

#[path = "support/sandbox.rs"]
mod sandbox;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    io::{Read, Write},
    net::{TcpListener, TcpStream},
    os::unix::net::UnixStream,
    path::Path,
};

use sandbox::{Sandbox, skip};

/// One request, its answer to the end.
fn get(mut stream: impl Read + Write, path: &str) -> (String, String) {
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    let body = match head.contains("chunked") {
        false => body.to_owned(),
        true => unreachable!("a known length is not sent in chunks"),
    };
    (head.to_owned(), body)
}

#[derive(Default, Debug)]
struct Metric {
    kind: String,
    /// Labels → value; of a histogram, with the suffix.
    samples: BTreeMap<String, f64>,
}

/// Parses as promtool does, and lints as it does.
fn parse(text: &str) -> BTreeMap<String, Metric> {
    assert!(text.ends_with('\n'));
    let mut metrics: BTreeMap<String, Metric> = BTreeMap::new();
    let mut helped = BTreeSet::new();
    let mut current = String::new();
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            let (name, help) = help.split_once(' ').unwrap();
            assert!(!help.is_empty() && helped.insert(name.to_owned()), "{line}");
            continue;
        }
        if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').unwrap();
            assert!(helped.contains(name), "{name} has no help");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            assert!(["counter", "gauge", "histogram"].contains(&kind), "{line}");
            assert!(kind != "histogram" || name.ends_with("_seconds"), "{line}");
            for unit in ["ms", "millis", "kb", "mib", "percent", "minutes"] {
                assert!(
                    !name.split('_').any(|word| word == unit),
                    "{name}: not a base unit"
                );
            }
            current = name.to_owned();
            let kind = kind.to_owned();
            let old = metrics.insert(
                current.clone(),
                Metric {
                    kind,
                    ..Metric::default()
                },
            );
            assert!(old.is_none(), "{name} comes twice");
            continue;
        }
        let (series, value) = line.rsplit_once(' ').unwrap();
        let value: f64 = value.parse().unwrap_or_else(|_| panic!("{line}"));
        let (name, labels) = series.split_once('{').map_or((series, ""), |(name, labels)| {
            (name, labels.strip_suffix('}').unwrap())
        });
        let suffix = name
            .strip_prefix(current.as_str())
            .unwrap_or_else(|| panic!("{line} among {current}"));
        let metric = metrics.get_mut(&current).unwrap();
        match metric.kind.as_str() {
            "histogram" => assert!(["_bucket", "_sum", "_count"].contains(&suffix), "{line}"),
            _ => assert_eq!(suffix, "", "{line}"),
        }
        assert!(value >= 0.0, "{line}");
        let old = metric.samples.insert(format!("{suffix}{labels}"), value);
        assert!(old.is_none(), "{line} comes twice");
    }
    for (name, metric) in &metrics {
        if metric.kind == "histogram" {
            let counts = metric.samples.iter().filter(|(key, _)| key.starts_with("_count"));
            for (key, count) in counts {
                let labels = key.strip_prefix("_count").unwrap();
                let comma = if labels.is_empty() { "" } else { "," };
                let last = metric.samples[&format!("_bucket{labels}{comma}le=\"+Inf\"")];
                assert_eq!(last, *count, "{name}");
            }
        }
    }
    metrics
}

fn documented() -> BTreeMap<String, String> {
    let text = fs::read_to_string(Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/metrics.md")).unwrap();
    text.lines()
        .filter_map(|line| {
            let mut cells = line.strip_prefix("| `")?.split('|');
            let name = cells.next()?.trim().trim_end_matches('`').to_owned();
            Some((name, cells.next()?.trim().to_owned()))
        })
        .collect()
}

#[test]
fn what_a_scraper_reads() {
    if !Path::new("/dev/fuse").exists() {
        skip("metrics of a mount", "there is no /dev/fuse");
        return;
    }
    // Free a moment ago; nobody else in this test wants it.
    let address = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let sandbox = Sandbox::new().env("GRID_MOUNT_METRICS_LISTEN", &address.to_string());
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("a"), vec![1; 300_000]).unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    let point = sandbox.path("mnt/quoted \"point\"");
    sandbox.ok(&["data", point.to_str().unwrap()]);
    assert_eq!(fs::read(point.join("a")).unwrap().len(), 300_000);

    let socket = sandbox.path("run/grid-mount/agent.sock");
    let (head, text) = get(UnixStream::connect(&socket).unwrap(), "/metrics");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    assert!(head.contains("text/plain; version=0.0.4"), "{head}");
    let metrics = parse(&text);
    let kinds: BTreeMap<String, String> = metrics
        .iter()
        .map(|(name, metric)| (name.clone(), metric.kind.clone()))
        .collect();
    assert_eq!(kinds, documented());

    let only = |name: &str| {
        let samples = &metrics[name].samples;
        assert_eq!(samples.len(), 1, "{name}: {samples:?}");
        *samples.values().next().unwrap()
    };
    assert_eq!(only("grid_mount_mounts"), 1.0);
    // All of the file, which was nowhere before.
    assert!(only("grid_mount_read_bytes_total") >= 300_000.0);
    assert!(only("grid_mount_origin_received_bytes_total") >= 300_000.0);
    assert_eq!(
        only("grid_mount_fetched_bytes_total"),
        only("grid_mount_origin_received_bytes_total")
    );
    assert!(only("grid_mount_origin_requests_total") >= 1.0);
    assert!(only("grid_mount_cache_limit_bytes") == f64::from(8 << 10) * 1024.0 * 1024.0);
    let by_operation = &metrics["grid_mount_fuse_requests_total"].samples;
    let missed = by_operation
        .iter()
        .find(|(labels, _)| labels.contains("operation=\"read-miss\""))
        .unwrap();
    assert!(missed.0.contains("quoted \\\"point\\\""), "{}", missed.0);
    // Every read that was begun has been answered, so it was timed.
    let timed = &metrics["grid_mount_fuse_request_duration_seconds"].samples;
    assert!(timed[&format!("_count{}", missed.0)] <= *missed.1);

    let (head, by_tcp) = get(TcpStream::connect(address).unwrap(), "/metrics");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    parse(&by_tcp);
    for elsewhere in ["/v1/mounts", "/v1/agent", "/"] {
        let (head, _) = get(TcpStream::connect(address).unwrap(), elsewhere);
        assert!(head.starts_with("HTTP/1.1 404"), "{elsewhere}: {head}");
    }
    // Who says nothing keeps nobody from being answered.
    let _silent: Vec<TcpStream> = (0..8).map(|_| TcpStream::connect(address).unwrap()).collect();
    let (head, _) = get(TcpStream::connect(address).unwrap(), "/metrics");
    assert!(head.starts_with("HTTP/1.1 200"), "{head}");
    sandbox.ok(&["unmount", "--all"]);
}

#[test]
fn the_log_joins_a_read_to_its_requests() {
    if !Path::new("/dev/fuse").exists() {
        skip("the log of a read", "there is no /dev/fuse");
        return;
    }
    let sandbox = Sandbox::new().env("GRID_MOUNT_LOG", "grid_mount=debug");
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("a"), vec![1; 300_000]).unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    let point = sandbox.path("mnt");
    sandbox.ok(&["data", point.to_str().unwrap()]);
    assert_eq!(fs::read(point.join("a")).unwrap().len(), 300_000);
    sandbox.ok(&["unmount", "--all"]);
    let dir = sandbox.path("run/grid-mount");
    let logs: String = fs::read_dir(dir)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "log"))
        .map(|path| fs::read_to_string(path).unwrap())
        .collect();
    let joined = logs.lines().any(|line| {
        line.contains("read{reference=\"alice:data/1\"")
            && line.contains(":fetch{key=")
            && line.contains("GET")
    });
    assert!(joined, "{logs}");
}
