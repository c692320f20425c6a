//! External sort: records in any order in, records in key order out, in bounded memory.
//!
//! Records fill an arena; a full arena is sorted and spilled as a run; runs are merged a bounded number
//! at a time. Equal keys come out next to one another, in no particular order. Knows nothing of trees.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Write},
    path::{Path, PathBuf},
};

use crate::tree::TreeError;

/// Runs merged at once: more would cost descriptors and make the read buffers small.
const MAX_FAN_IN: usize = 64;
const MIN_BUFFER: usize = 4 << 10;
const MAX_BUFFER: usize = 1 << 20;
/// Arena offsets are `u32`: half the index of a pointer each.
const MAX_ARENA: usize = u32::MAX as usize;
/// Index entry and sort scratch of one record.
const RECORD_OVERHEAD: usize = 8;

pub(super) struct Sorter {
    dir: PathBuf,
    memory_limit: usize,
    arena: Vec<u8>,
    /// Where each record starts in the arena.
    index: Vec<u32>,
    runs: Vec<PathBuf>,
    runs_made: u64,
}

/// A record's key and tail.
type Record<'record> = (&'record [u8], &'record [u8]);

/// In the arena and in runs: key length (u16), tail length (u16), key, tail.
const LENGTHS: usize = 4;

fn parts(bytes: &[u8]) -> Option<Record<'_>> {
    let (lengths, rest) = bytes.split_first_chunk::<LENGTHS>()?;
    let [k0, k1, t0, t1] = *lengths;
    let (key, rest) = rest.split_at_checked(u16::from_le_bytes([k0, k1]).into())?;
    Some((key, rest.get(..u16::from_le_bytes([t0, t1]).into())?))
}

/// The record at `start` of an arena that `push` filled: never `None` there.
fn record_at(arena: &[u8], start: u32) -> Record<'_> {
    arena.get(start as usize..).and_then(parts).unwrap_or_default()
}

impl Sorter {
    pub fn new(dir: &Path, memory_limit: usize) -> Self {
        Self {
            dir: dir.to_owned(),
            memory_limit: memory_limit.min(MAX_ARENA),
            arena: Vec::new(),
            index: Vec::new(),
            runs: Vec::new(),
            runs_made: 0,
        }
    }

    /// Adds a record; its tail is the concatenation of `tail`. Keys and tails fit a `u16`: the caller
    /// has checked.
    pub fn push(&mut self, key: &[u8], tail: &[&[u8]]) -> Result<(), TreeError> {
        let tail_len: usize = tail.iter().map(|part| part.len()).sum();
        let too_long = || TreeError::TooMany {
            what: "bytes in one path or target",
            limit: u16::MAX.into(),
        };
        let key_len = u16::try_from(key.len()).map_err(|_| too_long())?;
        let tail_len = u16::try_from(tail_len).map_err(|_| too_long())?;
        let len = LENGTHS + key.len() + usize::from(tail_len);
        let used = self.arena.len() + self.index.len() * RECORD_OVERHEAD;
        if used + len + RECORD_OVERHEAD > self.memory_limit && !self.index.is_empty() {
            self.spill()?;
        }
        if self.arena.capacity() == 0 {
            // Asked for once, so that growing never copies: untouched pages cost nothing.
            self.arena.reserve_exact(self.memory_limit);
        }
        self.index.push(self.arena.len() as u32);
        self.arena.extend_from_slice(&key_len.to_le_bytes());
        self.arena.extend_from_slice(&tail_len.to_le_bytes());
        self.arena.extend_from_slice(key);
        tail.iter().for_each(|part| self.arena.extend_from_slice(part));
        Ok(())
    }

    pub fn is_empty(&self) -> bool {
        self.index.is_empty() && self.runs.is_empty()
    }

    fn sort(&mut self) {
        let arena = &self.arena;
        // Stable, because it recognises input that is in order, as a walk's or a listing's nearly is.
        self.index
            .sort_by(|a, b| record_at(arena, *a).0.cmp(record_at(arena, *b).0));
    }

    fn new_run(&mut self) -> Result<(PathBuf, BufWriter<File>), TreeError> {
        let path = self.dir.join(format!("run-{}", self.runs_made));
        self.runs_made += 1;
        let file = File::create_new(&path).map_err(|source| TreeError::Io {
            path: path.clone(),
            source,
        })?;
        Ok((
            path,
            BufWriter::with_capacity(buffer_size(self.memory_limit), file),
        ))
    }

    fn spill(&mut self) -> Result<(), TreeError> {
        self.sort();
        let (path, mut run) = self.new_run()?;
        let io = |source| TreeError::Io {
            path: path.clone(),
            source,
        };
        for start in &self.index {
            let (key, tail) = record_at(&self.arena, *start);
            write_record(&mut run, key, tail).map_err(io)?;
        }
        run.flush().map_err(io)?;
        self.index.clear();
        self.arena.clear();
        self.runs.push(path);
        Ok(())
    }

    /// All records in key order.
    pub fn finish(mut self) -> Result<Sorted, TreeError> {
        if self.runs.is_empty() {
            self.sort();
            return Ok(Sorted::Memory {
                arena: self.arena,
                index: self.index.into_iter(),
            });
        }
        if !self.index.is_empty() {
            self.spill()?;
        }
        (self.arena, self.index) = (Vec::new(), Vec::new());
        let buffer = buffer_size(self.memory_limit);
        let fan_in = (self.memory_limit / buffer).clamp(2, MAX_FAN_IN);
        while self.runs.len() > fan_in {
            // The oldest runs first, so that every record is copied about as often as any other.
            let batch: Vec<PathBuf> = self.runs.drain(..fan_in).collect();
            let mut merge = Merge::open(batch, buffer)?;
            let (path, mut run) = self.new_run()?;
            let io = |source| TreeError::Io {
                path: path.clone(),
                source,
            };
            while let Some((key, tail)) = merge.next()? {
                write_record(&mut run, key, tail).map_err(io)?;
            }
            run.flush().map_err(io)?;
            self.runs.push(path);
        }
        Ok(Sorted::Merge(Merge::open(self.runs, buffer)?))
    }
}

fn buffer_size(memory_limit: usize) -> usize {
    (memory_limit / MAX_FAN_IN).clamp(MIN_BUFFER, MAX_BUFFER)
}

fn write_record(run: &mut impl Write, key: &[u8], tail: &[u8]) -> io::Result<()> {
    // Both lengths came out of a `u16`.
    run.write_all(&(key.len() as u16).to_le_bytes())?;
    run.write_all(&(tail.len() as u16).to_le_bytes())?;
    run.write_all(key)?;
    run.write_all(tail)
}

pub(super) enum Sorted {
    Memory {
        arena: Vec<u8>,
        index: std::vec::IntoIter<u32>,
    },
    Merge(Merge),
}

impl Sorted {
    /// The next record's key and tail.
    pub fn next(&mut self) -> Result<Option<Record<'_>>, TreeError> {
        match self {
            Self::Memory { arena, index } => Ok(index.next().map(|start| record_at(arena, start))),
            Self::Merge(merge) => merge.next(),
        }
    }
}

/// One run being read: its current record, whole.
struct Run {
    path: PathBuf,
    file: BufReader<File>,
    record: Vec<u8>,
}

impl Run {
    fn key(&self) -> &[u8] {
        parts(&self.record).unwrap_or_default().0
    }

    /// Reads the next record; `false` at the end of the run.
    fn advance(&mut self) -> Result<bool, TreeError> {
        self.try_advance().map_err(|source| TreeError::Io {
            path: self.path.clone(),
            source,
        })
    }

    fn try_advance(&mut self) -> io::Result<bool> {
        let mut lengths = [0; LENGTHS];
        let mut filled = 0;
        while let Some(space) = lengths.get_mut(filled..).filter(|space| !space.is_empty()) {
            match self.file.read(space) {
                Ok(0) if filled == 0 => return Ok(false),
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        let [k0, k1, t0, t1] = lengths;
        let len = usize::from(u16::from_le_bytes([k0, k1])) + usize::from(u16::from_le_bytes([t0, t1]));
        self.record.clear();
        self.record.extend_from_slice(&lengths);
        self.record.resize(LENGTHS + len, 0);
        self.file
            .read_exact(self.record.get_mut(LENGTHS..).unwrap_or_default())?;
        Ok(true)
    }
}

impl Drop for Run {
    fn drop(&mut self) {
        // Its space is wanted back before the merge's own output is complete. The whole directory goes
        // at the end anyway, so a failure costs nothing but space.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// A k-way merge: a binary heap of runs, the smallest key on top.
pub(super) struct Merge {
    heap: Vec<Run>,
    /// Whether the top's record has been handed out.
    given: bool,
}

impl Merge {
    fn open(runs: Vec<PathBuf>, buffer: usize) -> Result<Self, TreeError> {
        let mut heap = Vec::with_capacity(runs.len());
        for path in runs {
            let file = File::open(&path).map_err(|source| TreeError::Io {
                path: path.clone(),
                source,
            })?;
            let mut run = Run {
                path,
                file: BufReader::with_capacity(buffer, file),
                record: Vec::new(),
            };
            if run.advance()? {
                heap.push(run);
            }
        }
        // A sorted list is a heap.
        heap.sort_by(|a, b| a.key().cmp(b.key()));
        Ok(Self { heap, given: false })
    }

    fn next(&mut self) -> Result<Option<Record<'_>>, TreeError> {
        if self.given {
            if let Some(top) = self.heap.first_mut()
                && !top.advance()?
            {
                self.heap.swap_remove(0);
            }
            self.sink_top();
        }
        self.given = true;
        Ok(self.heap.first().and_then(|top| parts(&top.record)))
    }

    fn sink_top(&mut self) {
        let mut at = 0;
        loop {
            let mut smallest = at;
            for child in [2 * at + 1, 2 * at + 2] {
                if let (Some(below), Some(best)) = (self.heap.get(child), self.heap.get(smallest))
                    && below.key() < best.key()
                {
                    smallest = child;
                }
            }
            if smallest == at {
                return;
            }
            self.heap.swap(at, smallest);
            at = smallest;
        }
    }
}
