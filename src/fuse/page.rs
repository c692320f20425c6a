//! The answer to one READDIRPLUS, written by hand.
//!
//! An entry whose node is 0 is one without attributes: the kernel lists it and makes no inode of it. fuser
//! cannot say that, as it takes the node and the inode number that is listed from the same field. So such an
//! answer is written to the connection here; what fuser then sends for the same request is refused by the kernel
//! (ENOENT: it is answered), and changes nothing, as numbers of requests are never used again.

use std::{
    io::{self, IoSlice},
    time::Duration,
};

use fuser::RequestId;

use crate::fs::{Attributes, IO_SIZE, Kind};

/// Where the log would tell of answers that the kernel did not take. That a request is answered already, or its
/// caller gone, is no news: of each listing without attributes the kernel takes the first answer of two.
pub const UNHEARD: &str = "fuser::reply";

/// How long the kernel may keep an answer. A version never changes; ten years outlive any mount, and
/// stay clear of the overflow that a conversion to jiffies has.
pub(super) const FOREVER: Duration = Duration::from_secs(10 * 365 * 24 * 3600);
/// `fuse_entry_out` and `fuse_dirent`, as they begin each entry.
const ENTRY: usize = 128;
const DIRENT: usize = 24;

/// Entries of a listing as the kernel reads them.
#[derive(Default)]
pub(super) struct Page {
    bytes: Vec<u8>,
}

/// The type of a file as in its mode.
fn type_of(kind: Kind) -> u32 {
    match kind {
        Kind::Directory => libc::S_IFDIR,
        Kind::File => libc::S_IFREG,
        Kind::Symlink => libc::S_IFLNK,
    }
}

impl Page {
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
    }

    /// Of a file or a symlink, or of `.` and `..`, which the kernel knows.
    pub(super) fn add_bare(&mut self, name: &[u8], next: u64, attributes: &Attributes) {
        self.bytes.extend_from_slice(&[0; ENTRY]);
        self.add_dirent(name, next, attributes);
    }

    pub(super) fn add_with_attributes(&mut self, name: &[u8], next: u64, attributes: &Attributes) {
        // fuse_entry_out: node, generation, seconds for which the name and the attributes are good, and the
        // nanoseconds of both; then fuse_attr.
        self.longs(&[attributes.ino.0, 0, FOREVER.as_secs(), FOREVER.as_secs()]);
        self.words(&[0, 0]);
        // Before 1970, as two's complement.
        let seconds = attributes.modified.seconds.cast_unsigned();
        self.longs(&[attributes.ino.0, attributes.size, attributes.blocks]);
        self.longs(&[seconds; 3]);
        self.words(&[attributes.modified.nanos; 3]);
        self.words(&[
            type_of(attributes.kind) | u32::from(attributes.mode),
            attributes.links,
            attributes.owner.uid,
            attributes.owner.gid,
            0,
            IO_SIZE,
            0,
        ]);
        self.add_dirent(name, next, attributes);
    }

    fn add_dirent(&mut self, name: &[u8], next: u64, attributes: &Attributes) {
        self.longs(&[attributes.ino.0, next]);
        // Names have at most 255 bytes.
        self.words(&[name.len() as u32, type_of(attributes.kind) >> 12]);
        self.bytes.extend_from_slice(name);
        self.bytes.resize(self.bytes.len().next_multiple_of(8), 0);
    }

    fn longs(&mut self, values: &[u64]) {
        for value in values {
            self.bytes.extend_from_slice(&value.to_ne_bytes());
        }
    }

    fn words(&mut self, values: &[u32]) {
        for value in values {
            self.bytes.extend_from_slice(&value.to_ne_bytes());
        }
    }

    /// The kernel has it when this returns; it takes an answer whole or not at all.
    pub(super) fn answer(&self, request: RequestId, connection: impl std::os::fd::AsFd) -> io::Result<()> {
        const HEADER: usize = 16;
        let length = u32::try_from(HEADER + self.bytes.len()).map_err(io::Error::other)?;
        // fuse_out_header: length, error, the request.
        let mut header = [0; HEADER];
        header[..4].copy_from_slice(&length.to_ne_bytes());
        header[8..].copy_from_slice(&request.0.to_ne_bytes());
        nix::sys::uio::writev(connection, &[IoSlice::new(&header), IoSlice::new(&self.bytes)])?;
        Ok(())
    }
}

const _: () = assert!(ENTRY == 4 * 8 + 2 * 4 + 88 && (ENTRY + DIRENT).is_multiple_of(8));

#[cfg(test)]
mod tests {
    use std::{io::Read, os::unix::net::UnixStream};

    use super::*;
    use crate::{
        fs::Owner,
        tree::{Ino, Timestamp},
    };

    #[test]
    fn entries_are_as_the_kernel_defines_them() {
        let attributes = Attributes {
            ino: Ino(77),
            kind: Kind::Directory,
            mode: 0o750,
            size: 4096,
            blocks: 8,
            links: 3,
            modified: Timestamp {
                seconds: -2,
                nanos: 5,
            },
            owner: Owner { uid: 11, gid: 12 },
        };
        let mut page = Page::default();
        page.add_bare(b"ninebytes", 4, &attributes);
        page.add_with_attributes(b"dir", 5, &attributes);
        let (ours, mut theirs) = UnixStream::pair().unwrap();
        page.answer(RequestId(9), &ours).unwrap();
        drop(ours);
        let mut sent = Vec::new();
        theirs.read_to_end(&mut sent).unwrap();
        let long = |at: usize| u64::from_ne_bytes(sent[at..at + 8].try_into().unwrap());
        let word = |at: usize| u32::from_ne_bytes(sent[at..at + 4].try_into().unwrap());

        assert_eq!((word(0) as usize, word(4), long(8)), (sent.len(), 0, 9));
        // Offsets as in <linux/fuse.h>.
        let first = 16;
        assert!(sent[first..first + 128].iter().all(|byte| *byte == 0));
        assert_eq!((long(first + 128), long(first + 136)), (77, 4));
        assert_eq!((word(first + 144), word(first + 148)), (9, 4));
        assert_eq!(&sent[first + 152..first + 168], b"ninebytes\0\0\0\0\0\0\0");
        let second = first + 168;
        assert_eq!(long(second), 77);
        assert_eq!(
            (long(second + 16), long(second + 24)),
            (FOREVER.as_secs(), FOREVER.as_secs())
        );
        let attr = second + 40;
        assert_eq!((long(attr), long(attr + 8), long(attr + 16)), (77, 4096, 8));
        assert_eq!((long(attr + 32) as i64, word(attr + 52)), (-2, 5));
        let rest: Vec<u32> = (0..7).map(|n| word(attr + 60 + 4 * n)).collect();
        assert_eq!(rest, [0o040_750, 3, 11, 12, 0, 131_072, 0]);
        assert_eq!((long(second + 128), long(second + 136)), (77, 5));
        assert_eq!(&sent[second + 152..], b"dir\0\0\0\0\0");
    }
}
