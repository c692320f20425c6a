//! One object of the cache, held: its files, the presence of its blocks, reading and filling.
//!
//! Owns the files' life and what is done with them; who may touch an extent at a time is [`super::extent`]'s.

mod evict;
mod files;
mod fill;

use std::{
    fs::File,
    io,
    ops::Range,
    os::unix::fs::{FileExt, MetadataExt},
    sync::{Arc, atomic::Ordering},
};

use parking_lot::{Mutex, RwLock};

pub(super) use self::evict::Evicted;
use self::files::Files;
pub use self::fill::WriteMode;
use super::{
    CacheError, ObjectId, Purpose, Shared, VerifyPolicy,
    checksum::crc32c,
    disk,
    extent::Extent,
    policy::Unit,
    sidecar::{self, Sidecar},
    slot::{ABSENT, HEADER_LEN, Header, Slot},
};
use crate::block::{
    BLOCK_SIZE, BLOCKS_PER_EXTENT, BlockNo, EXTENT_SIZE, ExtentNo, block_count, blocks_covering,
};

/// Nothing larger is cached: it bounds what a record that lies about a size can make us allocate.
pub const LARGEST: u64 = 64 << 40;

#[derive(Clone)]
enum State {
    /// The disk has not been asked.
    Unknown,
    Absent,
    Open(Arc<Files>),
}

/// An object of the cache, held: as long as this lives its file is open and not unlinked under a reader.
pub struct CachedObject {
    id: ObjectId,
    size: u64,
    state: RwLock<State>,
    /// Opening, creating and unlinking this one object's files, each a few system calls, take turns.
    /// Never taken by a read of an open object.
    lifecycle: Mutex<()>,
    shared: Arc<Shared>,
}

impl Drop for CachedObject {
    fn drop(&mut self) {
        self.shared.held.forget(&self.id);
    }
}

impl CachedObject {
    pub(super) fn new(id: ObjectId, size: u64, shared: Arc<Shared>) -> Self {
        Self {
            id,
            size,
            state: RwLock::new(State::Unknown),
            lifecycle: Mutex::new(()),
            shared,
        }
    }

    pub fn id(&self) -> ObjectId {
        self.id
    }

    pub fn size(&self) -> u64 {
        self.size
    }

    /// Copies `offset..offset + buf.len()` into `buf` if every block is present and sound; `Ok(false)` if
    /// any is absent (or was found damaged: then it is absent from now on). A disk that fails is a miss
    /// too, and is seen in the statistics.
    pub fn read(&self, offset: u64, buf: &mut [u8], purpose: Purpose) -> Result<bool, CacheError> {
        let end = offset
            .checked_add(buf.len() as u64)
            .filter(|end| *end <= self.size);
        let Some(end) = end else {
            return Err(CacheError::OutOfRange {
                offset,
                len: buf.len() as u64,
                size: self.size,
            });
        };
        if buf.is_empty() {
            return Ok(true);
        }
        let hit = match self.files() {
            Some(files) => self.read_open(&files, offset..end, buf, purpose),
            None => false,
        };
        if purpose == Purpose::Reader {
            self.shared.counters.read(hit);
        }
        Ok(hit)
    }

    fn read_open(&self, files: &Files, range: Range<u64>, buf: &mut [u8], purpose: Purpose) -> bool {
        let mut at = range.start;
        while at < range.end {
            let number = BlockNo::containing(at).extent();
            let part = at..range.end.min(number.byte_range(self.size).end);
            let extent = files.extent(number);
            if purpose == Purpose::Reader {
                self.report(extent, number);
            }
            let Some(_pin) = extent.pin() else {
                return false;
            };
            if !self.load(files, extent, number) {
                return false;
            }
            let wanted = mask(&part);
            if extent.present() & wanted != wanted {
                return false;
            }
            let doubtful = wanted & !extent.trusted();
            if doubtful != 0 && !bits(doubtful).all(|bit| self.check(files, extent, number, bit)) {
                return false;
            }
            let place = &mut buf[(part.start - range.start) as usize..(part.end - range.start) as usize];
            if let Err(error) = files.data.read_exact_at(place, part.start) {
                self.shared.trouble("reading a cached block", &error);
                if error.kind() == io::ErrorKind::UnexpectedEof {
                    // Somebody cut the file short.
                    bits(wanted).for_each(|bit| self.disown(files, extent, number, bit));
                }
                return false;
            }
            at = part.end;
        }
        true
    }

    /// The absent blocks among `blocks` (block numbers of this object).
    pub fn missing(&self, blocks: Range<u64>) -> Vec<BlockNo> {
        let blocks = blocks.start..blocks.end.min(block_count(self.size));
        let Some(files) = self.files() else {
            return blocks.map(BlockNo).collect();
        };
        let mut missing = Vec::new();
        let mut word = (u64::MAX, 0);
        for block in blocks.map(BlockNo) {
            let number = block.extent();
            if word.0 != number.0 {
                word = (number.0, self.present(&files, number));
            }
            if word.1 & bit(block) == 0 {
                missing.push(block);
            }
        }
        missing
    }

    /// Whether every block that covers `range` is present.
    pub fn presence(&self, range: &Range<u64>) -> bool {
        self.missing(blocks_covering(range)).is_empty()
    }

    pub fn is_complete(&self) -> bool {
        self.present_bytes() == self.size
    }

    pub fn present_bytes(&self) -> u64 {
        let Some(files) = self.files() else { return 0 };
        let extents = self.size.div_ceil(EXTENT_SIZE);
        let last = block_count(self.size).saturating_sub(1);
        (0..extents)
            .map(|number| {
                let present = self.present(&files, ExtentNo(number));
                let mut bytes = u64::from(present.count_ones()) * BLOCK_SIZE;
                if BlockNo(last).extent().0 == number && present & bit(BlockNo(last)) != 0 {
                    let range = BlockNo(last).byte_range(self.size);
                    bytes -= BLOCK_SIZE - (range.end - range.start);
                }
                bytes
            })
            .sum()
    }

    fn present(&self, files: &Files, number: ExtentNo) -> u64 {
        let extent = files.extent(number);
        match extent.pin() {
            Some(_pin) if self.load(files, extent, number) => extent.present(),
            _ => 0,
        }
    }

    fn extent_bytes(&self, number: ExtentNo) -> u64 {
        let range = number.byte_range(self.size);
        range.end - range.start
    }

    /// A reader had `range` from elsewhere, though it is here: no less a reference.
    pub fn was_read(&self, range: &Range<u64>) {
        let blocks = blocks_covering(range);
        let Some(files) = self.files().filter(|_| range.end <= self.size) else {
            return;
        };
        let extents = blocks.start / BLOCKS_PER_EXTENT..blocks.end.div_ceil(BLOCKS_PER_EXTENT);
        for number in extents.map(ExtentNo) {
            self.report(files.extent(number), number);
        }
    }

    /// Tells the policy, once per turn of its clock.
    fn report(&self, extent: &Extent, number: ExtentNo) {
        let now = self.shared.clock.load(Ordering::Relaxed);
        if extent.reported.load(Ordering::Relaxed) != now {
            extent.reported.store(now, Ordering::Relaxed);
            self.shared
                .referenced(Unit::extent(self.id, number), self.extent_bytes(number));
        }
    }

    /// Reads the extent's slots, the first time. False when the disk fails. The caller has it pinned.
    fn load(&self, files: &Files, extent: &Extent, number: ExtentNo) -> bool {
        if extent.loaded() {
            return true;
        }
        // One reader of this object at a time, once per extent: a later look must not bring back a
        // block that was found damaged meanwhile.
        let turn = files.loading.lock();
        if extent.loaded() {
            return true;
        }
        let words = match files.sidecar.slots(number, self.size) {
            Ok(words) => words,
            Err(error) => {
                self.shared.trouble("reading a sidecar", &error);
                return false;
            }
        };
        let (mut present, mut trusted) = (0, 0);
        for (index, word) in words.into_iter().enumerate().filter(|(_, word)| *word != ABSENT) {
            let block = BlockNo(number.0 * BLOCKS_PER_EXTENT + index as u64);
            if let Some(slot) = Slot::decode(&self.id, block, word) {
                present |= bit(block);
                if self.shared.config.verify == VerifyPolicy::EarlierBoot
                    && !self.shared.epochs.suspect(slot.epoch)
                {
                    trusted |= bit(block);
                }
            }
        }
        if files.sealed.is_set() && present != mask(&number.byte_range(self.size)) {
            // Sealed and incomplete cannot be: the sidecar is damaged, and the data is never rewritten.
            self.shared.counters.damaged();
            drop(turn);
            self.discard();
            return false;
        }
        extent.load(present, trusted);
        true
    }

    /// Compares a block with its checksum. False when it is damaged (absent from then on) or unreadable.
    fn check(&self, files: &Files, extent: &Extent, number: ExtentNo, index: u32) -> bool {
        let block = BlockNo(number.0 * BLOCKS_PER_EXTENT + u64::from(index));
        let range = block.byte_range(self.size);
        let mut bytes = vec![0; (range.end - range.start) as usize];
        let outcome = (|| {
            let word = files.sidecar.slots(number, self.size)?[index as usize];
            match files.data.read_exact_at(&mut bytes, range.start) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => Ok(None),
                Err(error) => Err(error),
                Ok(()) => Ok(Slot::decode(&self.id, block, word).filter(|slot| slot.sum == crc32c(&bytes))),
            }
        })();
        match outcome {
            Ok(Some(slot)) => {
                extent.trust(bit(block));
                if self.shared.epochs.suspect(slot.epoch) {
                    // It lies on the disk as it should: say so, or every later boot checks it again.
                    let writing = self.shared.epochs.write();
                    let slot = Slot {
                        epoch: writing.epoch,
                        ..slot
                    };
                    if let Err(error) =
                        files
                            .sidecar
                            .set_slot(&files.data, block, slot.encode(&self.id, block))
                    {
                        self.shared.trouble("renewing a sidecar", &error);
                    }
                }
                true
            }
            Ok(None) => {
                self.shared.counters.damaged();
                self.disown(files, extent, number, index);
                false
            }
            Err(error) => {
                self.shared.trouble("checking a block", &error);
                false
            }
        }
    }

    /// A block turned out damaged.
    fn disown(&self, files: &Files, extent: &Extent, number: ExtentNo, index: u32) {
        let block = BlockNo(number.0 * BLOCKS_PER_EXTENT + u64::from(index));
        tracing::warn!(object = %self.id, block = block.0, "a cached block is damaged and will be fetched again");
        extent.disown(bit(block));
        if files.sealed.is_set() {
            // Never rewritten: the whole object goes.
            self.discard();
        } else if let Err(error) = files.sidecar.set_slot(&files.data, block, ABSENT) {
            self.shared.trouble("clearing a sidecar", &error);
        }
    }

    /// The open files; `None` when nothing of this object is cached (or the disk fails).
    fn files(&self) -> Option<Arc<Files>> {
        match &*self.state.read() {
            State::Open(files) => return Some(files.clone()),
            State::Absent => return None,
            State::Unknown => {}
        }
        if self.size > LARGEST || self.shared.refuses() {
            return None;
        }
        let _turn = self.lifecycle.lock();
        let state = self.state.read().clone();
        match state {
            State::Open(files) => Some(files),
            State::Absent => None,
            State::Unknown => match self.open_existing() {
                Ok(Some(files)) => {
                    *self.state.write() = State::Open(files.clone());
                    Some(files)
                }
                Ok(None) => {
                    *self.state.write() = State::Absent;
                    None
                }
                Err(error) => {
                    self.shared.trouble("opening a cached object", &error);
                    None
                }
            },
        }
    }

    fn files_or_create(&self) -> Result<Arc<Files>, CacheError> {
        if let Some(files) = self.files() {
            return Ok(files);
        }
        let _turn = self.lifecycle.lock();
        if let State::Open(files) = &*self.state.read() {
            return Ok(files.clone());
        }
        let files = self
            .create()
            .map_err(|error| CacheError::io("creating a cached object", error))?;
        *self.state.write() = State::Open(files.clone());
        Ok(files)
    }

    fn open_existing(&self) -> io::Result<Option<Arc<Files>>> {
        let (data_path, sidecar_path) = self.shared.paths(&self.id);
        let Some(data) = disk::open_existing(&data_path)? else {
            return Ok(None);
        };
        let metadata = data.metadata()?;
        let found = match disk::open_existing(&sidecar_path)? {
            Some(file) => {
                let mut header = [0; HEADER_LEN];
                let whole = file.metadata()?.len() == sidecar::file_len(self.size);
                let header = if whole && file.read_exact_at(&mut header, 0).is_ok() {
                    Header::decode(&self.id, &header)
                } else {
                    None
                };
                header.map(|header| (header, Sidecar::File(file)))
            }
            None => disk::attribute(&data, sidecar::ATTRIBUTE_MOST)?
                .filter(|value| value.len() as u64 == sidecar::file_len(self.size))
                .and_then(|value| {
                    Some((
                        Header::decode(&self.id, &value)?,
                        Sidecar::Attribute(Mutex::new(value)),
                    ))
                }),
        };
        match found {
            Some((header, sidecar))
                if header.size == self.size
                    && header.inode == metadata.ino()
                    && metadata.len() == self.size =>
            {
                let files = self.wrap(data, sidecar, header);
                if self.shared.scan.lock().meets(&self.id) {
                    self.shared.counters.objects.fetch_add(1, Ordering::Relaxed);
                    files.count();
                } else {
                    // The scan has counted it already, as it was then.
                    files.is_counted(self.shared.counted(&files.data, &files.sidecar)?);
                }
                Ok(Some(files))
            }
            found => {
                // A kill while it was made leaves a file without a header and without content.
                if found.is_some() || metadata.blocks() > 0 {
                    tracing::warn!(object = %self.id, "a cached object's sidecar is damaged: its blocks will be fetched again");
                    self.shared.counters.damaged();
                }
                let counted = !self.shared.scan.lock().meets(&self.id);
                disk::unlink(&sidecar_path)?;
                disk::unlink(&data_path)?;
                if counted {
                    self.shared.space.give_back(metadata.blocks() * 512);
                    self.shared.unlinked(&self.id);
                }
                Ok(None)
            }
        }
    }

    fn create(&self) -> io::Result<Arc<Files>> {
        let (data_path, sidecar_path) = self.shared.paths(&self.id);
        disk::unlink(&sidecar_path)?;
        disk::unlink(&data_path)?;
        let data = disk::create(&data_path, self.size)?;
        let header = Header {
            size: self.size,
            inode: data.metadata()?.ino(),
            sealed: false,
        };
        let sidecar = if self.size <= EXTENT_SIZE && self.shared.abilities.attributes {
            let mut value = header.encode(&self.id).to_vec();
            value.resize(sidecar::file_len(self.size) as usize, 0);
            disk::set_attribute(&data, &value)?;
            Sidecar::Attribute(Mutex::new(value))
        } else {
            let file = disk::create(&sidecar_path, sidecar::file_len(self.size))?;
            disk::write_at(&file, &header.encode(&self.id), 0)?;
            Sidecar::File(file)
        };
        self.shared.scan.lock().meets(&self.id);
        self.shared.counters.objects.fetch_add(1, Ordering::Relaxed);
        let files = self.wrap(data, sidecar, header);
        files.count();
        Ok(files)
    }

    fn wrap(&self, data: File, sidecar: Sidecar, header: Header) -> Arc<Files> {
        Arc::new(Files::new(
            self.id,
            self.size,
            data,
            sidecar,
            header,
            &self.shared,
        ))
    }

    /// Complete and verified? Then from here on never modified again, in this run or a later one, and
    /// safe to hand to the kernel: a descriptor that can only read. `None`: not now.
    pub fn seal(&self) -> Option<Arc<File>> {
        let files = self.files()?;
        if self.size == 0 {
            return None;
        }
        for number in (0..self.size.div_ceil(EXTENT_SIZE)).map(ExtentNo) {
            let extent = files.extent(number);
            let _pin = extent.pin()?;
            let whole = mask(&number.byte_range(self.size));
            if !self.load(&files, extent, number) || extent.present() & whole != whole {
                return None;
            }
            let doubtful = whole & !extent.trusted();
            if !bits(doubtful).all(|bit| self.check(&files, extent, number, bit)) {
                return None;
            }
        }
        // Against eviction, which takes extents without the lifecycle lock, unless sealed: so the mark
        // is set first and presence looked at again.
        let _turn = self.lifecycle.lock();
        if files.unlinked.load(Ordering::Acquire) {
            return None;
        }
        if !files.sealed.set() {
            let complete = (0..self.size.div_ceil(EXTENT_SIZE))
                .map(ExtentNo)
                .all(|number| files.extent(number).stands(mask(&number.byte_range(self.size))));
            let header = Header {
                size: self.size,
                inode: files.inode,
                sealed: true,
            };
            let recorded = complete
                && match files
                    .sidecar
                    .set_header(&files.data, &self.id, header)
                    .and_then(|()| files.sidecar.sync(&files.data))
                {
                    Ok(()) => true,
                    Err(error) => {
                        self.shared.trouble("sealing an object", &error);
                        false
                    }
                };
            if !recorded {
                // Nothing was handed out; but if the header was written, it may stand on the disk:
                // it then says less than the truth allows, which is harmless.
                files.sealed.withdraw();
                return None;
            }
            self.shared.sealed(self.id, self.size);
        }
        let handed = self.shared.handed.get_or_open(self.id, files.inode, || {
            let (path, _) = self.shared.paths(&self.id);
            File::open(path)
        });
        match handed {
            // Somebody may have put another file in its place.
            Ok(file)
                if file
                    .metadata()
                    .is_ok_and(|found| found.ino() == files.inode && found.len() == self.size) =>
            {
                self.shared.referenced(Unit::object(self.id), self.size);
                Some(file)
            }
            Ok(_) => None,
            Err(error) => {
                self.shared.trouble("opening a sealed object", &error);
                None
            }
        }
    }

    pub fn sealed(&self) -> bool {
        self.files().is_some_and(|files| files.sealed.is_set())
    }

    /// Checks every present block against its checksum; (checked, damaged).
    pub(super) fn scrub(&self) -> (u64, u64) {
        let Some(files) = self.files() else {
            return (0, 0);
        };
        let (mut checked, mut damaged) = (0, 0);
        for number in (0..self.size.div_ceil(EXTENT_SIZE)).map(ExtentNo) {
            let extent = files.extent(number);
            let Some(_pin) = extent.pin() else { continue };
            if !self.load(&files, extent, number) {
                continue;
            }
            for bit in bits(extent.present()) {
                checked += 1;
                damaged += u64::from(!self.check(&files, extent, number, bit));
            }
        }
        (checked, damaged)
    }
}

/// The bits of the blocks that cover a range within one extent.
fn mask(range: &Range<u64>) -> u64 {
    let blocks = blocks_covering(range);
    let count = blocks.end - blocks.start;
    let ones = if count >= BLOCKS_PER_EXTENT {
        u64::MAX
    } else {
        (1 << count) - 1
    };
    ones << (blocks.start % BLOCKS_PER_EXTENT)
}

fn bit(block: BlockNo) -> u64 {
    1 << (block.0 % BLOCKS_PER_EXTENT)
}

fn bits(mut word: u64) -> impl Iterator<Item = u32> {
    std::iter::from_fn(move || {
        let bit = word.trailing_zeros();
        word &= word.wrapping_sub(1);
        (bit < u64::BITS).then_some(bit)
    })
}
