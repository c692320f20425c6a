//! Long work made visible: a bar on a terminal, plain lines otherwise.

use std::{
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::{Duration, Instant},
};

use indicatif::{ProgressBar, ProgressDrawTarget, ProgressStyle};
use parking_lot::Mutex;

use super::output;
use crate::publish::{Phase, Progress};

/// Between plain lines: a log of an hour's upload stays readable.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// Progress of `publish` and `register`, on standard error.
pub struct Shown {
    bar: Option<ProgressBar>,
    phase: Mutex<&'static str>,
    files: AtomicU64,
    files_total: AtomicU64,
    bytes: AtomicU64,
    bytes_total: AtomicU64,
    started: Instant,
    last_line: Mutex<Instant>,
}

impl Shown {
    pub fn new() -> Self {
        let bar = output::stderr_is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let template = "{msg:9} [{bar:30}] {bytes}/{total_bytes} {prefix} {bytes_per_sec} ETA {eta}";
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.tick();
            bar
        });
        Self {
            bar,
            phase: Mutex::new(""),
            files: AtomicU64::new(0),
            files_total: AtomicU64::new(0),
            bytes: AtomicU64::new(0),
            bytes_total: AtomicU64::new(0),
            started: Instant::now(),
            last_line: Mutex::new(Instant::now()),
        }
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }

    fn tick(&self) {
        let (files, files_total) = (self.files.load(Relaxed), self.files_total.load(Relaxed));
        let (bytes, bytes_total) = (self.bytes.load(Relaxed), self.bytes_total.load(Relaxed));
        if let Some(bar) = &self.bar {
            bar.set_length(bytes_total);
            bar.set_position(bytes);
            bar.set_prefix(format!("{files}/{files_total} files"));
            return;
        }
        {
            let Some(mut last) = self.last_line.try_lock() else {
                return;
            };
            if last.elapsed() < LINE_EVERY {
                return;
            }
            *last = Instant::now();
        }
        let seconds = self.started.elapsed().as_secs_f64();
        let rate = bytes as f64 / seconds;
        let eta = if bytes == 0 {
            "?".into()
        } else {
            format!("{:.0} s", bytes_total.saturating_sub(bytes) as f64 / rate)
        };
        output::note(&format!(
            "{}: {files}/{files_total} files, {}/{}, {}/s, ETA {eta}",
            self.phase.lock(),
            output::bytes(bytes),
            output::bytes(bytes_total),
            output::bytes(rate as u64),
        ));
    }
}

/// One number that grows to a known end, on standard error.
pub struct Bar {
    bar: Option<ProgressBar>,
    doing: &'static str,
    bytes: bool,
    last_line: Mutex<Instant>,
}

impl Bar {
    /// `unit` is `bytes`, or what is counted.
    pub fn new(doing: &'static str, unit: &'static str) -> Self {
        let bytes = unit == "bytes";
        let bar = output::stderr_is_terminal().then(|| {
            let bar = ProgressBar::with_draw_target(Some(0), ProgressDrawTarget::stderr());
            let template = match bytes {
                true => "{msg} [{bar:30}] {bytes}/{total_bytes} {bytes_per_sec} ETA {eta}",
                false => "{msg} [{bar:30}] {pos}/{len} ETA {eta}",
            };
            if let Ok(style) = ProgressStyle::with_template(template) {
                bar.set_style(style.progress_chars("=> "));
            }
            bar.set_message(doing);
            // There from the start, however long the first step takes.
            bar.tick();
            bar
        });
        Self {
            bar,
            doing,
            bytes,
            last_line: Mutex::new(Instant::now()),
        }
    }

    pub fn at(&self, done: u64, total: u64) {
        if let Some(bar) = &self.bar {
            bar.set_length(total);
            bar.set_position(done);
            return;
        }
        {
            let Some(mut last) = self.last_line.try_lock() else {
                return;
            };
            if last.elapsed() < LINE_EVERY {
                return;
            }
            *last = Instant::now();
        }
        output::note(&match self.bytes {
            true => format!("{} {}/{}", self.doing, output::bytes(done), output::bytes(total)),
            false => format!("{} {done}/{total}", self.doing),
        });
    }

    pub fn finish(&self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}

impl Progress for Shown {
    fn phase(&self, phase: Phase) {
        let name = match phase {
            Phase::Discover => "listing",
            Phase::Upload => "uploading",
            Phase::Tree => "indexing",
            Phase::Record => "recording",
        };
        *self.phase.lock() = name;
        if let Some(bar) = &self.bar {
            bar.set_message(name);
        }
    }

    fn discovered(&self, files: u64, bytes: u64) {
        self.files_total.fetch_add(files, Relaxed);
        self.bytes_total.fetch_add(bytes, Relaxed);
        self.tick();
    }

    fn settled(&self, files: u64, bytes: u64) {
        self.files.fetch_add(files, Relaxed);
        self.bytes.fetch_add(bytes, Relaxed);
        self.tick();
    }
}
