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
    // Every read that was begun has been answered, so it is timed, a moment later.
    let timed = (0..500).any(|_| {
        let (_, text) = get(UnixStream::connect(&socket).unwrap(), "/metrics");
        let metrics = parse(&text);
        let begun = metrics["grid_mount_fuse_requests_total"].samples[missed.0];
        let times = &metrics["grid_mount_fuse_request_duration_seconds"].samples;
        let all = times.get(&format!("_count{}", missed.0)) == Some(&begun);
        if !all {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        all
    });
    assert!(timed, "reads are not timed");

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

/// The next request's body, and an answer that it was taken.
fn taken(listener: &TcpListener) -> serde_json::Value {
    listener.set_nonblocking(true).unwrap();
    let begun = std::time::Instant::now();
    let mut stream = loop {
        match listener.accept() {
            Ok((stream, _)) => break stream,
            Err(error) => assert_eq!(error.kind(), std::io::ErrorKind::WouldBlock),
        }
        assert!(begun.elapsed().as_secs() < 60, "nothing comes");
        std::thread::sleep(std::time::Duration::from_millis(10));
    };
    stream.set_nonblocking(false).unwrap();
    let (mut head, mut byte) = (Vec::new(), [0]);
    while !head.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        head.push(byte[0]);
    }
    let head = String::from_utf8(head).unwrap();
    assert!(head.starts_with("POST /v1/traces HTTP/1.1"), "{head}");
    let length = head.lines().find_map(|line| {
        line.to_ascii_lowercase()
            .strip_prefix("content-length: ")?
            .parse()
            .ok()
    });
    let mut body = vec![0; length.unwrap()];
    stream.read_exact(&mut body).unwrap();
    let answer = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\nconnection: close\r\n\r\n{}";
    stream.write_all(answer.as_bytes()).unwrap();
    serde_json::from_slice(&body).unwrap()
}

#[test]
fn a_collector_is_sent_reads_with_their_requests() {
    if !Path::new("/dev/fuse").exists() {
        skip("the spans of a read", "there is no /dev/fuse");
        return;
    }
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = format!("http://{}", listener.local_addr().unwrap());
    let sandbox = Sandbox::new().env("OTEL_EXPORTER_OTLP_ENDPOINT", &address);
    let source = sandbox.path("source");
    fs::create_dir(&source).unwrap();
    fs::write(source.join("a"), vec![1; 300_000]).unwrap();
    sandbox.ok(&["publish", source.to_str().unwrap(), "data"]);
    let point = sandbox.path("mnt");
    sandbox.ok(&["data", point.to_str().unwrap(), "--prefetch", "none"]);
    assert_eq!(fs::read(point.join("a")).unwrap().len(), 300_000);
    // They come within a second, perhaps not all at once.
    let mut spans: Vec<serde_json::Value> = Vec::new();
    let text = |fields: &serde_json::Value, key: &str| {
        let field = fields
            .as_array()
            .unwrap()
            .iter()
            .find(|field| field["key"] == key);
        field.map(|field| field["value"]["stringValue"].as_str().unwrap().to_owned())
    };
    loop {
        let body = taken(&listener);
        let resource = &body["resourceSpans"][0];
        let service = text(&resource["resource"]["attributes"], "service.name");
        assert_eq!(service.as_deref(), Some("grid-mount"));
        spans.extend(
            resource["scopeSpans"][0]["spans"]
                .as_array()
                .unwrap()
                .iter()
                .cloned(),
        );
        // A fetch, in it its request, above it the read that waited for it.
        let joined = spans.iter().any(|fetch| {
            let read = spans.iter().find(|read| read["spanId"] == fetch["parentSpanId"]);
            let requests = fetch["events"].as_array().unwrap();
            fetch["name"] == "fetch"
                && text(&fetch["attributes"], "key").is_some_and(|key| key.contains("objects/"))
                && requests.iter().any(|event| event["name"] == "GET")
                && read.is_some_and(|read| {
                    read["name"] == "read"
                        && read["traceId"] == fetch["traceId"]
                        && text(&read["attributes"], "reference").as_deref() == Some("alice:data/1")
                })
        });
        if joined {
            break;
        }
    }
    for span in &spans {
        let hex = |field: &str, digits| {
            let text = span[field].as_str().unwrap();
            assert!(
                text.len() == digits && text.bytes().all(|byte| byte.is_ascii_hexdigit()),
                "{span}"
            );
        };
        hex("traceId", 32);
        hex("spanId", 16);
        let at = |field: &str| span[field].as_str().unwrap().parse::<u64>().unwrap();
        assert!(at("startTimeUnixNano") <= at("endTimeUnixNano"), "{span}");
    }
    // A collector that is gone keeps nobody waiting.
    drop(listener);
    sandbox.ok(&["cache", "evict"]);
    sandbox.ok(&["unmount", "--all"]);
    sandbox.ok(&["data", point.to_str().unwrap()]);
    assert_eq!(fs::read(point.join("a")).unwrap().len(), 300_000);
    sandbox.ok(&["unmount", "--all"]);
}
