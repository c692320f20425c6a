//! Whether a listing brings the attributes of its files along.
//!
//! With them, each entry costs the kernel an inode, whether anybody wants it or not; without them, each file
//! whose attributes are wanted costs a request, which is ten times that. The kernel's own guess
//! (`READDIRPLUS_AUTO`) is made page by page, from what was asked of the pages before; but `find -ls` and
//! `os.walk` read a directory to its end before they ask for the first attribute, and a plain `find` begins
//! each directory with a page it wants none of. Here the guess is made from one directory to the next: listings
//! begin without, and once the files of a directory just listed are asked for one after another, those that
//! follow bring them along, until there has been no listing for a while.
//!
//! Only files are meant. Directories always come with their attributes: whoever lists a tree goes down into them,
//! and needs them for that; so their being looked up says nothing.

use std::{
    sync::atomic::{AtomicBool, Ordering::Relaxed},
    time::{Duration, Instant},
};

use parking_lot::Mutex;

use crate::tree::Ino;

/// So many files, one after another, are no coincidence: asked for by themselves, they cost what the inodes
/// of a directory of two hundred do.
const ASKED: u32 = 16;
/// Files without attributes on the first page of a directory: `ls -l` asks for those of each page before it wants
/// the next, which then has them. A page more costs the others one request.
pub(super) const FIRST_PAGE: u32 = 2 * ASKED;
/// Inodes are numbered in the order of a listing. What is asked for this near to the file before it, is asked for
/// by somebody who goes through the listing, perhaps with several threads; a reader in random order jumps.
const NEAR: u64 = 32;
/// Directories listed without attributes that are remembered: what several walks at once look at.
const REMEMBERED: usize = 16;
/// A listing after so long without one is another program's.
const QUIET: Duration = Duration::from_secs(2);

/// For one mount. What `now` is, the caller says; it never goes back.
#[derive(Debug, Default)]
pub(super) struct Listings {
    /// As in the state, to be seen without the lock by every lookup.
    wanted: AtomicBool,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last_listing: Option<Instant>,
    bare: [Bare; REMEMBERED],
    /// The place of the next directory in `bare`.
    next: usize,
    /// Files of directories that were gone through to their end: small ones only count together.
    gone_through: u32,
}

/// A directory that was just listed without attributes.
#[derive(Clone, Copy, Debug, Default)]
struct Bare {
    /// 0: none.
    dir: u64,
    /// Files listed.
    files: u32,
    /// The file asked for last, and how many in a row were near one another.
    last: u64,
    row: u32,
}

impl Listings {
    /// Whether the page of a listing that is about to be answered is to have the attributes of files.
    pub(super) fn with_attributes(&self, now: Instant) -> bool {
        let mut state = self.state.lock();
        let before = state.last_listing.replace(now);
        if before.is_some_and(|before| now.saturating_duration_since(before) >= QUIET) {
            *state = State {
                last_listing: state.last_listing,
                ..State::default()
            };
            self.wanted.store(false, Relaxed);
        }
        self.wanted.load(Relaxed)
    }

    /// A page of `dir` was answered, of which `files` came without attributes. `begins` at its first page.
    pub(super) fn listed_without(&self, dir: Ino, begins: bool, files: u32) {
        if files == 0 {
            return;
        }
        let mut state = self.state.lock();
        let State { bare, next, .. } = &mut *state;
        match bare.iter_mut().find(|bare| bare.dir == dir.0) {
            Some(known) if !begins => known.files = known.files.saturating_add(files),
            known => {
                let slot = match known {
                    Some(known) => known,
                    None => {
                        let slot = *next;
                        *next = (slot + 1) % REMEMBERED;
                        &mut bare[slot]
                    }
                };
                *slot = Bare {
                    dir: dir.0,
                    files,
                    ..Bare::default()
                };
            }
        }
    }

    /// A file of `dir` was asked for by its name: whoever had its attributes would not have asked.
    pub(super) fn asked(&self, dir: Ino, file: Ino) {
        if self.wanted.load(Relaxed) {
            return;
        }
        let mut state = self.state.lock();
        let Some(bare) = state.bare.iter_mut().find(|bare| bare.dir == dir.0) else {
            return;
        };
        bare.row = match bare.row {
            row @ 1.. if file.0.abs_diff(bare.last) <= NEAR => row.saturating_add(1),
            _ => 1,
        };
        bare.last = file.0;
        let through = bare.files.min(ASKED);
        if bare.row == through {
            state.gone_through = state.gone_through.saturating_add(through);
            if state.gone_through >= ASKED {
                self.wanted.store(true, Relaxed);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    /// Entries in a page.
    const PAGE: u64 = 178;

    /// A kernel that keeps whatever it was told, over a tree of `directories` with `files` each, two levels deep.
    struct Kernel {
        listings: Listings,
        now: Instant,
        files: u64,
        known: BTreeSet<u64>,
        asked: u64,
        brought: u64,
    }

    impl Kernel {
        fn new(files: u64) -> Self {
            Self {
                listings: Listings::default(),
                now: Instant::now(),
                files,
                known: BTreeSet::new(),
                asked: 0,
                brought: 0,
            }
        }

        fn file(&self, dir: u64, file: u64) -> u64 {
            1_000_000 + dir * self.files + file
        }

        /// One page, as `getdents` asks for them; the number of the first file of the next.
        fn page(&mut self, dir: u64, from: u64) -> Option<u64> {
            self.now += Duration::from_micros(50);
            let with_attributes = self.listings.with_attributes(self.now);
            let most = match from {
                0 if !with_attributes => FIRST_PAGE.into(),
                _ => PAGE,
            };
            let end = self.files.min(from + most);
            if with_attributes {
                for file in from..end {
                    self.brought += u64::from(self.known.insert(self.file(dir, file)));
                }
            } else {
                self.listings
                    .listed_without(Ino(dir), from == 0, (end - from) as u32);
            }
            (end < self.files).then_some(end)
        }

        fn list(&mut self, dir: u64) {
            let mut from = Some(0);
            while let Some(next) = from {
                from = self.page(dir, next);
            }
        }

        fn look(&mut self, dir: u64, file: u64) {
            let ino = self.file(dir, file);
            if self.known.insert(ino) {
                self.now += Duration::from_micros(30);
                self.asked += 1;
                self.listings.asked(Ino(dir), Ino(ino));
            }
        }

        fn look_at_all(&mut self, dir: u64) {
            for file in 0..self.files {
                self.look(dir, file);
            }
        }
    }

    #[test]
    fn who_wants_no_attributes_costs_no_inode() {
        // `find`, `os.walk`, and `ls -U`, of few large directories and of many small ones.
        for (directories, files) in [(1, 50_000), (1000, 1000), (10_000, 5), (10_000, 1)] {
            let mut kernel = Kernel::new(files);
            for dir in 1..=directories {
                kernel.list(dir);
            }
            assert_eq!((kernel.asked, kernel.brought), (0, 0), "{directories} × {files}");
        }
    }

    #[test]
    fn who_wants_all_asks_for_the_first_few() {
        // `find -ls`: a directory to its end, then its files. `files` of the first directory it pays in full.
        for (directories, files, most) in [(1000, 1000, 1000), (10_000, 5, 20), (10_000, 1, 16), (50, 40, 40)]
        {
            let mut kernel = Kernel::new(files);
            for dir in 1..=directories {
                kernel.list(dir);
                kernel.look_at_all(dir);
            }
            assert!(kernel.asked <= most, "{directories} × {files}: {}", kernel.asked);
            assert_eq!(kernel.asked + kernel.brought, directories * files);
        }
    }

    #[test]
    fn ls_with_attributes_pays_for_the_first_page_of_a_directory() {
        let mut kernel = Kernel::new(50_000);
        let mut from = Some(0);
        while let Some(first) = from {
            from = kernel.page(1, first);
            for file in first..from.unwrap_or(50_000) {
                kernel.look(1, file);
            }
        }
        assert_eq!(kernel.asked, u64::from(FIRST_PAGE));
    }

    #[test]
    fn several_walks_at_once_are_told_apart() {
        let mut kernel = Kernel::new(1000);
        for dir in 1..=8 {
            kernel.list(dir);
        }
        for file in 0..ASKED.into() {
            for dir in 1..=8 {
                kernel.look(dir, file);
            }
        }
        assert!(kernel.listings.with_attributes(kernel.now));
    }

    #[test]
    fn reading_one_file_of_each_directory_wants_none() {
        let mut kernel = Kernel::new(1000);
        for dir in 1..=1000 {
            kernel.list(dir);
            kernel.look(dir, 0);
        }
        assert_eq!((kernel.asked, kernel.brought), (1000, 0));
    }

    #[test]
    fn a_directory_nobody_listed_says_nothing() {
        let mut kernel = Kernel::new(1000);
        kernel.look_at_all(1);
        kernel.list(2);
        assert_eq!(kernel.brought, 0);
    }

    #[test]
    fn a_new_burst_begins_without() {
        let mut kernel = Kernel::new(1000);
        kernel.list(1);
        kernel.look_at_all(1);
        kernel.list(2);
        assert_eq!(kernel.brought, 1000);
        kernel.now += QUIET;
        kernel.list(3);
        assert_eq!(kernel.brought, 1000);
        // What was learnt of the directories before is gone, too.
        kernel.known.clear();
        kernel.look_at_all(1);
        kernel.list(4);
        assert_eq!(kernel.brought, 1000);
    }

    proptest! {
        /// Training: everything is listed, then files are opened in random order while other listings go on.
        #[test]
        fn random_readers_want_none(opened in proptest::collection::vec((1..=20u64, 0..5000u64), 1..400)) {
            let mut kernel = Kernel::new(5000);
            for dir in 1..=20 {
                kernel.list(dir);
            }
            for (dir, file) in opened {
                kernel.look(dir, file);
            }
            kernel.list(21);
            prop_assert_eq!(kernel.brought, 0);
        }
    }
}
