//! Whether the kernel asks for the attributes along with a listing: always, or when it guesses that they
//! will be wanted.
//!
//! Its guess is that whoever asked for an attribute while reading a directory will ask for more. But
//! `find` and `os.walk` read a directory to its end before they ask for the first, so the guess is wrong
//! for most of its entries, and each costs a request of its own: many times what its inode would have
//! cost. Inodes nobody asks for cost memory, which the kernel can take back, but only so much of it is
//! worth using.

/// What an inode and its name take in the kernel (Linux 6.18: 832 and 192 bytes, and a long name's 64).
const INODE: u64 = 1088;
/// The part of the memory that the inodes of one tree may take, most of them perhaps for nothing.
const SHARE: u64 = 8;

/// For a tree of `entries` on a host with `memory` bytes.
pub(super) fn always_with_attributes(entries: u64, memory: u64) -> bool {
    entries.saturating_mul(INODE) <= memory / SHARE
}

/// Of this host; zero where the kernel does not say.
pub(super) fn memory() -> u64 {
    let value = |name| nix::unistd::sysconf(name).ok().flatten();
    let (pages, size) = (
        value(nix::unistd::SysconfVar::_PHYS_PAGES),
        value(nix::unistd::SysconfVar::PAGE_SIZE),
    );
    let bytes = |number: Option<i64>| number.and_then(|number| u64::try_from(number).ok()).unwrap_or(0);
    bytes(pages).saturating_mul(bytes(size))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_of_which_all_inodes_fit_brings_them_along() {
        assert!(always_with_attributes(1_000_000, 16 << 30));
        assert!(!always_with_attributes(10_000_000, 16 << 30));
        assert!(always_with_attributes(10_000_000, 256 << 30));
        assert!(!always_with_attributes(u64::MAX, u64::MAX));
        assert!(!always_with_attributes(1, 0));
        assert!(memory() > 64 << 20);
    }
}
