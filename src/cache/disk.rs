//! Every change the cache makes to its directory, and the few system calls it needs beside `std`.
//!
//! Owns the file operations and what this file system can do. Knows nothing of blocks. That all
//! changes pass here is what lets a test take back those that no sync had reached (power loss).

use std::{
    ffi::CStr,
    fs::{self, File},
    io::{self, IoSlice},
    ops::Range,
    os::{
        fd::AsRawFd,
        unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt},
    },
    path::{Path, PathBuf},
};

use nix::{
    errno::Errno,
    fcntl::{FallocateFlags, fallocate},
    sys::{
        statfs::{EXT4_SUPER_MAGIC, fstatfs},
        uio::pwritev,
    },
};

/// What the file system under the cache directory can do; tried once at start.
#[derive(Clone, Copy, Debug)]
pub struct Abilities {
    /// Extents can be given back one by one; otherwise objects are evicted whole.
    pub punch: bool,
    /// Small objects keep their sidecar in an extended attribute instead of a second file.
    pub attributes: bool,
    /// Naming a range before it is written makes writing it cheaper. So on ext4, which otherwise books every
    /// 4 KiB of it by itself: runs of blocks are filled half as fast again (`cargo bench --bench cache`).
    pub reserve: bool,
    /// Whole blocks can be written past the page cache. Only on ext4, whose inode lock keeps such a write and one
    /// through the page cache apart until what the page cache had of the range is thrown out.
    pub direct: bool,
}

/// What memory, offset and length of a direct write are multiples of: few disks ask for more, and then the kernel
/// says so.
const DIRECT_UNIT: usize = 4096;

const ATTRIBUTE: &CStr = c"user.grid";

pub fn create_dir(path: &Path) -> io::Result<()> {
    match fs::DirBuilder::new().mode(0o700).create(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => Ok(()),
        other => other,
    }
}

pub fn create_dir_all(path: &Path) -> io::Result<()> {
    fs::DirBuilder::new().mode(0o700).recursive(true).create(path)
}

/// `Ok(None)` when there is none.
pub fn open_existing(path: &Path) -> io::Result<Option<File>> {
    match File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_NOFOLLOW)
        .open(path)
    {
        Ok(file) => Ok(Some(file)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

/// An empty file of `len` bytes, whatever was there before.
pub fn create(path: &Path, len: u64) -> io::Result<File> {
    let open = || {
        File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o600)
            .custom_flags(libc::O_NOFOLLOW)
            .open(path)
    };
    let file = match open() {
        // The fan-out directory is made when first needed; its parent only at start, so that a cache
        // directory somebody removed stays removed.
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            create_dir(path.parent().ok_or(error)?)?;
            open()?
        }
        other => other?,
    };
    file.set_len(len)?;
    Ok(file)
}

pub fn write_at(file: &File, bytes: &[u8], offset: u64) -> io::Result<()> {
    #[cfg(test)]
    undo::before_write(file, offset..offset + bytes.len() as u64);
    file.write_all_at(bytes, offset)
}

/// A file whose page cache is passed by; only for writing.
pub struct DirectFile(File);

/// The same file, whatever stands under its name now.
pub fn reopen_directly(file: &File) -> io::Result<DirectFile> {
    let itself = PathBuf::from(format!("/proc/self/fd/{}", file.as_raw_fd()));
    let opened = File::options()
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(itself);
    opened.map(DirectFile)
}

/// Writes `parts` one after the other. With the `direct` file of the same, the first parts go past the page cache, as
/// many as lie in memory and in the file as that asks for: how many. The rest go the usual way, in one call unless the
/// file system takes less.
pub fn write_parts_at(
    file: &File,
    direct: Option<&DirectFile>,
    parts: &[&[u8]],
    offset: u64,
) -> io::Result<usize> {
    let len = |parts: &[&[u8]]| parts.iter().map(|part| part.len()).sum::<usize>();
    #[cfg(test)]
    undo::before_write(file, offset..offset + len(parts) as u64);
    let is_aligned =
        |part: &&&[u8]| (part.as_ptr().addr() | part.len()).is_multiple_of(DIRECT_UNIT) && !part.is_empty();
    let mut past = match direct {
        Some(_) if offset.is_multiple_of(DIRECT_UNIT as u64) => parts.iter().take_while(is_aligned).count(),
        _ => 0,
    };
    if let Some(DirectFile(direct)) = direct
        && past > 0
    {
        match write_vectored_at(direct, &parts[..past], offset) {
            Ok(taken) if taken == len(&parts[..past]) => {}
            // Less than all of it, or the disk asks for more than pages: the usual way.
            Ok(_) => past = 0,
            Err(error) if error.raw_os_error() == Some(libc::EINVAL) => past = 0,
            Err(error) => return Err(error),
        }
    }
    let mut at = offset + len(&parts[..past]) as u64;
    let rest = &parts[past..];
    let mut taken = match rest {
        [] => 0,
        [whole] => file.write_all_at(whole, at).map(|()| whole.len())?,
        _ => write_vectored_at(file, rest, at)?,
    };
    for part in rest {
        let have = taken.min(part.len());
        taken -= have;
        file.write_all_at(&part[have..], at + have as u64)?;
        at += part.len() as u64;
    }
    Ok(past)
}

/// How much of `parts` was taken.
fn write_vectored_at(file: &File, parts: &[&[u8]], offset: u64) -> io::Result<usize> {
    let slices: Vec<IoSlice<'_>> = parts.iter().map(|part| IoSlice::new(part)).collect();
    loop {
        match pwritev(file, &slices, offset as libc::off_t) {
            Err(Errno::EINTR) => {}
            taken => return Ok(taken?),
        }
    }
}

/// Space for `range`, whose bytes stay what they were.
pub fn reserve(file: &File, range: Range<u64>) -> io::Result<()> {
    let (start, len) = (
        range.start as libc::off_t,
        (range.end - range.start) as libc::off_t,
    );
    Ok(fallocate(file, FallocateFlags::FALLOC_FL_KEEP_SIZE, start, len)?)
}

pub fn punch(file: &File, range: Range<u64>) -> io::Result<()> {
    #[cfg(test)]
    undo::before_write(file, range.clone());
    let flags = FallocateFlags::FALLOC_FL_PUNCH_HOLE | FallocateFlags::FALLOC_FL_KEEP_SIZE;
    let len = range.end - range.start;
    Ok(fallocate(
        file,
        flags,
        range.start as libc::off_t,
        len as libc::off_t,
    )?)
}

pub fn sync_data(file: &File) -> io::Result<()> {
    file.sync_data()?;
    #[cfg(test)]
    undo::synced(file);
    Ok(())
}

/// As [`sync_data`], with everything the inode holds.
pub fn sync_all(file: &File) -> io::Result<()> {
    file.sync_all()?;
    #[cfg(test)]
    undo::synced(file);
    Ok(())
}

/// Everything written so far to the file system of `file` is on the disk.
pub fn sync_all_files(file: &File) -> io::Result<()> {
    nix::unistd::syncfs(file)?;
    #[cfg(test)]
    undo::all_synced(file);
    Ok(())
}

pub fn unlink(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

/// Replaces `path` as a whole; what was there survives a crash or a power cut in the middle.
pub fn replace(path: &Path, bytes: &[u8]) -> io::Result<()> {
    let fresh = path.with_extension("new");
    let file = create(&fresh, 0)?;
    write_at(&file, bytes, 0)?;
    sync_all(&file)?;
    fs::rename(&fresh, path)?;
    sync_parent(path)
}

pub fn sync_parent(path: &Path) -> io::Result<()> {
    match path.parent() {
        Some(parent) => File::open(parent)?.sync_all(),
        None => Ok(()),
    }
}

pub fn allocated(file: &File) -> io::Result<u64> {
    Ok(file.metadata()?.blocks() * 512)
}

/// Bytes an unprivileged program can still write, and the size of the file system.
pub fn free_space(dir: &File) -> io::Result<(u64, u64)> {
    let stat = nix::sys::statvfs::fstatvfs(dir)?;
    // The types differ between platforms.
    #[allow(clippy::unnecessary_cast)]
    let unit = stat.fragment_size() as u64;
    #[allow(clippy::unnecessary_cast)]
    Ok((
        (stat.blocks_available() as u64).saturating_mul(unit),
        (stat.blocks() as u64).saturating_mul(unit),
    ))
}

pub fn set_attribute(file: &File, value: &[u8]) -> io::Result<()> {
    #[cfg(test)]
    undo::before_attribute(file);
    // SAFETY: the name is a NUL-terminated string and `value` is valid for reads of its length; the
    // descriptor is open for as long as `file` is borrowed.
    let result = unsafe {
        libc::fsetxattr(
            file.as_raw_fd(),
            ATTRIBUTE.as_ptr(),
            value.as_ptr().cast(),
            value.len(),
            0,
        )
    };
    if result == 0 {
        Ok(())
    } else {
        Err(io::Error::last_os_error())
    }
}

/// `Ok(None)` when there is none or it is longer than `most`.
pub fn attribute(file: &File, most: usize) -> io::Result<Option<Vec<u8>>> {
    let mut value = vec![0; most];
    // SAFETY: the name is a NUL-terminated string and `value` is valid for writes of its length; the
    // descriptor is open for as long as `file` is borrowed.
    let result = unsafe {
        libc::fgetxattr(
            file.as_raw_fd(),
            ATTRIBUTE.as_ptr(),
            value.as_mut_ptr().cast(),
            value.len(),
        )
    };
    match usize::try_from(result) {
        Ok(len) => {
            value.truncate(len);
            Ok(Some(value))
        }
        Err(_) => match io::Error::last_os_error() {
            error
                if matches!(
                    error.raw_os_error(),
                    Some(libc::ENODATA | libc::ERANGE | libc::ENOTSUP)
                ) =>
            {
                Ok(None)
            }
            error => Err(error),
        },
    }
}

/// Tries a hole and an attribute on a scratch file in `dir`.
pub fn probe(dir: &Path) -> io::Result<Abilities> {
    const LEN: u64 = 1 << 20;
    let path = dir.join("probe");
    let file = create(&path, LEN)?;
    let outcome = (|| {
        write_at(&file, &vec![1; LEN as usize], 0)?;
        let before = allocated(&file)?;
        let punch = punch(&file, 0..LEN / 2).is_ok() && allocated(&file)? < before;
        let attributes = set_attribute(&file, &[1; super::sidecar::ATTRIBUTE_MOST]).is_ok();
        let is_ext4 = fstatfs(&file)?.filesystem_type() == EXT4_SUPER_MAGIC;
        Ok(Abilities {
            punch,
            attributes,
            reserve: is_ext4 && reserve(&file, 0..LEN).is_ok(),
            direct: is_ext4 && reopen_directly(&file).is_ok(),
        })
    })();
    unlink(&path)?;
    outcome
}

#[cfg(test)]
pub mod undo {
    //! Power loss: remembers what each change in one directory replaced, until a sync covers it.
    use std::{
        path::PathBuf,
        sync::{Arc, Mutex},
    };

    use super::*;

    const PAGE: u64 = 4096;

    pub enum Change {
        /// One page, or part of one: what a disk is given at a time.
        Write {
            file: Arc<File>,
            offset: u64,
            old: Vec<u8>,
        },
        Attribute {
            file: File,
            old: Option<Vec<u8>>,
        },
    }

    /// `None`: nothing is recorded.
    static JOURNAL: Mutex<Option<(PathBuf, Vec<Change>)>> = Mutex::new(None);

    fn journal() -> std::sync::MutexGuard<'static, Option<(PathBuf, Vec<Change>)>> {
        JOURNAL.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    pub fn start(dir: &Path) {
        *journal() = Some((dir.canonicalize().unwrap(), Vec::new()));
    }

    fn within(file: &File, dir: &Path) -> bool {
        fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).is_ok_and(|path| path.starts_with(dir))
    }

    impl Change {
        /// It never reached the disk.
        pub fn undo(&self) {
            match self {
                Self::Write { file, offset, old } => file.write_all_at(old, *offset).unwrap(),
                Self::Attribute { file, old: Some(old) } => set_attribute(file, old).unwrap(),
                Self::Attribute { file, old: None } => {
                    // SAFETY: the name is a NUL-terminated string, the descriptor is open.
                    unsafe { libc::fremovexattr(file.as_raw_fd(), ATTRIBUTE.as_ptr()) };
                }
            }
        }
    }

    /// Stops recording; what no sync had covered, oldest first.
    pub fn stop() -> Vec<Change> {
        journal().take().map(|(_, changes)| changes).unwrap_or_default()
    }

    pub fn before_write(file: &File, range: Range<u64>) {
        if let Some((_, changes)) = journal().as_mut().filter(|(dir, _)| within(file, dir)) {
            let mut old = vec![0; (range.end - range.start) as usize];
            let mut have = 0;
            while have < old.len() {
                match file.read_at(&mut old[have..], range.start + have as u64) {
                    Ok(read) if read > 0 => have += read,
                    _ => break,
                }
            }
            old.truncate(have);
            let file = Arc::new(file.try_clone().unwrap());
            let mut rest = &old[..];
            let mut offset = range.start;
            while !rest.is_empty() {
                let in_page = (PAGE - offset % PAGE).min(rest.len() as u64);
                let (page, after) = rest.split_at(in_page as usize);
                changes.push(Change::Write {
                    file: Arc::clone(&file),
                    offset,
                    old: page.to_vec(),
                });
                rest = after;
                offset += in_page;
            }
        }
    }

    pub fn before_attribute(file: &File) {
        if let Some((_, changes)) = journal().as_mut().filter(|(dir, _)| within(file, dir)) {
            let old = attribute(file, super::super::sidecar::ATTRIBUTE_MOST).unwrap();
            changes.push(Change::Attribute {
                file: file.try_clone().unwrap(),
                old,
            });
        }
    }

    pub fn synced(file: &File) {
        if let Some((_, changes)) = journal().as_mut() {
            let inode = file.metadata().unwrap().ino();
            changes.retain(|change| {
                let file: &File = match change {
                    Change::Write { file, .. } => file,
                    Change::Attribute { file, .. } => file,
                };
                file.metadata().unwrap().ino() != inode
            });
        }
    }

    pub fn all_synced(file: &File) {
        if let Some((_, changes)) = journal().as_mut().filter(|(dir, _)| within(file, dir)) {
            changes.clear();
        }
    }
}
