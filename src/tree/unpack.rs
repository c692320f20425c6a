//! From a part as it came over the wire to a part that can be mapped.
//!
//! The bytes come from a stranger: nothing is believed before it is hashed, nothing longer than
//! announced is written, and the result appears whole or not at all.

use std::{
    io::{Read, Write},
    os::unix::fs::PermissionsExt,
    path::Path,
};

use super::TreeError;
use crate::digest::Digest;

/// The largest window that a part may ask the decoder to hold: 128 MiB, what zstd itself takes as the
/// default bound.
const WINDOW_LOG_MAX: u32 = 27;

/// Unpacks a zstd-compressed part of `size` bytes whose BLAKE3 is `expected` into the file `out`,
/// which appears by rename once all of it is verified and on the disk, read-only.
pub fn unpack(reader: impl Read, size: u64, expected: Digest, out: &Path) -> Result<(), TreeError> {
    let io = |source| TreeError::Io {
        path: out.to_owned(),
        source,
    };
    let dir = out
        .parent()
        .filter(|dir| !dir.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new()
        .prefix(".unpack-")
        .tempfile_in(dir)
        .map_err(io)?;
    let mut decoder = zstd::stream::read::Decoder::new(reader).map_err(TreeError::Unpack)?;
    decoder
        .window_log_max(WINDOW_LOG_MAX)
        .map_err(TreeError::Unpack)?;

    let mut hasher = blake3::Hasher::new();
    let mut chunk = vec![0; 256 << 10];
    let mut left = size;
    loop {
        let read = match decoder.read(&mut chunk) {
            Ok(0) => break,
            Ok(read) => read,
            Err(error) if error.kind() == std::io::ErrorKind::Interrupted => continue,
            Err(error) => return Err(TreeError::Unpack(error)),
        };
        left = left.checked_sub(read as u64).ok_or(TreeError::TooLong { size })?;
        let bytes = chunk.get(..read).unwrap_or_default();
        hasher.update(bytes);
        file.write_all(bytes).map_err(io)?;
    }
    if left != 0 {
        return Err(TreeError::TooShort { size, missing: left });
    }
    let actual = Digest::from(hasher.finalize());
    if actual != expected {
        return Err(TreeError::WrongDigest { expected, actual });
    }
    // A part is hashed once, here, and believed ever after: it must not come back short or full of
    // zeros after a power cut.
    let as_file = file.as_file();
    as_file
        .set_permissions(std::fs::Permissions::from_mode(0o400))
        .map_err(io)?;
    as_file.sync_all().map_err(io)?;
    file.persist(out).map_err(|error| io(error.error))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn try_unpack(wire: &[u8], size: u64, expected: Digest) -> (Result<(), TreeError>, Option<Vec<u8>>) {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("part");
        let result = unpack(wire, size, expected, &out);
        let found = std::fs::read(&out).ok();
        let left = std::fs::read_dir(dir.path()).unwrap().count();
        assert_eq!(
            left,
            usize::from(found.is_some()),
            "only the part itself may be left"
        );
        (result, found)
    }

    #[test]
    fn only_exactly_the_announced_bytes_appear() {
        let part: Vec<u8> = (0..1_000_000u32).flat_map(u32::to_le_bytes).collect();
        let (size, digest) = (part.len() as u64, Digest::of(&part));
        let wire = zstd::encode_all(part.as_slice(), 1).unwrap();
        let (result, found) = try_unpack(&wire, size, digest);
        result.unwrap();
        assert!(found.unwrap() == part);

        let refuse = |wire: &[u8], size, digest| {
            let (result, found) = try_unpack(wire, size, digest);
            assert_eq!(found, None);
            result.unwrap_err()
        };
        assert!(matches!(
            refuse(&wire, size - 1, digest),
            TreeError::TooLong { .. }
        ));
        assert!(matches!(
            refuse(&wire, size + 1, digest),
            TreeError::TooShort { missing: 1, .. }
        ));
        assert!(matches!(
            refuse(&wire, size, Digest::of(b"")),
            TreeError::WrongDigest { .. }
        ));
        assert!(matches!(
            refuse(&wire[..wire.len() / 2], size, digest),
            TreeError::Unpack(_)
        ));
        assert!(matches!(
            refuse(b"not zstd at all", size, digest),
            TreeError::Unpack(_)
        ));
        assert!(matches!(
            refuse(&[], size, digest),
            TreeError::TooShort { .. } | TreeError::Unpack(_)
        ));
        let mut trailing = wire.clone();
        trailing.extend_from_slice(b"and more");
        refuse(&trailing, size, digest);
        let mut flipped = wire.clone();
        flipped[wire.len() / 2] ^= 4;
        refuse(&flipped, size, digest);
    }

    #[test]
    fn a_bomb_is_not_written_out() {
        // 4 GiB of zeros: must stop after the announced bytes, long before the end.
        struct Zeros(u64);
        impl Read for Zeros {
            fn read(&mut self, buf: &mut [u8]) -> std::io::Result<usize> {
                let count = self.0.min(buf.len() as u64) as usize;
                buf[..count].fill(0);
                self.0 -= count as u64;
                Ok(count)
            }
        }
        let bomb = zstd::encode_all(Zeros(64 << 20), 1).unwrap();
        let endless = std::iter::repeat_n(bomb, 64).flatten().collect::<Vec<u8>>();
        let (result, found) = try_unpack(&endless, 1000, Digest::of(b""));
        assert!(matches!(result, Err(TreeError::TooLong { size: 1000 })));
        assert_eq!(found, None);
    }

    #[test]
    fn a_part_replaces_what_was_there() {
        let dir = tempfile::tempdir().unwrap();
        let out = dir.path().join("part");
        for text in [&b"one"[..], b"two"] {
            let wire = zstd::encode_all(text, 1).unwrap();
            unpack(wire.as_slice(), 3, Digest::of(text), &out).unwrap();
            assert_eq!(std::fs::read(&out).unwrap(), text);
        }
        assert!(unpack(&b""[..], 3, Digest::of(b""), Path::new("/nonexistent/dir/part")).is_err());
    }
}
