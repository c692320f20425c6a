//! Spans for a collector, by OTLP over HTTP with JSON, where `OTEL_EXPORTER_OTLP_ENDPOINT` names one.
//!
//! A read that waits and the fetches it waits for are one trace; each request to the origin is an event in its
//! fetch. Nobody waits for the collector: what it does not take in time is dropped, and that is told of.

use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
        mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel},
    },
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use serde_json::{Value, json};
use tracing::{
    Event, Id, Level, Subscriber,
    field::{Field, Visit},
    span::{Attributes, Record},
};
use tracing_subscriber::{Layer, filter::Targets, layer::Context, registry::LookupSpan};

/// Spans that wait to be sent; further ones are dropped.
const MOST_WAITING: usize = 2048;
const MOST_AT_ONCE: usize = 256;
/// Of one span.
const MOST_EVENTS: usize = 64;
const SEND_EVERY: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(5);
const TELL_EVERY: Duration = Duration::from_secs(60);

/// `None` where nobody wants them.
pub fn layer<S>() -> Option<impl Layer<S> + Send + Sync>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    let url = std::env::var("OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
        .ok()
        .or_else(|| {
            let base = std::env::var("OTEL_EXPORTER_OTLP_ENDPOINT").ok()?;
            (!base.is_empty()).then(|| format!("{}/v1/traces", base.trim_end_matches('/')))
        })?;
    let (sender, waiting) = sync_channel(MOST_WAITING);
    let dropped = Arc::new(AtomicU64::new(0));
    let lost = Arc::clone(&dropped);
    let started = std::thread::Builder::new()
        .name("otlp".into())
        .spawn(move || send_all(&url, &waiting, &lost));
    started.ok()?;
    let wanted = Targets::new().with_target("grid_mount", Level::DEBUG);
    Some(Export { sender, dropped }.with_filter(wanted))
}

struct Export {
    sender: SyncSender<Value>,
    dropped: Arc<AtomicU64>,
}

/// A span as it will be sent.
struct Open {
    trace: u128,
    id: u64,
    parent: Option<u64>,
    start: SystemTime,
    fields: Fields,
    events: Vec<Value>,
}

#[derive(Default)]
struct Fields(Vec<Value>);

impl Fields {
    fn add(&mut self, name: &str, value: Value) {
        self.0.push(json!({ "key": name, "value": value }));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.add(field.name(), json!({ "stringValue": format!("{value:?}") }));
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.add(field.name(), json!({ "stringValue": value }));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        // 64-bit integers are texts in JSON.
        self.add(field.name(), json!({ "intValue": value.to_string() }));
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field.name(), json!({ "intValue": value.to_string() }));
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field.name(), json!({ "boolValue": value }));
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field.name(), json!({ "doubleValue": value }));
    }
}

fn nanos(at: SystemTime) -> String {
    let since = at.duration_since(UNIX_EPOCH).unwrap_or_default();
    since.as_nanos().to_string()
}

impl<S> Layer<S> for Export
where
    S: Subscriber + for<'span> LookupSpan<'span>,
{
    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let Some(span) = context.span(id) else { return };
        let above = span.parent().and_then(|parent| {
            let extensions = parent.extensions();
            let open = extensions.get::<Open>()?;
            Some((open.trace, open.id))
        });
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        span.extensions_mut().insert(Open {
            trace: above.map_or_else(rand::random, |(trace, _)| trace),
            id: rand::random(),
            parent: above.map(|(_, id)| id),
            start: SystemTime::now(),
            fields,
            events: Vec::new(),
        });
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(open) = span.extensions_mut().get_mut::<Open>()
        {
            values.record(&mut open.fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let Some(span) = context.event_span(event) else {
            return;
        };
        let mut extensions = span.extensions_mut();
        let Some(open) = extensions
            .get_mut::<Open>()
            .filter(|open| open.events.len() < MOST_EVENTS)
        else {
            return;
        };
        let mut fields = Fields::default();
        event.record(&mut fields);
        let is_message = |field: &&Value| field["key"] == "message";
        let name = fields.0.iter().find(is_message);
        let name = name.map_or(Value::Null, |field| field["value"]["stringValue"].clone());
        fields.0.retain(|field| !is_message(&field));
        open.events.push(json!({
            "timeUnixNano": nanos(SystemTime::now()), "name": name, "attributes": fields.0,
        }));
    }

    fn on_close(&self, id: Id, context: Context<'_, S>) {
        let Some(span) = context.span(&id) else { return };
        let Some(open) = span.extensions_mut().remove::<Open>() else {
            return;
        };
        let mut value = json!({
            "traceId": format!("{:032x}", open.trace),
            "spanId": format!("{:016x}", open.id),
            "name": span.name(),
            "kind": 1,
            "startTimeUnixNano": nanos(open.start),
            "endTimeUnixNano": nanos(SystemTime::now()),
            "attributes": open.fields.0,
            "events": open.events,
        });
        if let Some(parent) = open.parent {
            value["parentSpanId"] = format!("{parent:016x}").into();
        }
        if self.sender.try_send(value).is_err() {
            self.dropped.fetch_add(1, Relaxed);
        }
    }
}

/// Until nobody makes spans any more.
fn send_all(url: &str, waiting: &Receiver<Value>, dropped: &AtomicU64) {
    // One may be installed already.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let client = reqwest::Client::builder().timeout(PATIENCE).build();
    let (Ok(runtime), Ok(client)) = (runtime, client) else {
        tracing::warn!("spans are not exported: there is no HTTP client");
        return;
    };
    let mut told: Option<Instant> = None;
    loop {
        let mut spans = match waiting.recv() {
            Ok(span) => vec![span],
            Err(_) => return,
        };
        let until = Instant::now() + SEND_EVERY;
        while spans.len() < MOST_AT_ONCE {
            match waiting.recv_timeout(until.saturating_duration_since(Instant::now())) {
                Ok(span) => spans.push(span),
                Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => break,
            }
        }
        let count = spans.len() as u64;
        let request = client
            .post(url)
            .header(reqwest::header::CONTENT_TYPE, "application/json")
            .body(export(spans).to_string());
        let sent = runtime.block_on(async { request.send().await?.error_for_status() });
        if let Err(error) = sent {
            dropped.fetch_add(count, Relaxed);
            if told.is_none_or(|told| told.elapsed() > TELL_EVERY) {
                told = Some(Instant::now());
                let dropped = dropped.swap(0, Relaxed);
                let error = crate::causes::in_one_line(&error.without_url());
                tracing::warn!(url, error, dropped, "spans are not taken by the collector");
            }
        }
    }
}

/// One request's body.
fn export(spans: Vec<Value>) -> Value {
    let text = |key: &str, value: &str| json!({ "key": key, "value": { "stringValue": value } });
    let host = nix::unistd::gethostname().unwrap_or_default();
    json!({ "resourceSpans": [{
        "resource": { "attributes": [
            text("service.name", "grid-mount"),
            text("service.version", env!("CARGO_PKG_VERSION")),
            text("host.name", &host.to_string_lossy()),
        ] },
        "scopeSpans": [{ "scope": { "name": "grid-mount" }, "spans": spans }],
    }] })
}
