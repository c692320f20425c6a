//! What a walk found, on disk until it is published.
//!
//! Two passes are needed (what is still in use of each old bundle is known only when everything was
//! seen), and ten million entries do not belong in memory between them.

use std::{
    fs::File,
    io::{self, BufReader, BufWriter, Read, Seek, SeekFrom, Write},
};

use super::content::Stamp;
use crate::tree::{RowNo, Timestamp};

/// No path or target is longer: what a length read back is checked against.
const MAX_BYTES: u32 = 1 << 20;

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Planned {
    pub path: Vec<u8>,
    pub stamp: Stamp,
    pub plan: Plan,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Plan {
    Directory,
    Symlink {
        target: Vec<u8>,
    },
    /// To be read.
    Read,
    /// The same bytes as this row of the previous version.
    Unchanged(RowNo),
}

pub(super) struct SpoolWriter {
    file: BufWriter<File>,
    entries: u64,
}

pub(super) struct SpoolReader {
    file: BufReader<File>,
    left: u64,
}

impl SpoolWriter {
    /// `file`: empty, and nobody else's.
    pub fn new(file: File) -> Self {
        Self {
            file: BufWriter::with_capacity(256 << 10, file),
            entries: 0,
        }
    }

    pub fn push(&mut self, planned: &Planned) -> io::Result<()> {
        let Planned { path, stamp, plan } = planned;
        let (tag, row, target): (u8, u32, &[u8]) = match plan {
            Plan::Directory => (0, 0, b""),
            Plan::Symlink { target } => (1, 0, target),
            Plan::Read => (2, 0, b""),
            Plan::Unchanged(row) => (3, row.0, b""),
        };
        let out = &mut self.file;
        out.write_all(&[tag])?;
        out.write_all(&row.to_le_bytes())?;
        out.write_all(&stamp.mode.to_le_bytes())?;
        out.write_all(&stamp.size.to_le_bytes())?;
        for time in [stamp.modified, stamp.changed] {
            out.write_all(&time.seconds.to_le_bytes())?;
            out.write_all(&time.nanos.to_le_bytes())?;
        }
        out.write_all(&stamp.device.to_le_bytes())?;
        out.write_all(&stamp.inode.to_le_bytes())?;
        for bytes in [path.as_slice(), target] {
            let length = u32::try_from(bytes.len())
                .ok()
                .filter(|length| *length <= MAX_BYTES);
            let length = length.ok_or_else(|| io::Error::other("a path is too long"))?;
            out.write_all(&length.to_le_bytes())?;
            out.write_all(bytes)?;
        }
        self.entries += 1;
        Ok(())
    }

    pub fn into_reader(self) -> io::Result<SpoolReader> {
        let mut file = self.file.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.seek(SeekFrom::Start(0))?;
        Ok(SpoolReader {
            file: BufReader::with_capacity(256 << 10, file),
            left: self.entries,
        })
    }
}

impl SpoolReader {
    fn array<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        let mut bytes = [0; N];
        self.file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    fn time(&mut self) -> io::Result<Timestamp> {
        let seconds = i64::from_le_bytes(self.array()?);
        Ok(Timestamp {
            seconds,
            nanos: u32::from_le_bytes(self.array()?),
        })
    }

    fn bytes(&mut self) -> io::Result<Vec<u8>> {
        let length = u32::from_le_bytes(self.array()?);
        if length > MAX_BYTES {
            return Err(io::ErrorKind::InvalidData.into());
        }
        let mut bytes = vec![0; length as usize];
        self.file.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// The next entry, in the order of pushing.
    pub fn next(&mut self) -> io::Result<Option<Planned>> {
        if self.left == 0 {
            return Ok(None);
        }
        self.left -= 1;
        let [tag] = self.array()?;
        let row = u32::from_le_bytes(self.array()?);
        let mode = u16::from_le_bytes(self.array()?);
        let size = u64::from_le_bytes(self.array()?);
        let (modified, changed) = (self.time()?, self.time()?);
        let device = u64::from_le_bytes(self.array()?);
        let inode = u64::from_le_bytes(self.array()?);
        let (path, target) = (self.bytes()?, self.bytes()?);
        let plan = match tag {
            0 => Plan::Directory,
            1 => Plan::Symlink { target },
            2 => Plan::Read,
            3 => Plan::Unchanged(RowNo(row)),
            _ => return Err(io::ErrorKind::InvalidData.into()),
        };
        let stamp = Stamp {
            size,
            modified,
            changed,
            device,
            inode,
            mode,
        };
        Ok(Some(Planned { path, stamp, plan }))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn planned() -> impl Strategy<Value = Planned> {
        let plan = prop_oneof![
            Just(Plan::Directory),
            Just(Plan::Read),
            any::<Vec<u8>>().prop_map(|target| Plan::Symlink { target }),
            any::<u32>().prop_map(|row| Plan::Unchanged(RowNo(row))),
        ];
        let times = [any::<(i64, u32)>(), any::<(i64, u32)>()];
        (any::<Vec<u8>>(), any::<(u64, u64, u64, u16)>(), times, plan).prop_map(
            |(path, (size, device, inode, mode), times, plan)| {
                let [modified, changed] = times.map(|(seconds, nanos)| Timestamp { seconds, nanos });
                let stamp = Stamp {
                    size,
                    modified,
                    changed,
                    device,
                    inode,
                    mode,
                };
                Planned { path, stamp, plan }
            },
        )
    }

    proptest! {
        #[test]
        fn what_goes_in_comes_out(entries in proptest::collection::vec(planned(), 0..40)) {
            let mut writer = SpoolWriter::new(tempfile::tempfile().unwrap());
            for entry in &entries {
                writer.push(entry).unwrap();
            }
            let mut reader = writer.into_reader().unwrap();
            for entry in &entries {
                let read = reader.next().unwrap();
                prop_assert_eq!(read.as_ref(), Some(entry));
            }
            prop_assert_eq!(reader.next().unwrap(), None);
        }
    }
}
