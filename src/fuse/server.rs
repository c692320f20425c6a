//! The conversation with the kernel: each request to [`GridFs`], each answer back.
//!
//! Owns the conversion of arguments and replies, INIT, and what is open in passthrough. What is in
//! memory or in the cache is answered on the thread that read the request; what is not moves, reply and
//! all, into a task. The number of such tasks is bounded by the kernel: one per thread that waits in
//! `read(2)`, and `max_background` for everything that nobody waits for.

use std::{
    cell::RefCell,
    collections::HashMap,
    ffi::OsStr,
    io,
    os::{fd::OwnedFd, unix::ffi::OsStrExt},
    path::Path,
    sync::Arc,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use fuser::{
    AccessFlags, BackingId, BsdFileFlags, CopyFileRangeFlags, Errno, FileAttr, FileHandle, FileType,
    Filesystem, FopenFlags, Generation, INodeNo, InitFlags, IoctlFlags, KernelConfig, LockOwner, OpenFlags,
    RenameFlags, ReplyAttr, ReplyBmap, ReplyCreate, ReplyData, ReplyDirectory, ReplyDirectoryPlus,
    ReplyEmpty, ReplyEntry, ReplyIoctl, ReplyLseek, ReplyOpen, ReplyStatfs, ReplyWrite, ReplyXattr, Request,
    TimeOrNow, WriteFlags,
};
use parking_lot::Mutex;
use tokio::runtime::Handle;
use tracing::Instrument as _;

use super::{
    Handshake,
    counters::{Counters, Operation, SlowRead},
    errno::{errno, is_failure},
    io_mode::{self, Abilities, IoMode},
    listing::{self, Listings},
    open_inodes::{BackingNo, OpenInodes, Released, Way},
    open_table::OpenTable,
    page::{FOREVER, Page},
};
use crate::{
    fs::{Attributes, FsError, GridFs, IO_SIZE, Kind, NAME_MAX, Room, STATFS_UNIT},
    tree::{Ino, Timestamp},
};

/// Inode numbers are never used for anything else.
const GENERATION: Generation = Generation(0);
/// Open files carry no state of their own, so that any agent can serve any of them.
const NO_HANDLE: FileHandle = FileHandle(0);
/// The largest request: what `max_pages` becomes.
const MAX_REQUEST: u32 = 1 << 20;
/// Readahead requests and the like that the kernel may have under way at once.
const MAX_BACKGROUND: u16 = 128;
/// With 2, nobody could put overlayfs on top of the mount.
const MAX_STACK_DEPTH: u32 = 1;

/// Everything asked of the kernel where it is offered.
const WANTED: [InitFlags; 7] = [
    // Without the automatic kind: each answer has the attributes that are wanted (see `Listings`).
    InitFlags::FUSE_DO_READDIRPLUS,
    InitFlags::FUSE_PARALLEL_DIROPS,
    InitFlags::FUSE_CACHE_SYMLINKS,
    InitFlags::FUSE_ASYNC_DIO,
    // Pages are dropped only when we say so: never.
    InitFlags::FUSE_EXPLICIT_INVAL_DATA,
    InitFlags::FUSE_NO_OPENDIR_SUPPORT,
    InitFlags::FUSE_HAS_RESEND,
];

thread_local! {
    /// One buffer per request thread for answers from the cache.
    static ANSWER: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    /// And one for listings.
    static PAGE: RefCell<Page> = RefCell::default();
}

/// What is open in passthrough mode.
#[derive(Default)]
pub(super) struct Opens {
    inodes: OpenInodes,
    /// The backing files registered with the kernel. Dropping one gives it back. Those of an agent that
    /// is gone are not among them: they stay registered until the mount ends.
    backings: HashMap<BackingNo, Arc<BackingId>>,
    table: Option<OpenTable>,
}

impl Opens {
    /// Goes on from, and keeps, the table at `path`.
    pub(super) fn written_to(path: &Path) -> io::Result<Self> {
        let (table, open) = OpenTable::open(path)?;
        Ok(Self {
            inodes: OpenInodes::inherit(open),
            backings: HashMap::new(),
            table: Some(table),
        })
    }
}

pub(super) struct Server {
    fs: Arc<GridFs>,
    /// The one that fuser reads from.
    connection: Arc<OwnedFd>,
    listings: Listings,
    counters: Arc<Counters>,
    runtime: Handle,
    wish: io_mode::IoModeWish,
    /// Set when this server goes on with a mount whose INIT was answered by another process.
    resumed: Option<Handshake>,
    handshake: Arc<Mutex<Option<Handshake>>>,
    mode: IoMode,
    opens: Mutex<Opens>,
}

impl Server {
    pub(super) fn new(
        (fs, connection): (GridFs, Arc<OwnedFd>),
        wish: io_mode::IoModeWish,
        opens: Opens,
        counters: Arc<Counters>,
        runtime: Handle,
        resumed: Option<Handshake>,
        handshake: Arc<Mutex<Option<Handshake>>>,
    ) -> Self {
        Self {
            fs: Arc::new(fs),
            connection,
            listings: Listings::default(),
            counters,
            runtime,
            wish,
            resumed,
            handshake,
            mode: IoMode::KeepCache,
            opens: Mutex::new(opens),
        }
    }

    /// The number for the kernel; what is broken is also counted, kept for `status` and logged.
    fn refuse(fs: &GridFs, counters: &Counters, operation: Operation, error: &FsError) -> Errno {
        let number = errno(error);
        if is_failure(error) {
            let mut message = format!("{}: {error}", operation.name());
            let mut source = std::error::Error::source(error);
            while let Some(cause) = source {
                message = format!("{message}: {cause}");
                source = cause.source();
            }
            tracing::error!(reference = fs.reference(), "{message}");
            counters.failed(message);
        }
        number
    }

    fn refusal(&self, operation: Operation, error: &FsError) -> Errno {
        Self::refuse(&self.fs, &self.counters, operation, error)
    }

    fn declined(&self) -> Errno {
        self.counters.count(Operation::Declined);
        Errno::ENOSYS
    }

    fn read_only(&self) -> Errno {
        self.counters.count(Operation::Modify);
        Errno::EROFS
    }

    fn open_cached(reply: ReplyOpen) {
        reply.opened(
            NO_HANDLE,
            FopenFlags::FOPEN_KEEP_CACHE | FopenFlags::FOPEN_NOFLUSH,
        );
    }

    fn open_by_way(&self, ino: Ino, reply: ReplyOpen) {
        // Prepared without the lock: sealing and registering are system calls. If another open of this
        // inode is first, its way counts and what was prepared is given back.
        let known = self.opens.lock().inodes.way(ino);
        let mut prepared = None;
        let mut wish = Way::Cached;
        if known.is_none()
            && let Ok(Some(file)) = self.fs.sealed(ino)
        {
            match reply.open_backing(&*file) {
                Ok(backing) => {
                    let number = backing.into_raw();
                    // SAFETY: the number was returned by this session's kernel just now and ownership
                    // of it was given up by `into_raw`; the new value is its only owner.
                    prepared = Some(unsafe { reply.wrap_backing(number) });
                    wish = Way::Passthrough(BackingNo(number));
                }
                Err(error) => tracing::warn!(%error, "no passthrough for a sealed object"),
            }
        }
        let mut opens = self.opens.lock();
        let opened = opens.inodes.open(ino, wish);
        // Under the lock, so that nobody is answered before it is written: a copy into memory.
        if opened.first
            && let Some(table) = &mut opens.table
            && let Err(error) = table.insert(ino, opened.way)
        {
            opens.inodes.release(ino);
            drop(opens);
            self.counters
                .failed(format!("open: the table of open files: {error}"));
            return reply.error(Errno::EIO);
        }
        match opened.way {
            Way::Cached => {
                drop(opens);
                Self::open_cached(reply);
            }
            Way::Passthrough(number) => {
                if opened.first
                    && let Some(backing) = prepared.take()
                {
                    opens.backings.insert(number, Arc::new(backing));
                }
                let backing = opens.backings.get(&number).cloned();
                drop(opens);
                match backing {
                    Some(backing) => reply.opened_passthrough(NO_HANDLE, FopenFlags::FOPEN_NOFLUSH, &backing),
                    None => {
                        // SAFETY: a number that is in no map of ours is one that the table gave us; it
                        // was registered on this connection by an agent that is gone, and nobody gives
                        // it back: neither `OpenInodes`, for which it never closes, nor we, below.
                        let inherited = unsafe { reply.wrap_backing(number.0) };
                        reply.opened_passthrough(NO_HANDLE, FopenFlags::FOPEN_NOFLUSH, &inherited);
                        inherited.into_raw();
                    }
                }
            }
        }
        // Dropped here, without the lock: gives back what another open made superfluous.
        drop(prepared);
    }
}

fn ino(number: INodeNo) -> Ino {
    Ino(number.0)
}

fn time(timestamp: Timestamp) -> SystemTime {
    let seconds = Duration::from_secs(timestamp.seconds.unsigned_abs());
    let whole = if timestamp.seconds < 0 {
        UNIX_EPOCH.checked_sub(seconds)
    } else {
        UNIX_EPOCH.checked_add(seconds)
    };
    whole
        .and_then(|whole| whole.checked_add(Duration::from_nanos(u64::from(timestamp.nanos))))
        .unwrap_or(UNIX_EPOCH)
}

fn file_type(kind: Kind) -> FileType {
    match kind {
        Kind::Directory => FileType::Directory,
        Kind::File => FileType::RegularFile,
        Kind::Symlink => FileType::Symlink,
    }
}

fn file_attr(attributes: &Attributes) -> FileAttr {
    let modified = time(attributes.modified);
    FileAttr {
        ino: INodeNo(attributes.ino.0),
        size: attributes.size,
        blocks: attributes.blocks,
        atime: modified,
        mtime: modified,
        ctime: modified,
        crtime: modified,
        kind: file_type(attributes.kind),
        perm: attributes.mode,
        nlink: attributes.links,
        uid: attributes.owner.uid,
        gid: attributes.owner.gid,
        rdev: 0,
        blksize: IO_SIZE,
        flags: 0,
    }
}

/// "There is no such name, and there never will be": an entry without an inode.
fn absent() -> FileAttr {
    FileAttr {
        ino: INodeNo(0),
        size: 0,
        blocks: 0,
        atime: UNIX_EPOCH,
        mtime: UNIX_EPOCH,
        ctime: UNIX_EPOCH,
        crtime: UNIX_EPOCH,
        kind: FileType::RegularFile,
        perm: 0,
        nlink: 0,
        uid: 0,
        gid: 0,
        rdev: 0,
        blksize: 0,
        flags: 0,
    }
}

fn reply_xattr(reply: ReplyXattr, value: &[u8], room: u32) {
    match u32::try_from(value.len()) {
        Ok(length) if room == 0 => reply.size(length),
        Ok(length) if length <= room => reply.data(value),
        _ => reply.error(Errno::ERANGE),
    }
}

impl Filesystem for Server {
    fn init(&mut self, _: &Request, config: &mut KernelConfig) -> io::Result<()> {
        let offered = config.capabilities();
        for flag in WANTED {
            if offered.contains(flag) {
                config.add_capabilities(flag).ok();
            }
        }
        let chosen = match &self.resumed {
            // The kernel has been told already.
            Some(before) => before.io_mode.clone(),
            None => io_mode::choose(
                self.wish,
                &self.fs.totals(),
                Abilities {
                    passthrough: offered.contains(InitFlags::FUSE_PASSTHROUGH),
                    no_open: offered.contains(InitFlags::FUSE_NO_OPEN_SUPPORT),
                    admin: io_mode::is_admin(),
                },
            ),
        };
        match chosen.mode {
            IoMode::Passthrough => {
                config.add_capabilities(InitFlags::FUSE_PASSTHROUGH).ok();
                config.set_max_stack_depth(MAX_STACK_DEPTH).ok();
            }
            IoMode::NoOpen => {
                config.add_capabilities(InitFlags::FUSE_NO_OPEN_SUPPORT).ok();
            }
            IoMode::KeepCache => {}
        }
        // Nothing is ever written, but fuser makes the largest read of this one too.
        config.set_max_write(MAX_REQUEST).ok();
        config.set_max_background(MAX_BACKGROUND).ok();
        config.set_congestion_threshold(MAX_BACKGROUND / 4 * 3).ok();
        // A refusal names the most the kernel takes.
        let readahead = match config.set_max_readahead(MAX_REQUEST) {
            Ok(_) => MAX_REQUEST,
            Err(most) => most,
        };
        let abi = config.kernel_abi();
        self.mode = chosen.mode;
        *self.handshake.lock() = Some(Handshake {
            kernel_major: abi.0,
            kernel_minor: abi.1,
            capabilities: offered.bits(),
            max_readahead: match &self.resumed {
                Some(before) => before.max_readahead,
                None => readahead,
            },
            io_mode: chosen,
        });
        Ok(())
    }

    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        let _timed = self.counters.time(Operation::Lookup);
        match self.fs.lookup(ino(parent), name.as_bytes()) {
            Ok(Some(found)) => {
                if found.kind != Kind::Directory {
                    self.listings.asked(ino(parent), found.ino);
                }
                reply.entry(&FOREVER, &file_attr(&found), GENERATION);
            }
            Ok(None) => reply.entry(&FOREVER, &absent(), GENERATION),
            Err(error) => reply.error(self.refusal(Operation::Lookup, &error)),
        }
    }

    fn getattr(&self, _: &Request, number: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        let _timed = self.counters.time(Operation::GetAttr);
        match self.fs.attributes(ino(number)) {
            Ok(attributes) => reply.attr(&FOREVER, &file_attr(&attributes)),
            Err(error) => reply.error(self.refusal(Operation::GetAttr, &error)),
        }
    }

    fn readlink(&self, _: &Request, number: INodeNo, reply: ReplyData) {
        let _timed = self.counters.time(Operation::ReadLink);
        match self.fs.readlink(ino(number)) {
            Ok(target) => reply.data(target),
            Err(error) => reply.error(self.refusal(Operation::ReadLink, &error)),
        }
    }

    fn open(&self, _: &Request, number: INodeNo, flags: OpenFlags, reply: ReplyOpen) {
        if self.mode == IoMode::NoOpen {
            // From now on the kernel opens and releases by itself.
            return reply.error(self.declined());
        }
        let _timed = self.counters.time(Operation::Open);
        if flags.0 & libc::O_ACCMODE != libc::O_RDONLY {
            return reply.error(self.read_only());
        }
        match self.mode {
            IoMode::Passthrough => self.open_by_way(ino(number), reply),
            IoMode::KeepCache | IoMode::NoOpen => Self::open_cached(reply),
        }
    }

    fn read(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let started = Instant::now();
        let (ino, length) = (ino(number), u64::from(size.min(MAX_REQUEST)));
        let reply = ANSWER.with_borrow_mut(|answer| match self.fs.read_cached(ino, offset, length, answer) {
            Ok(true) => {
                self.counters.count(Operation::ReadHit);
                self.counters.count_bytes(answer.len());
                reply.data(answer);
                self.counters.took(Operation::ReadHit, started.elapsed());
                None
            }
            Ok(false) => Some(reply),
            Err(error) => {
                reply.error(self.refusal(Operation::ReadHit, &error));
                None
            }
        });
        let Some(reply) = reply else { return };
        self.counters.count(Operation::ReadMiss);
        let (fs, counters) = (self.fs.clone(), self.counters.clone());
        let span = tracing::debug_span!("read", reference = fs.reference(), ino = ino.0, offset, length);
        let answering = async move {
            match fs.read(ino, offset, length).await {
                Ok(bytes) => {
                    counters.count_bytes(bytes.len());
                    reply.data(&bytes);
                }
                Err(error) => reply.error(Self::refuse(&fs, &counters, Operation::ReadMiss, &error)),
            }
            let took = started.elapsed();
            counters.waited(SlowRead {
                took,
                ino,
                offset,
                length,
            });
        };
        self.runtime.spawn(answering.instrument(span));
    }

    fn release(
        &self,
        _: &Request,
        number: INodeNo,
        _: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        let _timed = self.counters.time(Operation::Release);
        let mut superfluous = None;
        if self.mode == IoMode::Passthrough {
            let ino = ino(number);
            let mut opens = self.opens.lock();
            if let Released::Closed(way) = opens.inodes.release(ino) {
                // Crossed out first: a number that the table has must be registered.
                let crossed_out = opens.table.as_mut().map_or(Ok(()), |table| table.remove(ino));
                if let Way::Passthrough(number) = way {
                    superfluous = opens.backings.remove(&number);
                }
                if let Err(error) = crossed_out {
                    self.counters
                        .failed(format!("release: the table of open files: {error}"));
                    // Then it stays registered as well.
                    if let Some(Ok(backing)) = superfluous.take().map(Arc::try_unwrap) {
                        backing.into_raw();
                    }
                }
            }
        }
        drop(superfluous);
        reply.ok();
    }

    fn opendir(&self, _: &Request, _: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        // The kernel then opens directories by itself and caches what is in them.
        reply.error(self.declined());
    }

    fn readdir(&self, _: &Request, number: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let _timed = self.counters.time(Operation::ReadDir);
        let listed = self.fs.list(ino(number), offset, |entry| {
            let attributes = &entry.attributes;
            let name = OsStr::from_bytes(entry.name);
            match reply.add(
                INodeNo(attributes.ino.0),
                entry.next,
                file_type(attributes.kind),
                name,
            ) {
                true => Room::Full,
                false => Room::Left,
            }
        });
        match listed {
            Ok(()) => reply.ok(),
            Err(error) => reply.error(self.refusal(Operation::ReadDir, &error)),
        }
    }

    fn readdirplus(
        &self,
        request: &Request,
        number: INodeNo,
        _: FileHandle,
        offset: u64,
        mut reply: ReplyDirectoryPlus,
    ) {
        let _timed = self.counters.time(Operation::ReadDirPlus);
        let with_attributes = self.listings.with_attributes(Instant::now());
        PAGE.with_borrow_mut(|page| {
            page.clear();
            let mut bare = 0;
            let most = if offset == 0 {
                listing::FIRST_PAGE
            } else {
                u32::MAX
            };
            let listed = self.fs.list(ino(number), offset, |entry| {
                if bare == most {
                    return Room::Full;
                }
                let attributes = file_attr(&entry.attributes);
                let name = OsStr::from_bytes(entry.name);
                // Also of what is answered by hand: fuser knows how much room there is.
                let is_full = reply.add(
                    attributes.ino,
                    entry.next,
                    name,
                    &FOREVER,
                    &attributes,
                    GENERATION,
                );
                match is_full {
                    true => return Room::Full,
                    false if with_attributes => {}
                    false if entry.attributes.kind == Kind::Directory => {
                        page.add_with_attributes(entry.name, entry.next, &entry.attributes);
                    }
                    false => {
                        page.add_bare(entry.name, entry.next, &entry.attributes);
                        bare += 1;
                    }
                }
                Room::Left
            });
            match listed {
                Err(error) => reply.error(self.refusal(Operation::ReadDirPlus, &error)),
                // Nothing is left out.
                Ok(()) if bare == 0 => reply.ok(),
                Ok(()) => {
                    // Before the answer: whoever has that may be asking already.
                    self.listings.listed_without(ino(number), offset == 0, bare);
                    match page.answer(request.unique(), &self.connection) {
                        // Comes too late, as it should: see `Page`.
                        Ok(()) => reply.error(Errno::EIO),
                        // The same with all attributes.
                        Err(_) => reply.ok(),
                    }
                }
            }
        });
    }

    fn statfs(&self, _: &Request, _: INodeNo, reply: ReplyStatfs) {
        let _timed = self.counters.time(Operation::StatFs);
        let statistics = self.fs.statistics();
        reply.statfs(
            statistics.blocks,
            0,
            0,
            statistics.entries,
            0,
            STATFS_UNIT,
            NAME_MAX as u32,
            STATFS_UNIT,
        );
    }

    fn getxattr(&self, _: &Request, number: INodeNo, name: &OsStr, size: u32, reply: ReplyXattr) {
        let _timed = self.counters.time(Operation::GetXattr);
        match self.fs.xattr(ino(number), name.as_bytes()) {
            Ok(value) => reply_xattr(reply, &value, size),
            Err(error) => reply.error(self.refusal(Operation::GetXattr, &error)),
        }
    }

    fn listxattr(&self, _: &Request, number: INodeNo, size: u32, reply: ReplyXattr) {
        let _timed = self.counters.time(Operation::ListXattr);
        match self.fs.xattr_names(ino(number)) {
            Ok(names) => reply_xattr(reply, &names, size),
            Err(error) => reply.error(self.refusal(Operation::ListXattr, &error)),
        }
    }

    // Answered once each with ENOSYS, after which the kernel does by itself what is right
    // for a file system without anything to flush, lock or map.

    fn access(&self, _: &Request, _: INodeNo, _: AccessFlags, reply: ReplyEmpty) {
        reply.error(self.declined());
    }

    fn flush(&self, _: &Request, _: INodeNo, _: FileHandle, _: LockOwner, reply: ReplyEmpty) {
        reply.error(self.declined());
    }

    fn fsync(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.error(self.declined());
    }

    fn fsyncdir(&self, _: &Request, _: INodeNo, _: FileHandle, _: bool, reply: ReplyEmpty) {
        reply.error(self.declined());
    }

    fn bmap(&self, _: &Request, _: INodeNo, _: u32, _: u64, reply: ReplyBmap) {
        reply.error(self.declined());
    }

    fn lseek(&self, _: &Request, _: INodeNo, _: FileHandle, _: i64, _: i32, reply: ReplyLseek) {
        reply.error(self.declined());
    }

    fn ioctl(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: IoctlFlags,
        _: u32,
        _: &[u8],
        _: u32,
        reply: ReplyIoctl,
    ) {
        self.counters.count(Operation::Declined);
        reply.error(Errno::ENOTTY);
    }

    fn poll(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: fuser::PollNotifier,
        _: fuser::PollEvents,
        _: fuser::PollFlags,
        reply: fuser::ReplyPoll,
    ) {
        reply.error(self.declined());
    }

    // The kernel refuses these by itself, as the mount is read-only; should one come through, the
    // answer is the same.

    fn setattr(
        &self,
        _: &Request,
        _: INodeNo,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u32>,
        _: Option<u64>,
        _: Option<TimeOrNow>,
        _: Option<TimeOrNow>,
        _: Option<SystemTime>,
        _: Option<FileHandle>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<SystemTime>,
        _: Option<BsdFileFlags>,
        reply: ReplyAttr,
    ) {
        reply.error(self.read_only());
    }

    fn mknod(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(self.read_only());
    }

    fn mkdir(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, reply: ReplyEntry) {
        reply.error(self.read_only());
    }

    fn unlink(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(self.read_only());
    }

    fn rmdir(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(self.read_only());
    }

    fn symlink(&self, _: &Request, _: INodeNo, _: &OsStr, _: &Path, reply: ReplyEntry) {
        reply.error(self.read_only());
    }

    fn rename(
        &self,
        _: &Request,
        _: INodeNo,
        _: &OsStr,
        _: INodeNo,
        _: &OsStr,
        _: RenameFlags,
        reply: ReplyEmpty,
    ) {
        reply.error(self.read_only());
    }

    fn link(&self, _: &Request, _: INodeNo, _: INodeNo, _: &OsStr, reply: ReplyEntry) {
        reply.error(self.read_only());
    }

    fn create(&self, _: &Request, _: INodeNo, _: &OsStr, _: u32, _: u32, _: i32, reply: ReplyCreate) {
        reply.error(self.read_only());
    }

    fn write(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: &[u8],
        _: WriteFlags,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyWrite,
    ) {
        reply.error(self.read_only());
    }

    fn fallocate(&self, _: &Request, _: INodeNo, _: FileHandle, _: u64, _: u64, _: i32, reply: ReplyEmpty) {
        reply.error(self.read_only());
    }

    fn setxattr(&self, _: &Request, _: INodeNo, _: &OsStr, _: &[u8], _: i32, _: u32, reply: ReplyEmpty) {
        reply.error(self.read_only());
    }

    fn removexattr(&self, _: &Request, _: INodeNo, _: &OsStr, reply: ReplyEmpty) {
        reply.error(self.read_only());
    }

    fn copy_file_range(
        &self,
        _: &Request,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: INodeNo,
        _: FileHandle,
        _: u64,
        _: u64,
        _: CopyFileRangeFlags,
        reply: ReplyWrite,
    ) {
        reply.error(self.read_only());
    }
}
