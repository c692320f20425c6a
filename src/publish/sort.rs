//! Sorts what a listing gave by path, part by part, in bounded memory.
//!
//! Part by part means that `a` is followed by all of `a/…`, which plain byte order does not give
//! (`a-b` comes between them): only so can a merge see that a name is an object and a directory.

use std::{
    cmp::{Ordering, Reverse},
    collections::BinaryHeap,
    fs::File,
    io::{self, BufRead, BufReader, BufWriter, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};

use crate::origin::Pin;

/// Part by part: a slash comes before every other byte (keys with NUL are no paths).
pub(super) fn part_order(a: &str, b: &str) -> Ordering {
    let slash_first = |byte| if byte == b'/' { 0 } else { byte };
    a.bytes().map(slash_first).cmp(b.bytes().map(slash_first))
}

/// What an entry takes up in memory besides its texts, about.
const OVERHEAD: usize = 120;

/// A listed key that can be a path.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Listed {
    pub path: String,
    pub modified: (i64, u32),
    /// `None` for a directory marker.
    pub file: Option<ListedFile>,
}

#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct ListedFile {
    pub size: u64,
    pub pin: Pin,
}

impl Listed {
    /// Part by part; a file before a directory of the same name.
    fn order(&self, other: &Self) -> Ordering {
        part_order(&self.path, &other.path).then(self.file.is_none().cmp(&other.file.is_none()))
    }

    fn weight(&self) -> usize {
        let pin = match &self.file {
            Some(ListedFile {
                pin: Pin::ETag(text) | Pin::VersionId(text),
                ..
            }) => text.len(),
            _ => 0,
        };
        OVERHEAD + self.path.len() + pin
    }
}

pub(super) struct Sorter {
    scratch: PathBuf,
    limit: usize,
    weight: usize,
    entries: Vec<Listed>,
    runs: Vec<File>,
}

impl Sorter {
    pub fn new(scratch: &Path, memory_limit: usize) -> Self {
        Self {
            scratch: scratch.to_owned(),
            limit: memory_limit,
            weight: 0,
            entries: Vec::new(),
            runs: Vec::new(),
        }
    }

    pub fn push(&mut self, entry: Listed) -> io::Result<()> {
        self.weight += entry.weight();
        self.entries.push(entry);
        if self.weight >= self.limit {
            self.spill()?;
        }
        Ok(())
    }

    fn spill(&mut self) -> io::Result<()> {
        self.entries.sort_unstable_by(Listed::order);
        let mut file = BufWriter::with_capacity(256 << 10, tempfile::tempfile_in(&self.scratch)?);
        for entry in self.entries.drain(..) {
            serde_json::to_writer(&mut file, &entry)?;
            file.write_all(b"\n")?;
        }
        let mut file = file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        self.runs.push(file);
        self.weight = 0;
        Ok(())
    }

    pub fn finish(mut self) -> io::Result<Sorted> {
        self.entries.sort_unstable_by(Listed::order);
        let mut runs: Vec<Run> = std::mem::take(&mut self.runs)
            .into_iter()
            .map(|file| Run::Spilled(BufReader::with_capacity(64 << 10, file)))
            .collect();
        runs.push(Run::Memory(std::mem::take(&mut self.entries).into_iter()));
        let mut heads = BinaryHeap::with_capacity(runs.len());
        for (number, run) in runs.iter_mut().enumerate() {
            if let Some(entry) = run.next()? {
                heads.push(Reverse(Head { entry, run: number }));
            }
        }
        Ok(Sorted { runs, heads })
    }
}

enum Run {
    Spilled(BufReader<File>),
    Memory(std::vec::IntoIter<Listed>),
}

impl Run {
    fn next(&mut self) -> io::Result<Option<Listed>> {
        match self {
            Self::Memory(entries) => Ok(entries.next()),
            Self::Spilled(file) => {
                let mut line = Vec::new();
                if file.read_until(b'\n', &mut line)? == 0 {
                    return Ok(None);
                }
                Ok(Some(serde_json::from_slice(&line)?))
            }
        }
    }
}

struct Head {
    entry: Listed,
    run: usize,
}

impl Ord for Head {
    fn cmp(&self, other: &Self) -> Ordering {
        self.entry.order(&other.entry).then(self.run.cmp(&other.run))
    }
}

impl PartialOrd for Head {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl PartialEq for Head {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other) == Ordering::Equal
    }
}

impl Eq for Head {}

/// All entries, in order.
pub(super) struct Sorted {
    runs: Vec<Run>,
    heads: BinaryHeap<Reverse<Head>>,
}

impl Sorted {
    pub fn next(&mut self) -> io::Result<Option<Listed>> {
        let Some(Reverse(Head { entry, run })) = self.heads.pop() else {
            return Ok(None);
        };
        if let Some(following) = self.runs.get_mut(run).map(Run::next).transpose()?.flatten() {
            self.heads.push(Reverse(Head {
                entry: following,
                run,
            }));
        }
        Ok(Some(entry))
    }

    /// What `next` will give.
    pub fn peek(&self) -> Option<&Listed> {
        self.heads.peek().map(|Reverse(head)| &head.entry)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn entry(path: String, directory: bool) -> Listed {
        let file = (!directory).then(|| ListedFile {
            size: 1,
            pin: Pin::ETag("e".to_owned()),
        });
        Listed {
            path,
            modified: (1, 2),
            file,
        }
    }

    proptest! {
        #[test]
        fn sorted_part_by_part_however_much_is_spilled(
            entries in proptest::collection::vec(("[ab/.é-]{1,6}", any::<bool>()), 0..60),
            limit in 1usize..4000,
        ) {
            let scratch = tempfile::tempdir().unwrap();
            let mut sorter = Sorter::new(scratch.path(), limit);
            let mut expected: Vec<_> = entries.into_iter().map(|(path, dir)| entry(path, dir)).collect();
            for entry in &expected {
                sorter.push(entry.clone()).unwrap();
            }
            // An independent order: vectors of parts.
            expected.sort_by_key(|entry| {
                (entry.path.split('/').map(str::to_owned).collect::<Vec<_>>(), entry.file.is_none())
            });
            let mut sorted = sorter.finish().unwrap();
            for expected in expected {
                prop_assert_eq!(sorted.peek(), Some(&expected));
                prop_assert_eq!(sorted.next().unwrap(), Some(expected));
            }
            prop_assert_eq!(sorted.next().unwrap(), None);
        }
    }
}
