//! Which of the kernel's ways of reading a mount uses, chosen once, at INIT.

use serde::{Deserialize, Serialize};

use crate::tree::Totals;

/// From this mean file size on, handing whole objects to the kernel pays for the extra OPENs.
const LARGE_MEAN: u64 = 4 << 20;

/// What was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoModeWish {
    /// By the tree's file sizes.
    #[default]
    Auto,
    Passthrough,
    NoOpen,
}

/// What a mount does for its whole life.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum IoMode {
    /// OPEN was declined: the kernel opens by itself and keeps its page cache. No state per open file.
    NoOpen,
    /// Sealed objects are read by the kernel straight from the cache file, the rest as in `KeepCache`.
    Passthrough,
    /// OPEN is answered, pages are kept across opens.
    KeepCache,
}

impl std::fmt::Display for IoMode {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::NoOpen => "no-open",
            Self::Passthrough => "passthrough",
            Self::KeepCache => "keep-cache",
        })
    }
}

/// The mode and why it is that one, for `status` and `doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ChosenIoMode {
    pub mode: IoMode,
    pub reason: String,
}

/// What the kernel and the process can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Abilities {
    /// The kernel knows passthrough (Linux 6.9).
    pub passthrough: bool,
    /// The kernel goes on by itself when OPEN is declined (Linux 3.16).
    pub no_open: bool,
    /// CAP_SYS_ADMIN, without which no backing file can be registered.
    pub admin: bool,
}

pub(super) fn choose(wish: IoModeWish, totals: &Totals, abilities: Abilities) -> ChosenIoMode {
    let mean = totals.bytes / totals.files.max(1);
    let obstacle = if !abilities.passthrough {
        Some("this kernel has no FUSE passthrough (Linux 6.9 has)")
    } else if !abilities.admin {
        Some("passthrough needs CAP_SYS_ADMIN")
    } else {
        None
    };
    let chosen = |mode, reason: String| ChosenIoMode { mode, reason };
    match (wish, obstacle) {
        (IoModeWish::Passthrough, None) => chosen(IoMode::Passthrough, "asked for".into()),
        (IoModeWish::Passthrough, Some(why)) => chosen(IoMode::KeepCache, why.into()),
        (IoModeWish::Auto, None) if mean >= LARGE_MEAN => chosen(
            IoMode::Passthrough,
            format!("files are large ({mean} bytes on average)"),
        ),
        (IoModeWish::Auto | IoModeWish::NoOpen, _) if !abilities.no_open => {
            chosen(IoMode::KeepCache, "this kernel wants every open answered".into())
        }
        (IoModeWish::NoOpen, _) => chosen(IoMode::NoOpen, "asked for".into()),
        (IoModeWish::Auto, Some(why)) if mean >= LARGE_MEAN => chosen(
            IoMode::NoOpen,
            format!("files are large ({mean} bytes on average), but {why}"),
        ),
        (IoModeWish::Auto, _) => chosen(
            IoMode::NoOpen,
            format!("files are small ({mean} bytes on average)"),
        ),
    }
}

/// Whether this process has CAP_SYS_ADMIN.
pub(super) fn is_admin() -> bool {
    const CAP_SYS_ADMIN: u32 = 21;
    std::fs::read_to_string("/proc/self/status")
        .ok()
        .and_then(|status| {
            let line = status
                .lines()
                .find_map(|line| line.strip_prefix("CapEff:"))?
                .trim()
                .to_owned();
            u64::from_str_radix(&line, 16).ok()
        })
        .is_some_and(|effective| effective & (1 << CAP_SYS_ADMIN) != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Abilities = Abilities {
        passthrough: true,
        no_open: true,
        admin: true,
    };

    fn totals(files: u64, bytes: u64) -> Totals {
        Totals {
            files,
            bytes,
            ..Totals::default()
        }
    }

    #[test]
    fn what_cannot_be_had_is_replaced_and_says_why() {
        let large = totals(10, 10 * LARGE_MEAN);
        let small = totals(10, 10);
        let empty = totals(0, 0);
        let mode = |wish, totals: &Totals, abilities| choose(wish, totals, abilities).mode;
        assert_eq!(mode(IoModeWish::Auto, &large, ALL), IoMode::Passthrough);
        assert_eq!(mode(IoModeWish::Auto, &small, ALL), IoMode::NoOpen);
        assert_eq!(mode(IoModeWish::Auto, &empty, ALL), IoMode::NoOpen);
        assert_eq!(mode(IoModeWish::NoOpen, &large, ALL), IoMode::NoOpen);
        assert_eq!(mode(IoModeWish::Passthrough, &small, ALL), IoMode::Passthrough);
        for abilities in [
            Abilities { admin: false, ..ALL },
            Abilities {
                passthrough: false,
                ..ALL
            },
        ] {
            assert_eq!(
                mode(IoModeWish::Passthrough, &large, abilities),
                IoMode::KeepCache
            );
            let auto = choose(IoModeWish::Auto, &large, abilities);
            assert_eq!(auto.mode, IoMode::NoOpen);
            assert!(auto.reason.contains("passthrough"), "{}", auto.reason);
        }
        let ancient = Abilities {
            passthrough: false,
            no_open: false,
            admin: true,
        };
        assert_eq!(mode(IoModeWish::Auto, &small, ancient), IoMode::KeepCache);
        assert_eq!(mode(IoModeWish::NoOpen, &small, ancient), IoMode::KeepCache);
    }
}
