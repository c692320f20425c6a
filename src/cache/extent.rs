//! Who may use one extent, and which of its blocks are there.
//!
//! Owns the protocol between readers, fillers, sealing and eviction, and no file. One word, the *gate*,
//! decides: readers and fillers pin the extent by adding one; eviction takes it only when nobody has it
//! pinned, and whoever comes meanwhile finds the extent absent. Nobody ever waits for a gate.
//!
//! `tests/cache_races.rs` compiles this file against a model checker: it may name [`super::sync`] only.

use super::sync::{AtomicBool, AtomicU32, AtomicU64, Ordering};

const EVICTING: u32 = 1 << 31;

#[derive(Default)]
pub struct Extent {
    /// One bit per block: its slot is sound.
    present: AtomicU64,
    /// One bit per block: it may be served without looking at its checksum.
    trusted: AtomicU64,
    /// One bit per block: somebody writes it.
    writing: AtomicU64,
    gate: AtomicU32,
    /// The policy's clock when this extent was last reported to it.
    pub reported: AtomicU32,
    /// The sidecar has been read into `present`.
    loaded: AtomicBool,
}

/// While this lives the extent is not evicted.
pub struct Pin<'a>(&'a Extent);

impl Drop for Pin<'_> {
    fn drop(&mut self) {
        self.0.gate.fetch_sub(1, Ordering::Release);
    }
}

/// While this lives nobody else writes these blocks.
pub struct Claim<'a> {
    extent: &'a Extent,
    pub blocks: u64,
}

impl Drop for Claim<'_> {
    fn drop(&mut self) {
        self.extent.writing.fetch_and(!self.blocks, Ordering::SeqCst);
    }
}

/// While this lives nobody else reads or fills the extent: for eviction.
pub struct Taken<'a>(&'a Extent);

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        self.0.gate.fetch_and(!EVICTING, Ordering::SeqCst);
    }
}

impl Taken<'_> {
    /// No block is there any more. Before its slot is cleared and its hole punched.
    pub fn clear(&self) {
        self.0.present.store(0, Ordering::Release);
        self.0.trusted.store(0, Ordering::Release);
    }
}

impl Extent {
    pub fn pin(&self) -> Option<Pin<'_>> {
        let before = self.gate.fetch_add(1, Ordering::Acquire);
        let pin = Pin(self);
        (before & EVICTING == 0).then_some(pin)
    }

    /// For eviction: only while nobody has the extent pinned, and never when it is sealed.
    pub fn take(&self, seal: &Seal) -> Option<Taken<'_>> {
        self.gate
            .compare_exchange(0, EVICTING, Ordering::SeqCst, Ordering::SeqCst)
            .ok()?;
        let taken = Taken(self);
        // Sealing marks first and then looks at every gate; here it is the other way round.
        (!seal.is_set()).then_some(taken)
    }

    pub fn loaded(&self) -> bool {
        self.loaded.load(Ordering::Acquire)
    }

    /// What the sidecar says. The caller is the only one who loads, and has it pinned.
    pub fn load(&self, present: u64, trusted: u64) {
        self.trusted.store(trusted, Ordering::Release);
        self.present.store(present, Ordering::Release);
        self.loaded.store(true, Ordering::Release);
    }

    pub fn present(&self) -> u64 {
        self.present.load(Ordering::Acquire)
    }

    pub fn trusted(&self) -> u64 {
        self.trusted.load(Ordering::Acquire)
    }

    /// These blocks have been compared with their checksums.
    pub fn trust(&self, blocks: u64) {
        self.trusted.fetch_or(blocks, Ordering::AcqRel);
    }

    /// Those of the blocks that are absent and that nobody writes yet, for writing. The caller has it pinned.
    pub fn claim(&self, blocks: u64) -> Claim<'_> {
        let before = self.writing.fetch_or(blocks, Ordering::SeqCst);
        let mut claim = Claim {
            extent: self,
            blocks: blocks & !before,
        };
        // After the claim: whoever wrote one before has published it by now.
        let there = claim.blocks & self.present();
        self.writing.fetch_and(!there, Ordering::SeqCst);
        claim.blocks &= !there;
        claim
    }

    /// These blocks have been written, slots included; what was present before. The caller has it pinned.
    pub fn publish(&self, blocks: u64) -> u64 {
        self.trust(blocks);
        self.present.fetch_or(blocks, Ordering::AcqRel)
    }

    /// These blocks turned out damaged.
    pub fn disown(&self, blocks: u64) {
        self.present.fetch_and(!blocks, Ordering::AcqRel);
        self.trusted.fetch_and(!blocks, Ordering::AcqRel);
    }

    /// For sealing, after its mark: complete, and in nobody's hands who might evict it.
    pub fn stands(&self, whole: u64) -> bool {
        let pin = self.pin();
        pin.is_some() && self.present() & whole == whole
    }
}

/// Whether an object is complete and never changes again.
pub struct Seal(AtomicBool);

impl Seal {
    pub fn new(set: bool) -> Self {
        Self(AtomicBool::new(set))
    }

    pub fn is_set(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }

    /// True when it was set already. Whoever sets it must look at every extent again
    /// ([`Extent::stands`]), and [`Seal::withdraw`] if one does not stand.
    pub fn set(&self) -> bool {
        self.0.swap(true, Ordering::SeqCst)
    }

    /// Only before anything was handed out.
    pub fn withdraw(&self) {
        self.0.store(false, Ordering::SeqCst);
    }
}
