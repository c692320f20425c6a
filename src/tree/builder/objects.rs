//! The object table while it is built: rows, keys, digests and sums go straight to scratch files.

use std::path::Path;

use zerocopy::IntoBytes;

use super::scratch::Scratch;
use crate::{
    block::block_count,
    digest::BlockSum,
    pin::Pin,
    tree::{
        Object, ObjectNo, TreeError,
        format::{self, ObjectRow},
    },
};

pub(super) struct ObjectTable {
    pub rows: Scratch,
    pub keys: Scratch,
    pub digests: Scratch,
    pub sums: Scratch,
    /// Digests of the frames of `sums`, but for the last, short one.
    pub frames: Scratch,
    pub sums_hasher: blake3::Hasher,
    frame_hasher: blake3::Hasher,
    pub sum_count: u64,
    /// Whether objects come with sums; decided by the first that has any blocks.
    pub has_sums: Option<bool>,
    /// The size of every object, to check that files lie within: 8 bytes an object, the only thing
    /// here that grows in memory.
    sizes: Vec<u64>,
}

impl ObjectTable {
    pub fn create(dir: &Path) -> Result<Self, TreeError> {
        let scratch = |name| Scratch::create(dir, name);
        Ok(Self {
            rows: scratch("objects")?,
            keys: scratch("keys")?,
            digests: scratch("object-digests")?,
            sums: scratch("sums")?,
            frames: scratch("frames")?,
            sums_hasher: blake3::Hasher::new(),
            frame_hasher: blake3::Hasher::new(),
            sum_count: 0,
            has_sums: None,
            sizes: Vec::new(),
        })
    }

    pub fn add(&mut self, object: &Object, sums: Option<&[BlockSum]>) -> Result<ObjectNo, TreeError> {
        let bad = |why| TreeError::BadObject {
            key: object.key.clone(),
            why,
        };
        let number = self.sizes.len() as u32;
        if number == format::NO_OBJECT {
            return Err(TreeError::TooMany {
                what: "objects",
                limit: format::NO_OBJECT.into(),
            });
        }
        let blocks = block_count(object.size);
        if sums.is_some_and(|sums| sums.len() as u64 != blocks) {
            return Err(bad("it does not have one sum for each block"));
        }
        // An object without blocks fits either kind of tree.
        if blocks > 0 && *self.has_sums.get_or_insert(sums.is_some()) != sums.is_some() {
            return Err(bad("either every object of a tree has sums, or none"));
        }
        let (pin_kind, pin) = match &object.pin {
            Pin::Content => (format::PIN_CONTENT, ""),
            Pin::ETag(etag) => (format::PIN_ETAG, etag.as_str()),
            Pin::VersionId(version) => (format::PIN_VERSION_ID, version.as_str()),
        };
        let key_len = u32::try_from(object.key.len()).map_err(|_| bad("its key is too long"))?;
        let pin_len = u16::try_from(pin.len()).map_err(|_| bad("its ETag or version id is too long"))?;
        let row = ObjectRow {
            key_offset: self.keys.len().into(),
            key_len: key_len.into(),
            pin_len: pin_len.into(),
            pin_kind,
            has_digest: object.digest.is_some().into(),
            size: object.size.into(),
            first_sum: if sums.is_some() {
                self.sum_count.into()
            } else {
                0.into()
            },
        };
        self.rows.write(row.as_bytes())?;
        self.keys.write(object.key.as_bytes())?;
        self.keys.write(pin.as_bytes())?;
        if let Some(digest) = &object.digest {
            // The table is only written once there is a digest to put into it.
            self.pad_digests(number)?;
            self.digests.write(digest.as_bytes())?;
        }
        for sum in sums.unwrap_or_default() {
            self.add_sum(sum)?;
        }
        self.sizes.push(object.size);
        Ok(ObjectNo(number))
    }

    fn add_sum(&mut self, sum: &BlockSum) -> Result<(), TreeError> {
        self.sums.write(sum.as_bytes())?;
        self.sums_hasher.update(sum.as_bytes());
        self.frame_hasher.update(sum.as_bytes());
        self.sum_count += 1;
        if self.sum_count.is_multiple_of(format::SUMS_PER_FRAME) {
            self.end_frame()?;
        }
        Ok(())
    }

    fn end_frame(&mut self) -> Result<(), TreeError> {
        self.frames.write(self.frame_hasher.finalize().as_bytes())?;
        self.frame_hasher.reset();
        Ok(())
    }

    /// Zeros for the objects before `number` that have no digest.
    fn pad_digests(&mut self, number: u32) -> Result<(), TreeError> {
        while self.digests.len() < u64::from(number) * format::DIGEST_LEN as u64 {
            self.digests.write(&[0; format::DIGEST_LEN])?;
        }
        Ok(())
    }

    /// Completes the last frame and the table of digests. Nothing is added afterwards.
    pub fn end(&mut self) -> Result<(), TreeError> {
        if self.digests.len() > 0 {
            self.pad_digests(self.count())?;
        }
        if !self.sum_count.is_multiple_of(format::SUMS_PER_FRAME) {
            self.end_frame()?;
        }
        Ok(())
    }

    pub fn count(&self) -> u32 {
        // `add` refuses the object that would not fit.
        self.sizes.len() as u32
    }

    pub fn size(&self, object: ObjectNo) -> Option<u64> {
        self.sizes.get(object.0 as usize).copied()
    }
}
