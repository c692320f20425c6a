//! What this agent does, as Prometheus reads it (text format 0.0.4), on the control socket and, where that
//! is wanted, on a TCP address. docs/metrics.md tells what each metric is.

use std::{
    fmt::Write as _,
    fs, io,
    net::SocketAddr,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

use axum::{
    Extension, Router,
    extract::State,
    http::header,
    response::{IntoResponse, Response},
    routing::get,
    serve::Listener,
};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    time::Sleep,
};

use super::{Agent, Mount, access::Caller};
use crate::{
    fuse::Operation,
    histogram::{BOUNDS_MICROS, Distribution},
};

const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";
/// Scrapers at once on the TCP address, and for how long each may stay: anybody can reach it.
const MAX_SCRAPERS: usize = 16;
const SCRAPE_DEADLINE: Duration = Duration::from_secs(10);
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);

#[derive(Clone, Copy)]
enum Kind {
    Counter,
    Gauge,
    Histogram,
}

/// The text as it grows. A metric is announced once, then its samples follow.
#[derive(Default)]
struct Exposition(String);

impl Exposition {
    fn announce(&mut self, name: &str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        let _ = writeln!(self.0, "# HELP {name} {help}\n# TYPE {name} {kind}");
    }

    fn sample(&mut self, name: &str, labels: &str, value: impl std::fmt::Display) {
        let _ = match labels {
            "" => writeln!(self.0, "{name} {value}"),
            labels => writeln!(self.0, "{name}{{{labels}}} {value}"),
        };
    }

    /// One metric with one sample.
    fn one(&mut self, name: &str, kind: Kind, help: &str, value: impl std::fmt::Display) {
        self.announce(name, kind, help);
        self.sample(name, "", value);
    }

    fn distribution(&mut self, name: &str, labels: &str, distribution: &Distribution) {
        let comma = if labels.is_empty() { "" } else { "," };
        let bucket = format!("{name}_bucket");
        let mut count = 0;
        for (bound, here) in BOUNDS_MICROS.iter().zip(distribution.counts) {
            count += here;
            let bound = *bound as f64 / 1e6;
            self.sample(&bucket, &format!("{labels}{comma}le=\"{bound}\""), count);
        }
        let count = distribution.count();
        self.sample(&bucket, &format!("{labels}{comma}le=\"+Inf\""), count);
        self.sample(&format!("{name}_sum"), labels, distribution.sum.as_secs_f64());
        self.sample(&format!("{name}_count"), labels, count);
    }
}

/// A label's value as the format wants it.
fn escaped(value: &str) -> String {
    value
        .replace('\\', "\\\\")
        .replace('"', "\\\"")
        .replace('\n', "\\n")
}

fn labels(mount: &Mount) -> String {
    format!(
        "reference=\"{}\",mount_point=\"{}\"",
        escaped(&mount.info.reference.to_string()),
        escaped(&mount.info.mount_point.display().to_string())
    )
}

impl Agent {
    /// Everything of the host's, and what concerns one mount for `mounts` alone: as text.
    fn metrics(&self, mounts: &[Arc<Mount>]) -> String {
        let mut text = Exposition::default();
        text.announce(
            "grid_mount_build_info",
            Kind::Gauge,
            "The program's version; always 1.",
        );
        let version = format!("version=\"{}\"", escaped(env!("CARGO_PKG_VERSION")));
        text.sample("grid_mount_build_info", &version, 1);
        Self::mount_metrics(&mut text, mounts);
        self.fetch_metrics(&mut text);
        self.cache_metrics(&mut text);
        process_metrics(&mut text);
        text.0
    }

    fn mount_metrics(text: &mut Exposition, mounts: &[Arc<Mount>]) {
        text.one(
            "grid_mount_mounts",
            Kind::Gauge,
            "Mounts served now.",
            mounts.len(),
        );
        let asked = |mount: &Arc<Mount>| {
            let counters = mount.mounted.counters();
            let asked = Operation::ALL
                .iter()
                .filter(|operation| counters.get(**operation) > 0);
            asked.copied().collect::<Vec<_>>()
        };
        let name = "grid_mount_fuse_requests_total";
        text.announce(name, Kind::Counter, "Requests of the kernel, by operation.");
        for mount in mounts {
            for operation in asked(mount) {
                let labels = format!("{},operation=\"{}\"", labels(mount), operation.name());
                text.sample(name, &labels, mount.mounted.counters().get(operation));
            }
        }
        let name = "grid_mount_fuse_request_duration_seconds";
        text.announce(
            name,
            Kind::Histogram,
            "How long requests of the kernel took to answer.",
        );
        for mount in mounts {
            for operation in asked(mount) {
                let times = mount.mounted.counters().times(operation);
                if times.count() > 0 {
                    let labels = format!("{},operation=\"{}\"", labels(mount), operation.name());
                    text.distribution(name, &labels, &times);
                }
            }
        }
        let mut each =
            |name: &str, kind: Kind, help: &str, value: &dyn Fn(&super::control::Traffic) -> Option<f64>| {
                text.announce(name, kind, help);
                for mount in mounts {
                    if let Some(value) = value(&mount.watch.traffic(&mount.mounted)) {
                        text.sample(name, &labels(mount), value);
                    }
                }
            };
        each(
            "grid_mount_read_bytes_total",
            Kind::Counter,
            "Bytes given to the kernel.",
            &|traffic| Some(traffic.bytes_read as f64),
        );
        each(
            "grid_mount_fetched_bytes_total",
            Kind::Counter,
            "Bytes fetched from the origin for this mount, ahead of its readers too.",
            &|traffic| Some(traffic.bytes_from_origin as f64),
        );
        each(
            "grid_mount_read_wait_seconds_total",
            Kind::Counter,
            "Time that readers waited for the origin, all together.",
            &|traffic| Some(traffic.waited_seconds),
        );
        each(
            "grid_mount_failed_requests_total",
            Kind::Counter,
            "Requests of the kernel that were answered with an error.",
            &|traffic| Some(traffic.failures as f64),
        );
        each(
            "grid_mount_open_files",
            Kind::Gauge,
            "Open files, where the kernel tells.",
            &|traffic| traffic.open_files.map(|count| count as f64),
        );
    }

    fn fetch_metrics(&self, text: &mut Exposition) {
        use Kind::{Counter, Gauge};
        let fetch = self.fetcher.stats();
        let block = crate::block::BLOCK_SIZE;
        let counters = [
            (
                "grid_mount_fetch_hits_total",
                "Reads answered without the origin.",
                fetch.hits,
            ),
            (
                "grid_mount_fetch_misses_total",
                "Blocks asked of origins.",
                fetch.misses,
            ),
            (
                "grid_mount_cache_read_bytes_total",
                "Bytes of reads answered without the origin.",
                fetch.cache_bytes,
            ),
            (
                "grid_mount_origin_received_bytes_total",
                "Bytes received from origins.",
                fetch.origin_bytes,
            ),
            (
                "grid_mount_origin_requests_total",
                "Requests sent to origins.",
                fetch.gets,
            ),
            (
                "grid_mount_origin_retries_total",
                "Requests sent again after a failure.",
                fetch.retries,
            ),
            (
                "grid_mount_origin_hedges_total",
                "Second requests beside a slow first one.",
                fetch.hedges,
            ),
            (
                "grid_mount_origin_throttles_total",
                "Answers that asked to slow down.",
                fetch.slow_downs,
            ),
            (
                "grid_mount_readahead_bytes_total",
                "Bytes fetched ahead of readers, in whole blocks.",
                fetch.readahead_blocks * block,
            ),
            (
                "grid_mount_readahead_used_bytes_total",
                "Of those, bytes of blocks that were read.",
                fetch.readahead_used * block,
            ),
            (
                "grid_mount_origin_corrupt_blocks_total",
                "Blocks that did not arrive as they were published.",
                fetch.corrupt_blocks,
            ),
            (
                "grid_mount_cache_direct_blocks_total",
                "Blocks cached past the page cache.",
                fetch.fills_direct,
            ),
            (
                "grid_mount_cache_dropped_blocks_total",
                "Blocks not cached because the disk was too slow.",
                fetch.fills_dropped,
            ),
            (
                "grid_mount_cache_failed_blocks_total",
                "Blocks not cached because the disk failed or was full.",
                fetch.fills_failed,
            ),
            ("grid_mount_read_errors_total", "Reads that failed.", fetch.errors),
        ];
        for (name, help, value) in counters {
            text.one(name, Counter, help, value);
        }
        let name = "grid_mount_origin_response_seconds";
        text.announce(name, Kind::Histogram, "How long origins took to begin an answer.");
        text.distribution(name, "", &self.fetcher.answer_times());
        text.one(
            "grid_mount_fetch_memory_bytes",
            Gauge,
            "Memory that requests to origins hold.",
            self.fetcher.memory_in_flight(),
        );
    }

    fn cache_metrics(&self, text: &mut Exposition) {
        use Kind::{Counter, Gauge};
        let cache = self.cache.usage();
        let gauges = [
            (
                "grid_mount_cache_bytes",
                "Disk space that the cache takes.",
                cache.allocated_bytes,
            ),
            (
                "grid_mount_cache_limit_bytes",
                "Disk space that the cache may take.",
                cache.max_bytes,
            ),
            (
                "grid_mount_cache_objects",
                "Objects in the cache, in part or whole.",
                cache.objects,
            ),
            (
                "grid_mount_cache_degraded",
                "1 while the cache takes nothing new, else 0.",
                u64::from(cache.degraded.is_some()),
            ),
        ];
        for (name, help, value) in gauges {
            text.one(name, Gauge, help, value);
        }
        if let Ok(disk) = nix::sys::statvfs::statvfs(&self.cache_config.dir) {
            text.one(
                "grid_mount_cache_disk_free_bytes",
                Gauge,
                "Free space of the cache's disk.",
                disk.blocks_available() * disk.fragment_size(),
            );
        }
        let counters = [
            (
                "grid_mount_cache_hits_total",
                "Reads that the cache on disk answered.",
                cache.hits,
            ),
            (
                "grid_mount_cache_misses_total",
                "Reads that it could not.",
                cache.misses,
            ),
            (
                "grid_mount_cache_evictions_total",
                "Extents, sealed objects and trees evicted.",
                cache.evictions,
            ),
            (
                "grid_mount_cache_fill_errors_total",
                "Blocks that could not be stored.",
                cache.fill_errors,
            ),
            (
                "grid_mount_cache_damaged_blocks_total",
                "Blocks found damaged on disk.",
                cache.verify_failures,
            ),
        ];
        for (name, help, value) in counters {
            text.one(name, Counter, help, value);
        }
    }
}

/// By the names that every exporter uses.
fn process_metrics(text: &mut Exposition) {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let number = |field: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(field))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    if let Some(kib) = number("VmRSS:") {
        text.one(
            "process_resident_memory_bytes",
            Kind::Gauge,
            "Resident memory of the agent.",
            kib * 1024,
        );
    }
    if let Some(threads) = number("Threads:") {
        text.one("process_threads", Kind::Gauge, "Threads of the agent.", threads);
    }
    if let Ok(open) = fs::read_dir("/proc/self/fd") {
        text.one(
            "process_open_fds",
            Kind::Gauge,
            "Open descriptors of the agent.",
            open.count(),
        );
    }
}

/// On the control socket, of the mounts that the caller may see.
pub(super) async fn answer(
    State(agent): State<Arc<Agent>>,
    Extension(caller): Extension<Arc<Caller>>,
) -> Response {
    let mounts = agent.seen_by(&caller);
    exposition(agent, mounts).await
}

async fn exposition(agent: Arc<Agent>, mounts: Vec<Arc<Mount>>) -> Response {
    let text = super::stored::blocking(move || agent.metrics(&mounts)).await;
    ([(header::CONTENT_TYPE, CONTENT_TYPE)], text).into_response()
}

/// Answers `GET /metrics`, and nothing else, on a TCP address, until it is dropped.
pub async fn serve(agent: Arc<Agent>, listener: std::net::TcpListener) -> io::Result<()> {
    listener.set_nonblocking(true)?;
    let listener = Scrapers {
        listener: TcpListener::from_std(listener)?,
        permits: Arc::new(Semaphore::new(MAX_SCRAPERS)),
    };
    let close = axum::response::AppendHeaders([(header::CONNECTION, "close")]);
    let routes = Router::new()
        .route(
            "/metrics",
            get(move |State(agent): State<Arc<Agent>>| async move {
                // Of all: whoever gave the address decided who may connect.
                let mounts = agent.served();
                (close, exposition(agent, mounts).await)
            }),
        )
        .with_state(agent);
    axum::serve(listener, routes).await
}

struct Scrapers {
    listener: TcpListener,
    permits: Arc<Semaphore>,
}

impl Listener for Scrapers {
    type Io = Scraper;
    type Addr = SocketAddr;

    async fn accept(&mut self) -> (Self::Io, Self::Addr) {
        loop {
            let Ok(permit) = Arc::clone(&self.permits).acquire_owned().await else {
                // The semaphore is never closed.
                std::future::pending::<()>().await;
                continue;
            };
            match self.listener.accept().await {
                Ok((stream, address)) => {
                    let scraper = Scraper {
                        stream,
                        deadline: Box::pin(tokio::time::sleep(SCRAPE_DEADLINE)),
                        _permit: permit,
                    };
                    return (scraper, address);
                }
                Err(error) => {
                    tracing::warn!(%error, "a scraper's connection was not accepted");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    fn local_addr(&self) -> io::Result<Self::Addr> {
        self.listener.local_addr()
    }
}

/// A connection that breaks off after its deadline, however slowly its peer reads or writes.
struct Scraper {
    stream: TcpStream,
    deadline: Pin<Box<Sleep>>,
    _permit: OwnedSemaphorePermit,
}

impl Scraper {
    fn in_time(&mut self, context: &mut Context<'_>) -> io::Result<()> {
        match self.deadline.as_mut().poll(context) {
            Poll::Ready(()) => Err(io::ErrorKind::TimedOut.into()),
            Poll::Pending => Ok(()),
        }
    }
}

impl AsyncRead for Scraper {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.in_time(context)?;
        Pin::new(&mut self.stream).poll_read(context, buf)
    }
}

impl AsyncWrite for Scraper {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        self.in_time(context)?;
        Pin::new(&mut self.stream).poll_write(context, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.in_time(context)?;
        Pin::new(&mut self.stream).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_cannot_break_out_of_their_quotes() {
        assert_eq!(escaped("a\"b\\c\nd"), "a\\\"b\\\\c\\nd");
    }

    #[test]
    fn buckets_are_cumulative() {
        let histogram = crate::histogram::Histogram::default();
        for millis in [1, 3, 100_000] {
            histogram.observe(Duration::from_millis(millis));
        }
        let mut text = Exposition::default();
        text.distribution("x_seconds", "a=\"b\"", &histogram.read());
        for line in [
            "x_seconds_bucket{a=\"b\",le=\"0.0005\"} 0\n",
            "x_seconds_bucket{a=\"b\",le=\"0.001\"} 1\n",
            "x_seconds_bucket{a=\"b\",le=\"60\"} 2\n",
            "x_seconds_bucket{a=\"b\",le=\"+Inf\"} 3\n",
            "x_seconds_sum{a=\"b\"} 100.004\n",
            "x_seconds_count{a=\"b\"} 3\n",
        ] {
            assert!(text.0.contains(line), "no {line} in\n{}", text.0);
        }
    }
}
