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
    let io = |source| TreeError::Io { path: out.to_owned(), source };
    let dir = out.parent().filter(|dir| !dir.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let mut file = tempfile::Builder::new().prefix(".unpack-").tempfile_in(dir).map_err(io)?;
    let mut decoder = zstd::stream::read::Decoder::new(reader).map_err(TreeError::Unpack)?;
    decoder.window_log_max(WINDOW_LOG_MAX).map_err(TreeError::Unpack)?;

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
    as_file.set_permissions(std::fs::Permissions::from_mode(0o400)).map_err(io)?;
    as_file.sync_all().map_err(io)?;
    file.persist(out).map_err(|error| io(error.error))?;
    Ok(())
}
