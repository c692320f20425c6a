//! Which blocks a power cut may have torn.
//!
//! Owns the numbering of epochs: spans of time between two background syncs. A slot names the epoch
//! its block was written in. Blocks of an epoch that a sync closed are durable; those of an epoch
//! that was open when the machine went down are *suspect*, and are checked before use. Blocks of
//! this boot are neither: the page cache outlives a crash of the agent.
//!
//! The record of open and suspect epochs is on the disk, twice, before the first block of an epoch
//! is written, so that it can never claim too little. With both copies damaged nothing is known of
//! any block, and the cache starts empty.

use std::{
    collections::BTreeSet,
    io,
    path::{Path, PathBuf},
    sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering},
};

use parking_lot::RwLock;

use super::{checksum::crc32c, disk, slot::Epoch};

/// The kernel's name for the time since it was started.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BootId(pub [u8; 16]);

impl BootId {
    /// A random one (nothing is trusted) where the kernel does not say.
    pub fn current() -> Self {
        let text = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap_or_default();
        let digits: Vec<u8> = text.bytes().filter(u8::is_ascii_hexdigit).collect();
        match u128::from_str_radix(std::str::from_utf8(&digits).unwrap_or_default(), 16) {
            Ok(id) if digits.len() == 32 => Self(id.to_be_bytes()),
            _ => Self(rand::random()),
        }
    }
}

#[derive(Clone, Debug, PartialEq, Eq)]
struct Record {
    sequence: u64,
    boot: BootId,
    /// Written to in this boot, no sync since.
    open: BTreeSet<u16>,
    /// Written to in an earlier boot, no sync since.
    suspect: BTreeSet<u16>,
}

const MAGIC: &[u8; 8] = b"GMepoch1";

impl Record {
    fn encode(&self) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(self.sequence.to_le_bytes());
        bytes.extend(self.boot.0);
        for set in [&self.open, &self.suspect] {
            bytes.extend((set.len() as u32).to_le_bytes());
            set.iter().for_each(|epoch| bytes.extend(epoch.to_le_bytes()));
        }
        let sum = crc32c(&bytes);
        bytes.extend(sum.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8]) -> Option<Self> {
        let (body, sum) = bytes.split_last_chunk::<4>()?;
        if crc32c(body) != u32::from_le_bytes(*sum) {
            return None;
        }
        let rest = body.strip_prefix(MAGIC)?;
        let (sequence, rest) = rest.split_first_chunk::<8>()?;
        let (boot, mut rest) = rest.split_first_chunk::<16>()?;
        let mut sets = [BTreeSet::new(), BTreeSet::new()];
        for set in &mut sets {
            let (count, after) = rest.split_first_chunk::<4>()?;
            let (epochs, after) = after.split_at_checked(u32::from_le_bytes(*count) as usize * 2)?;
            set.extend(
                epochs
                    .chunks_exact(2)
                    .map(|pair| u16::from_le_bytes([pair[0], pair[1]])),
            );
            rest = after;
        }
        let [open, suspect] = sets;
        Some(Self {
            sequence: u64::from_le_bytes(*sequence),
            boot: BootId(*boot),
            open,
            suspect,
        })
    }
}

/// What was found on the disk.
pub enum Found {
    Nothing,
    Sound,
    /// Both copies damaged: the caller must start with an empty cache.
    Damaged,
}

pub struct Epochs {
    paths: [PathBuf; 2],
    record: RwLock<Record>,
    current: AtomicU16,
    /// Writers under way, by the parity of the turn their epoch had.
    turn: AtomicU64,
    writing: [AtomicU64; 2],
    /// Whether anything was written since the last time that everything was made durable. Set too often at
    /// worst; missed only for what stays open, and is then checked after the next boot.
    written: AtomicBool,
}

/// While this lives its epoch is not closed.
pub struct Writing<'a> {
    count: &'a AtomicU64,
    pub epoch: Epoch,
}

impl Drop for Writing<'_> {
    fn drop(&mut self) {
        self.count.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Epochs {
    /// Of a cache that writes nothing.
    pub fn unrecorded(boot: BootId) -> Self {
        let record = Record {
            sequence: 0,
            boot,
            open: BTreeSet::new(),
            suspect: BTreeSet::new(),
        };
        Self::of([PathBuf::new(), PathBuf::new()], record)
    }

    fn of(paths: [PathBuf; 2], record: Record) -> Self {
        Self {
            paths,
            current: AtomicU16::new(record.open.last().copied().unwrap_or(0)),
            record: RwLock::new(record),
            turn: AtomicU64::new(0),
            writing: [AtomicU64::new(0), AtomicU64::new(0)],
            written: AtomicBool::new(false),
        }
    }

    pub fn open(dir: &Path, boot: BootId) -> io::Result<(Self, Found)> {
        let paths = [dir.join("epochs.a"), dir.join("epochs.b")];
        let mut found = Found::Nothing;
        let mut newest: Option<Record> = None;
        for path in &paths {
            match std::fs::read(path) {
                Ok(bytes) => match Record::decode(&bytes) {
                    Some(record)
                        if newest
                            .as_ref()
                            .is_none_or(|other| other.sequence < record.sequence) =>
                    {
                        newest = Some(record);
                    }
                    Some(_) => {}
                    None => found = Found::Damaged,
                },
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let mut record = match newest {
            Some(record) => {
                found = Found::Sound;
                record
            }
            None => Record {
                sequence: 0,
                boot,
                open: BTreeSet::new(),
                suspect: BTreeSet::new(),
            },
        };
        if record.boot != boot {
            let open = std::mem::take(&mut record.open);
            record.suspect.extend(open);
            record.boot = boot;
        }
        let epochs = Self::of(paths, record);
        if epochs.current.load(Ordering::SeqCst) == 0 {
            epochs.begin()?;
        }
        Ok((epochs, found))
    }

    /// Blocks of this epoch must be checked before use.
    pub fn suspect(&self, epoch: Epoch) -> bool {
        self.record.read().suspect.contains(&epoch.0)
    }

    /// Blocks of this epoch may not have reached the disk: after a power cut they would be checked.
    pub fn unsettled(&self, epoch: Epoch) -> bool {
        let record = self.record.read();
        record.open.contains(&epoch.0) || record.suspect.contains(&epoch.0)
    }

    /// Held while a block's slot is written, after its bytes were: what makes the epoch durable covers both.
    pub fn write(&self) -> Writing<'_> {
        // Looked at first: it is set already for all but the first block of an epoch.
        if !self.written.load(Ordering::SeqCst) {
            self.written.store(true, Ordering::SeqCst);
        }
        loop {
            let turn = self.turn.load(Ordering::SeqCst);
            let count = &self.writing[(turn & 1) as usize];
            count.fetch_add(1, Ordering::SeqCst);
            let writing = Writing {
                count,
                epoch: Epoch(self.current.load(Ordering::SeqCst)),
            };
            if self.turn.load(Ordering::SeqCst) == turn {
                return writing;
            }
        }
    }

    /// Begins a new epoch, makes durable what the ones before it wrote (`sync`), and closes them.
    /// `Ok(false)` when writers of the epoch before last are still at it: try again later.
    pub fn settle(&self, sync: impl FnOnce() -> io::Result<()>) -> io::Result<bool> {
        let turn = self.turn.load(Ordering::SeqCst);
        if self.writing[((turn + 1) & 1) as usize].load(Ordering::SeqCst) > 0 {
            return Ok(false);
        }
        let before: Vec<u16> = self.record.read().open.iter().copied().collect();
        // Nothing was written by anybody since the last time: nothing has to become durable. A sync can take
        // as long as everything else on that disk takes.
        if before.len() <= 1 && !self.written.swap(false, Ordering::SeqCst) {
            return Ok(true);
        }
        self.begin()?;
        self.turn.fetch_add(1, Ordering::SeqCst);
        let old = &self.writing[(turn & 1) as usize];
        // A writer holds its epoch for the write of a few slots: normally gone at the second look.
        let patience = std::time::Instant::now() + std::time::Duration::from_secs(5);
        while old.load(Ordering::SeqCst) > 0 {
            if std::time::Instant::now() > patience {
                return Ok(false);
            }
            std::thread::yield_now();
        }
        sync()?;
        let mut record = self.record.read().clone();
        before.iter().for_each(|epoch| {
            record.open.remove(epoch);
        });
        self.store(record)?;
        Ok(true)
    }

    fn begin(&self) -> io::Result<()> {
        let mut record = self.record.read().clone();
        let last = self.current.load(Ordering::SeqCst);
        // Numbers come round again: by then every block that bears one is durable, or the number is
        // among the open or suspect ones and is passed over.
        let next = (1..=u16::MAX)
            .map(|step| last.wrapping_add(step))
            .find(|epoch| *epoch != 0 && !record.open.contains(epoch) && !record.suspect.contains(epoch));
        // None left (after 65,000 power cuts without a sync): stay in the last one.
        let next = next.unwrap_or(last.max(1));
        record.open.insert(next);
        self.store(record)?;
        self.current.store(next, Ordering::SeqCst);
        Ok(())
    }

    fn store(&self, mut record: Record) -> io::Result<()> {
        record.sequence += 1;
        let bytes = record.encode();
        for path in &self.paths {
            disk::replace(path, &bytes)?;
        }
        *self.record.write() = record;
        Ok(())
    }
}
