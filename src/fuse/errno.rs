//! The one table from what the file system says to what the kernel is told.

use fuser::Errno;

use crate::fs::FsError;

/// Exhaustive on purpose: a new error must choose its number here. None becomes ENOENT: that is an
/// answer, cached for ever, and never a failure.
pub(super) fn errno(error: &FsError) -> Errno {
    match error {
        FsError::NoSuchInode(_) => Errno::ESTALE,
        FsError::NotADirectory => Errno::ENOTDIR,
        FsError::IsADirectory => Errno::EISDIR,
        FsError::NotAFile | FsError::NotASymlink => Errno::EINVAL,
        FsError::NameTooLong(_) => Errno::ENAMETOOLONG,
        FsError::NoSuchAttribute => Errno::ENODATA,
        FsError::UnsupportedAttribute => Errno::EOPNOTSUPP,
        FsError::Tree(_) | FsError::Read { .. } => Errno::EIO,
    }
}

/// Whether an error says that something is broken (and belongs into the log), or only answers.
pub(super) fn is_failure(error: &FsError) -> bool {
    match error {
        FsError::Tree(_) | FsError::Read { .. } | FsError::NoSuchInode(_) => true,
        FsError::NotADirectory
        | FsError::IsADirectory
        | FsError::NotAFile
        | FsError::NotASymlink
        | FsError::NameTooLong(_)
        | FsError::NoSuchAttribute
        | FsError::UnsupportedAttribute => false,
    }
}
