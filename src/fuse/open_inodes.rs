//! Which way each open inode is read: the state machine behind passthrough.
//!
//! The kernel refuses an inode that is open both through its page cache and in passthrough, and two
//! backing files for one inode. So the way is chosen when an inode goes from closed to open, and every
//! further open is given the same, until the last release. Pure: no system call is made in here, and
//! none while its lock is held.

use std::collections::HashMap;

use crate::tree::Ino;

/// The kernel's number for a registered backing file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, serde::Serialize, serde::Deserialize)]
#[serde(transparent)]
pub struct BackingNo(pub u32);

/// How an inode is open.
#[derive(Clone, Copy, Debug, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Way {
    Cached,
    Passthrough(BackingNo),
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Open {
    way: Way,
    /// `None`: opened under an agent that is gone, which knew the number of opens. Kept until unmount.
    count: Option<u64>,
}

/// What an open is answered with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Opened {
    pub way: Way,
    /// The inode was closed before: the first to know must write it down before it is answered.
    pub first: bool,
}

/// What a release leaves behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Released {
    /// Open elsewhere still, or inherited.
    StillOpen,
    /// It was the last: the way it had been open is over, and its backing file can be given back.
    Closed(Way),
}

/// Every open inode of one mount. Closed inodes take no room.
#[derive(Debug, Default)]
pub struct OpenInodes {
    open: HashMap<Ino, Open>,
}

impl OpenInodes {
    /// Inodes that are open in the kernel since before this process.
    pub fn inherit(open: impl IntoIterator<Item = (Ino, Way)>) -> Self {
        Self {
            open: open
                .into_iter()
                .map(|(ino, way)| (ino, Open { way, count: None }))
                .collect(),
        }
    }

    /// The way this inode is open now; the way the next open gets whatever it would like.
    pub fn way(&self, ino: Ino) -> Option<Way> {
        self.open.get(&ino).map(|open| open.way)
    }

    /// Opens once more. `wish` counts only if the inode is closed; if the answer's way is another one,
    /// what was prepared for the wish is the caller's to give back.
    pub fn open(&mut self, ino: Ino, wish: Way) -> Opened {
        let mut first = false;
        let open = self.open.entry(ino).or_insert_with(|| {
            first = true;
            Open {
                way: wish,
                count: Some(0),
            }
        });
        open.count = open.count.map(|count| count + 1);
        Opened { way: open.way, first }
    }

    /// The kernel released one open.
    pub fn release(&mut self, ino: Ino) -> Released {
        let Some(open) = self.open.get_mut(&ino) else {
            return Released::StillOpen;
        };
        match &mut open.count {
            None => Released::StillOpen,
            Some(count) if *count > 1 => {
                *count -= 1;
                Released::StillOpen
            }
            Some(_) => {
                let way = open.way;
                self.open.remove(&ino);
                Released::Closed(way)
            }
        }
    }

    #[cfg(test)]
    pub fn len(&self) -> usize {
        self.open.len()
    }

    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.open.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// The kernel as fs/fuse/iomode.c has it: refuses what the design says it refuses.
    #[derive(Default)]
    struct Kernel {
        cached: HashMap<Ino, u64>,
        passthrough: HashMap<Ino, (BackingNo, u64)>,
    }

    impl Kernel {
        fn open(&mut self, ino: Ino, way: Way) -> Result<(), &'static str> {
            match way {
                Way::Cached => {
                    if self.passthrough.contains_key(&ino) {
                        return Err("cached while in passthrough");
                    }
                    *self.cached.entry(ino).or_default() += 1;
                }
                Way::Passthrough(backing) => {
                    if self.cached.contains_key(&ino) {
                        return Err("passthrough while cached");
                    }
                    let open = self.passthrough.entry(ino).or_insert((backing, 0));
                    if open.0 != backing {
                        return Err("two backing files");
                    }
                    open.1 += 1;
                }
            }
            Ok(())
        }

        fn release(&mut self, ino: Ino) -> bool {
            if let Some(count) = self.cached.get_mut(&ino) {
                *count -= 1;
                if *count == 0 {
                    self.cached.remove(&ino);
                }
                return true;
            }
            if let Some((_, count)) = self.passthrough.get_mut(&ino) {
                *count -= 1;
                if *count == 0 {
                    self.passthrough.remove(&ino);
                }
                return true;
            }
            false
        }

        fn is_open(&self, ino: Ino) -> bool {
            self.cached.contains_key(&ino) || self.passthrough.contains_key(&ino)
        }
    }

    #[derive(Clone, Debug)]
    enum Step {
        Open {
            ino: u64,
            complete: bool,
        },
        Release {
            ino: u64,
        },
        /// The agent dies; the next one knows the ways (they were written down) but not the counts.
        HandOver,
    }

    fn step() -> impl Strategy<Value = Step> {
        prop_oneof![
            6 => (1..4u64, any::<bool>()).prop_map(|(ino, complete)| Step::Open { ino, complete }),
            5 => (1..4u64).prop_map(|ino| Step::Release { ino }),
            1 => Just(Step::HandOver),
        ]
    }

    proptest! {
        #[test]
        fn the_kernel_never_refuses_and_nothing_is_left(steps in prop::collection::vec(step(), 0..200)) {
            let mut kernel = Kernel::default();
            let mut inodes = OpenInodes::default();
            let mut written: HashMap<Ino, Way> = HashMap::new();
            let mut next_backing = 1;
            let mut handed_over = false;
            for step in steps {
                match step {
                    Step::Open { ino, complete } => {
                        let ino = Ino(ino);
                        let wish = if complete {
                            next_backing += 1;
                            Way::Passthrough(BackingNo(next_backing))
                        } else {
                            Way::Cached
                        };
                        let opened = inodes.open(ino, wish);
                        prop_assert_eq!(opened.first, !written.contains_key(&ino));
                        if opened.first {
                            prop_assert_eq!(opened.way, wish);
                            written.insert(ino, opened.way);
                        }
                        prop_assert_eq!(kernel.open(ino, opened.way), Ok(()));
                    }
                    Step::Release { ino } => {
                        let ino = Ino(ino);
                        if kernel.release(ino) && let Released::Closed(way) = inodes.release(ino) {
                            // A backing file is given back only when the kernel has nobody on it.
                            prop_assert!(!kernel.is_open(ino));
                            prop_assert_eq!(written.remove(&ino), Some(way));
                        }
                    }
                    Step::HandOver => {
                        handed_over = true;
                        inodes = OpenInodes::inherit(written.iter().map(|(ino, way)| (*ino, *way)));
                    }
                }
                if !handed_over {
                    for ino in (1..4).map(Ino) {
                        prop_assert_eq!(inodes.way(ino).is_some(), kernel.is_open(ino));
                    }
                }
            }
        }
    }

    #[test]
    fn a_release_nobody_opened_changes_nothing() {
        let mut inodes = OpenInodes::default();
        assert_eq!(inodes.release(Ino(1)), Released::StillOpen);
        assert!(inodes.is_empty());
        inodes = OpenInodes::inherit([(Ino(1), Way::Cached)]);
        assert_eq!(inodes.release(Ino(1)), Released::StillOpen);
        assert_eq!(inodes.len(), 1);
    }
}
