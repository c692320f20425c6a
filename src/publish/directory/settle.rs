//! Giving each file its place in an object, and filling bundles.

use std::{collections::HashMap, sync::Arc};

use tokio::task::{JoinSet, spawn_blocking};

use super::read::{Ready, ReadyBytes, Source};
use crate::{
    digest::Digest,
    origin::Pin,
    publish::{
        PublishError, Report,
        assemble::{Assembler, ObjectId, Place, Row, RowKind},
        bundle::Bundle,
        content::Hashed,
        upload::object_key,
    },
    tree::{Object, ObjectNo},
};

/// Bundles on their way to the store, each in memory.
const BUNDLES_IN_FLIGHT: usize = 3;
/// Digests remembered to find files of the same bytes: what comes later is stored again.
const MAX_PLACES: usize = 2_000_000;

/// Puts each file in its place, in directory order: the one place where bundles are filled.
pub(super) struct Settle<'report> {
    source: Arc<Source>,
    assembler: Assembler,
    report: &'report mut Report,
    next_object: u32,
    /// Objects of the previous version that the new one has taken over.
    kept: HashMap<ObjectNo, ObjectId>,
    places: HashMap<Digest, Place>,
    bundle: Bundle,
    bundle_id: ObjectId,
    /// Rows that refer to the bundle being filled: it has no digest yet.
    pending: Vec<Row>,
    uploads: JoinSet<Result<(), PublishError>>,
}

impl<'report> Settle<'report> {
    pub fn new(source: Arc<Source>, assembler: Assembler, report: &'report mut Report) -> Self {
        Self {
            source,
            assembler,
            report,
            next_object: 1,
            kept: HashMap::new(),
            places: HashMap::new(),
            bundle: Bundle::new(),
            bundle_id: ObjectId(0),
            pending: Vec::new(),
            uploads: JoinSet::new(),
        }
    }

    fn new_object(&mut self) -> ObjectId {
        let id = ObjectId(self.next_object);
        self.next_object += 1;
        id
    }

    pub async fn file(&mut self, ready: Ready) -> Result<(), PublishError> {
        let Ready { path, stamp, bytes } = ready;
        let size = stamp.size;
        let row = |kind| Row {
            path,
            mode: stamp.mode,
            modified: stamp.modified,
            kind,
        };
        let (place, digest) = match bytes {
            ReadyBytes::Directory => return self.assembler.row(row(RowKind::Directory)).await,
            ReadyBytes::Symlink { target } => {
                return self.assembler.row(row(RowKind::Symlink { target })).await;
            }
            ReadyBytes::Empty => {
                self.source.progress.settled(1, 0);
                let kind = RowKind::File {
                    size: 0,
                    place: None,
                    digest: Digest::of(b""),
                };
                return self.assembler.row(row(kind)).await;
            }
            ReadyBytes::Kept { kept, unchanged } => {
                if unchanged {
                    self.report.unchanged_files += 1;
                    self.report.unchanged_bytes += size;
                } else {
                    self.report.duplicate_files += 1;
                    self.report.duplicate_bytes += size;
                }
                self.source.progress.settled(1, size);
                let object = self.kept_object(kept.content.object).await?;
                (
                    Place {
                        object,
                        offset: kept.content.offset,
                    },
                    kept.digest,
                )
            }
            ReadyBytes::Small { bytes, digest } => {
                self.source.progress.settled(1, size);
                (self.place_small(&bytes, digest).await?, digest)
            }
            ReadyBytes::Large(Hashed { digest, sums }) => {
                // Its bytes were told of while they were uploaded.
                self.source.progress.settled(1, 0);
                let place = match self.places.get(&digest) {
                    Some(place) => self.duplicate(*place, size),
                    None => {
                        let object = self.new_object();
                        self.assembler
                            .object(object, published(&digest, size), sums)
                            .await?;
                        self.remember(digest, Place { object, offset: 0 })
                    }
                };
                (place, digest)
            }
        };
        let row = row(RowKind::File {
            size,
            place: Some(place),
            digest,
        });
        if place.object == self.bundle_id {
            self.pending.push(row);
            return Ok(());
        }
        self.assembler.row(row).await
    }

    fn duplicate(&mut self, place: Place, size: u64) -> Place {
        self.report.duplicate_files += 1;
        self.report.duplicate_bytes += size;
        place
    }

    fn remember(&mut self, digest: Digest, place: Place) -> Place {
        if self.places.len() < MAX_PLACES {
            self.places.insert(digest, place);
        }
        place
    }

    async fn kept_object(&mut self, object: ObjectNo) -> Result<ObjectId, PublishError> {
        if let Some(id) = self.kept.get(&object) {
            return Ok(*id);
        }
        let id = self.new_object();
        self.assembler.kept(id, object).await?;
        self.kept.insert(object, id);
        Ok(id)
    }

    async fn place_small(&mut self, bytes: &[u8], digest: Digest) -> Result<Place, PublishError> {
        if let Some(place) = self.places.get(&digest) {
            return Ok(self.duplicate(*place, bytes.len() as u64));
        }
        if !self.bundle.has_room_for(bytes.len()) {
            self.seal().await?;
        }
        let place = Place {
            object: self.bundle_id,
            offset: self.bundle.push(bytes),
        };
        Ok(self.remember(digest, place))
    }

    async fn seal(&mut self) -> Result<(), PublishError> {
        while self.uploads.len() >= BUNDLES_IN_FLIGHT {
            self.join_upload().await?;
        }
        let id = self.new_object();
        let id = std::mem::replace(&mut self.bundle_id, id);
        let bundle = std::mem::replace(&mut self.bundle, Bundle::new());
        let sealed = spawn_blocking(move || bundle.seal()).await?;
        let object = published(&sealed.digest, sealed.bytes.len() as u64);
        self.assembler.object(id, object, sealed.sums.clone()).await?;
        for row in self.pending.drain(..) {
            self.assembler.row(row).await?;
        }
        let source = self.source.clone();
        self.uploads
            .spawn(async move { source.uploader.bundle(sealed).await });
        Ok(())
    }

    async fn join_upload(&mut self) -> Result<(), PublishError> {
        match self.uploads.join_next().await {
            Some(result) => result?,
            None => Ok(()),
        }
    }

    /// Waits until every object is in the store.
    pub async fn finish(mut self) -> Result<Assembler, PublishError> {
        if !self.bundle.is_empty() {
            self.seal().await?;
        }
        while !self.uploads.is_empty() {
            self.join_upload().await?;
        }
        Ok(self.assembler)
    }
}

fn published(digest: &Digest, size: u64) -> Object {
    Object {
        key: object_key(digest),
        size,
        pin: Pin::Content,
        digest: Some(*digest),
    }
}
