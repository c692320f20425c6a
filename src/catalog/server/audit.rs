//! Who asked for what, and what they were told: one line of JSON each.
//!
//! A request waits until its line is taken, so a disk that is slow slows requests down rather than losing
//! lines or piling them up; a disk that fails is said in the log.

use std::{
    fs::{File, OpenOptions},
    io::{self, Write},
    os::unix::fs::OpenOptionsExt,
    path::Path,
};

use jiff::Timestamp;
use serde::Serialize;
use tokio::sync::mpsc;

/// Lines on their way to the file.
const WAITING: usize = 256;

#[derive(Debug, Serialize)]
pub struct Line {
    pub at: Timestamp,
    /// Absent where the token was not good.
    pub user: Option<String>,
    pub method: String,
    pub path: String,
    pub status: u16,
    pub milliseconds: u64,
}

/// A file, or the program's log.
pub struct Audit {
    file: Option<mpsc::Sender<Vec<u8>>>,
}

impl Audit {
    pub fn in_log() -> Self {
        Self { file: None }
    }

    /// Appends to `path`, readable by its owner only.
    pub fn in_file(path: &Path) -> io::Result<Self> {
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .mode(0o600)
            .open(path)?;
        let (sender, receiver) = mpsc::channel(WAITING);
        std::thread::Builder::new()
            .name("audit".into())
            .spawn(move || write(file, receiver))?;
        Ok(Self { file: Some(sender) })
    }

    pub async fn note(&self, line: Line) {
        let Some(file) = &self.file else {
            tracing::info!(target: "audit", user = line.user, method = line.method, path = line.path,
                status = line.status, milliseconds = line.milliseconds);
            return;
        };
        let Ok(mut bytes) = serde_json::to_vec(&line) else {
            return;
        };
        bytes.push(b'\n');
        if file.send(bytes).await.is_err() {
            tracing::error!("the audit log is closed");
        }
    }
}

fn write(mut file: File, mut lines: mpsc::Receiver<Vec<u8>>) {
    while let Some(line) = lines.blocking_recv() {
        if let Err(error) = file.write_all(&line) {
            tracing::error!(%error, "a line of the audit log is lost");
        }
    }
}
