//! When to fetch what nobody asked for yet: a small file's neighbours, or the whole version.
//!
//! Owns the policy (`--prefetch`) and the judgement whether a mount is being read widely. Must not know how
//! anything is fetched: [`super::fetched`] does what is decided here.

use std::{
    collections::{HashSet, VecDeque},
    ops::Range,
    time::{Duration, Instant},
};

use crate::tree::{Ino, ObjectNo};

/// Files read for the first time lately, of which so many make neighbours worth having…
const SEVERAL: usize = 4;
/// … and so many the whole version.
const WIDE: usize = 32;
const LATELY: Duration = Duration::from_secs(60);

/// Which files were read lately.
#[derive(Debug, Default)]
pub(super) struct Breadth {
    order: VecDeque<(Instant, Ino)>,
    known: HashSet<Ino>,
}

/// How widely a mount is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Width {
    Narrow,
    Several,
    Wide,
}

impl Breadth {
    /// A file is read now. `None`: it was read lately, which says nothing new.
    pub fn read(&mut self, ino: Ino, now: Instant) -> Option<Width> {
        if !self.known.insert(ino) {
            return None;
        }
        self.order.push_back((now, ino));
        while let Some((at, first)) = self.order.front().copied() {
            if self.order.len() <= WIDE && now.saturating_duration_since(at) <= LATELY {
                break;
            }
            self.order.pop_front();
            self.known.remove(&first);
        }
        Some(match self.order.len() {
            ..SEVERAL => Width::Narrow,
            SEVERAL..WIDE => Width::Several,
            _ => Width::Wide,
        })
    }
}

/// Joins neighbouring ranges of one object, of files in tree order, so that bundles are fetched in large
/// pieces; each piece is up to `most` bytes and `gap` bytes between files come along.
pub(super) fn joined(
    files: impl Iterator<Item = (ObjectNo, Range<u64>)>,
    gap: u64,
    most: u64,
) -> impl Iterator<Item = (ObjectNo, Range<u64>)> {
    let mut files = files.peekable();
    std::iter::from_fn(move || {
        let (object, mut range) = files.next()?;
        while let Some((_, next)) = files.next_if(|(other, next)| {
            *other == object
                && next.start >= range.start
                && next.start <= range.end.saturating_add(gap)
                && next.end.saturating_sub(range.start) <= most
        }) {
            range.end = range.end.max(next.end);
        }
        Some((object, range))
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn only_many_different_files_lately_are_wide() {
        let now = Instant::now();
        let mut breadth = Breadth::default();
        assert_eq!(breadth.read(Ino(1), now), Some(Width::Narrow));
        assert_eq!(breadth.read(Ino(1), now), None);
        let widths: Vec<_> = (2..=40).filter_map(|n| breadth.read(Ino(n), now)).collect();
        assert!(widths.is_sorted() && widths.contains(&Width::Several));
        assert_eq!(widths.last(), Some(&Width::Wide));
        assert!(breadth.known.len() <= WIDE && breadth.order.len() <= WIDE);
        let later = now + LATELY + Duration::from_secs(1);
        assert_eq!(breadth.read(Ino(100), later), Some(Width::Narrow));
    }

    proptest! {
        #[test]
        fn joining_loses_no_byte(files in prop::collection::vec((0u32..3, 0u64..1000, 1u64..200), 0..50)) {
            let files: Vec<_> = files.into_iter().map(|(o, start, len)| (ObjectNo(o), start..start + len)).collect();
            let pieces: Vec<_> = joined(files.iter().cloned(), 10, 300).collect();
            for (object, file) in &files {
                prop_assert!(pieces.iter().any(|(o, p)| o == object && p.start <= file.start && p.end >= file.end));
            }
            prop_assert!(pieces.iter().all(|(_, piece)| piece.end - piece.start <= 300));
        }
    }
}
