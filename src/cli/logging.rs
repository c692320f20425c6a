//! Where the log goes and in what form: text or one JSON object a line, on standard error.
//!
//! Where that is the journal (`JOURNAL_STREAM` names it), each line begins with its priority as
//! sd-daemon(3) has it, `<3>` to `<7>`, so that `journalctl -p warning` finds what it should; the time is
//! the journal's own.

mod otlp;

use std::{fmt, io, os::unix::fs::MetadataExt};

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::{
    EnvFilter, Layer, Registry,
    fmt::{FmtContext, FormatEvent, FormatFields, MakeWriter, format::Writer},
    layer::SubscriberExt,
    registry::LookupSpan,
    reload,
    util::SubscriberInitExt,
};

use super::output;
use crate::{
    agent::UNHEARD,
    config::{LogFormat, LogLevel},
};

/// Changes what is logged.
pub type SetLevel = Box<dyn Fn(LogLevel) + Send + Sync>;

/// To standard error, which is the log file of an agent started on demand, and the journal of a service.
/// `GRID_MOUNT_LOG` filters finer than a level (`info`, `grid_mount=debug`), and then stays.
pub fn start(format: LogFormat, level: LogLevel) -> SetLevel {
    start_with(format, level, None::<tracing_subscriber::layer::Identity>)
}

/// As [`start`]; spans go to a collector, too, where one is named. Starts a thread for that.
pub fn start_exporting(format: LogFormat, level: LogLevel) -> SetLevel {
    start_with(format, level, otlp::layer())
}

fn start_with(
    format: LogFormat,
    level: LogLevel,
    spans: Option<impl Layer<Registry> + Send + Sync>,
) -> SetLevel {
    let named = std::env::var("GRID_MOUNT_LOG").ok();
    let named = named.filter(|named| !named.trim().is_empty());
    let named = named.and_then(|named| EnvFilter::try_new(format!("{named},{UNHEARD}=off")).ok());
    let is_named = named.is_some();
    let of = |level: LogLevel| EnvFilter::new(format!("{level},{UNHEARD}=off"));
    let (filter, handle) = reload::Layer::new(named.unwrap_or_else(|| of(level)));
    let journal = std::env::var("JOURNAL_STREAM").is_ok_and(|stream| is_stderr(&stream));
    let coloured = !journal && output::stderr_is_terminal() && std::env::var_os("NO_COLOR").is_none();
    let lines = lines(format, journal, coloured, io::stderr).with_filter(filter);
    // One that is there already stays.
    let _ = tracing_subscriber::registry().with(spans).with(lines).try_init();
    Box::new(move |level| {
        if !is_named {
            let _ = handle.reload(of(level));
        }
    })
}

fn lines<S, W>(
    format: LogFormat,
    journal: bool,
    coloured: bool,
    writer: W,
) -> Box<dyn Layer<S> + Send + Sync + 'static>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    W: for<'writer> MakeWriter<'writer> + Send + Sync + 'static,
{
    let lines = tracing_subscriber::fmt::layer()
        .with_writer(writer)
        .with_ansi(coloured);
    match (format, journal) {
        (LogFormat::Text, false) => lines.boxed(),
        (LogFormat::Text, true) => lines.without_time().map_event_format(Prioritized).boxed(),
        (LogFormat::Json, false) => lines.json().flatten_event(true).boxed(),
        (LogFormat::Json, true) => {
            let lines = lines.json().flatten_event(true);
            lines.map_event_format(Prioritized).boxed()
        }
    }
}

/// Whether `stream`, `DEVICE:INODE`, is what standard error is: whoever inherits the variable may have
/// sent it elsewhere.
fn is_stderr(stream: &str) -> bool {
    let Ok(file) = std::fs::metadata("/proc/self/fd/2") else {
        return false;
    };
    stream == format!("{}:{}", file.dev(), file.ino())
}

/// Lines as another format has them, each after its priority.
struct Prioritized<F>(F);

impl<S, N, F> FormatEvent<S, N> for Prioritized<F>
where
    S: Subscriber + for<'span> LookupSpan<'span>,
    N: for<'writer> FormatFields<'writer> + 'static,
    F: FormatEvent<S, N>,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        write!(writer, "<{}>", priority(*event.metadata().level()))?;
        self.0.format_event(context, writer, event)
    }
}

/// As syslog counts: 3 is an error, 7 is for debugging.
fn priority(level: Level) -> u8 {
    match level {
        Level::ERROR => 3,
        Level::WARN => 4,
        Level::INFO => 6,
        Level::DEBUG | Level::TRACE => 7,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    fn logged(format: LogFormat, journal: bool) -> Vec<String> {
        let written = Lines::default();
        let writer = written.clone();
        let layer = lines(format, journal, false, move || writer.clone());
        tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), || {
            tracing::error!(key = "a/b", "gone");
            tracing::warn!("late");
            tracing::info!("mounted");
            tracing::debug!("asked");
        });
        let bytes = written.0.lock().clone();
        String::from_utf8(bytes)
            .unwrap()
            .lines()
            .map(str::to_owned)
            .collect()
    }

    #[test]
    fn the_journal_is_told_how_bad_it_is() {
        for format in [LogFormat::Text, LogFormat::Json] {
            let lines = logged(format, true);
            let priorities: Vec<&str> = lines.iter().map(|line| &line[..3]).collect();
            assert_eq!(priorities, ["<3>", "<4>", "<6>", "<7>"], "{lines:?}");
            assert!(lines[0].contains("gone") && lines[0].contains("a/b"), "{lines:?}");
            for line in logged(format, false) {
                assert!(!line.starts_with('<'), "{line}");
            }
        }
    }

    #[test]
    fn json_is_an_object_a_line() {
        for line in logged(LogFormat::Json, false) {
            let line: serde_json::Value = serde_json::from_str(&line).unwrap();
            assert!(
                line["timestamp"].is_string() && line["message"].is_string(),
                "{line}"
            );
        }
        let error = &logged(LogFormat::Json, true)[0];
        let error: serde_json::Value = serde_json::from_str(error.strip_prefix("<3>").unwrap()).unwrap();
        assert_eq!((&error["key"], &error["level"]), (&"a/b".into(), &"ERROR".into()));
    }

    #[test]
    fn another_stream_is_not_the_journal() {
        let file = std::fs::metadata("/proc/self/fd/2").unwrap();
        assert!(is_stderr(&format!("{}:{}", file.dev(), file.ino())));
        assert!(!is_stderr(&format!("{}:{}", file.dev(), file.ino() + 1)) && !is_stderr(""));
    }
}
