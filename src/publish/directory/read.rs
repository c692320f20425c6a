//! Reading what was planned: small files into memory, large ones straight into the store.

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use tokio::task::spawn_blocking;

use super::{BATCH_BYTES, BATCH_ENTRIES};
use crate::{
    digest::Digest,
    publish::{
        Progress, PublishError,
        bundle::LARGE_FILE,
        content::{Hashed, Stamp, hash, read_small},
        previous::{Kept, Previous, Usage},
        spool::{Plan, Planned, SpoolReader},
        upload::{FileUpload, Uploader},
        walk::local_path,
    },
    tree::RowNo,
};

/// A large file that changes between hashing and uploading is hashed again this often.
const UPLOAD_ATTEMPTS: usize = 2;

/// Cuts the spool into what one task reads at a time.
pub(super) struct Batches {
    spool: SpoolReader,
    waiting: Option<Planned>,
}

impl Batches {
    pub fn new(spool: SpoolReader) -> Self {
        Self { spool, waiting: None }
    }

    /// A large file comes alone, so that nothing waits in memory while it is uploaded.
    pub fn next(&mut self) -> std::io::Result<Vec<Planned>> {
        let (mut batch, mut bytes) = (Vec::new(), 0);
        while batch.len() < BATCH_ENTRIES {
            let next = match self.waiting.take() {
                Some(waiting) => waiting,
                None => match self.spool.next()? {
                    Some(next) => next,
                    None => break,
                },
            };
            // Unchanged files weigh as well: theirs may have to be read to be bundled anew.
            let weight = match next.plan {
                Plan::Read | Plan::Unchanged(_) => next.stamp.size,
                Plan::Directory | Plan::Symlink { .. } => 0,
            };
            if !batch.is_empty() && bytes + weight > BATCH_BYTES {
                self.waiting = Some(next);
                break;
            }
            bytes += weight;
            batch.push(next);
        }
        Ok(batch)
    }
}

/// An entry whose bytes, if it has any, were read (small) or are in the store (large).
pub(super) struct Ready {
    pub path: Vec<u8>,
    pub stamp: Stamp,
    pub bytes: ReadyBytes,
}

pub(super) enum ReadyBytes {
    Directory,
    Symlink {
        target: Vec<u8>,
    },
    Empty,
    /// The previous version has them. `unchanged`: under the same path, too.
    Kept {
        kept: Kept,
        unchanged: bool,
    },
    Small {
        bytes: Vec<u8>,
        digest: Digest,
    },
    Large(Hashed),
}

enum Read {
    Ready(Ready),
    /// Too large to be read into memory (or has grown to be): for `upload_large`.
    Large {
        path: Vec<u8>,
    },
}

/// What the reading tasks share.
pub(super) struct Source {
    pub root: PathBuf,
    pub previous: Option<Arc<Previous>>,
    pub usage: Usage,
    pub uploader: Uploader,
    pub progress: Arc<dyn Progress>,
}

impl Source {
    pub async fn read(self: Arc<Self>, batch: Vec<Planned>) -> Result<Vec<Ready>, PublishError> {
        let source = self.clone();
        let batch = spawn_blocking(move || {
            batch
                .into_iter()
                .map(|planned| source.read_one(planned))
                .collect::<Result<Vec<_>, _>>()
        })
        .await??;
        let mut all = Vec::with_capacity(batch.len());
        for read in batch {
            all.push(match read {
                Read::Ready(ready) => ready,
                Read::Large { path } => self.clone().upload_large(path).await?,
            });
        }
        Ok(all)
    }

    fn read_one(&self, planned: Planned) -> Result<Read, PublishError> {
        let Planned { path, stamp, plan } = planned;
        let bytes = match plan {
            Plan::Directory => ReadyBytes::Directory,
            Plan::Symlink { target } => ReadyBytes::Symlink { target },
            Plan::Unchanged(row) => match self.kept(row)? {
                Some(kept) => ReadyBytes::Kept {
                    kept,
                    unchanged: true,
                },
                None => return self.read_file(path, stamp),
            },
            Plan::Read => return self.read_file(path, stamp),
        };
        Ok(Read::Ready(Ready { path, stamp, bytes }))
    }

    /// `None` if the object that holds this row's bytes is bundled anew.
    fn kept(&self, row: RowNo) -> Result<Option<Kept>, PublishError> {
        let Some(previous) = &self.previous else {
            return Ok(None);
        };
        Ok(previous
            .kept(row)?
            .filter(|kept| self.usage.keeps(kept.content.object)))
    }

    fn read_file(&self, path: Vec<u8>, stamp: Stamp) -> Result<Read, PublishError> {
        if stamp.size >= LARGE_FILE {
            return Ok(Read::Large { path });
        }
        let (stamp, bytes) = read_small(&local_path(&self.root, &path), LARGE_FILE)?;
        let Some(bytes) = bytes else {
            return Ok(Read::Large { path });
        };
        let bytes = if bytes.is_empty() {
            ReadyBytes::Empty
        } else {
            let digest = Digest::of(&bytes);
            match self.find_digest(&digest)? {
                Some(kept) => ReadyBytes::Kept {
                    kept,
                    unchanged: false,
                },
                None => ReadyBytes::Small { bytes, digest },
            }
        };
        Ok(Read::Ready(Ready { path, stamp, bytes }))
    }

    fn find_digest(&self, digest: &Digest) -> Result<Option<Kept>, PublishError> {
        match &self.previous {
            Some(previous) => previous.find_digest(digest, &self.usage),
            None => Ok(None),
        }
    }

    async fn upload_large(self: Arc<Self>, path: Vec<u8>) -> Result<Ready, PublishError> {
        let local = local_path(&self.root, &path);
        let settled = Arc::new(AtomicU64::new(0));
        for _ in 0..UPLOAD_ATTEMPTS {
            let (source, to_hash) = (self.clone(), local.clone());
            let (stamp, hashed, kept) = spawn_blocking(move || {
                let (stamp, hashed) = hash(&to_hash)?;
                let kept = source.find_digest(&hashed.digest)?;
                Ok::<_, PublishError>((stamp, hashed, kept))
            })
            .await??;
            if stamp.size == 0 {
                return Ok(Ready {
                    path,
                    stamp,
                    bytes: ReadyBytes::Empty,
                });
            }
            if let Some(kept) = kept {
                let bytes = ReadyBytes::Kept {
                    kept,
                    unchanged: false,
                };
                return Ok(Ready { path, stamp, bytes });
            }
            let upload = self
                .uploader
                .file(&local, stamp.size, hashed.digest, &settled)
                .await?;
            if upload == FileUpload::Done {
                // What was there already was not told of on the way.
                let told = settled.load(Ordering::Relaxed);
                self.progress.settled(0, stamp.size.saturating_sub(told));
                return Ok(Ready {
                    path,
                    stamp,
                    bytes: ReadyBytes::Large(hashed),
                });
            }
        }
        Err(PublishError::Changed { path: local })
    }
}
