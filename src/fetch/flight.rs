//! One request: a run of adjacent blocks, cut up as its bytes arrive.

use std::{
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Bytes, BytesMut};
use futures::TryStreamExt;
use rand::RngExt;
use tokio::sync::{OwnedSemaphorePermit, watch};

use super::{Block, FetchError, FetchObject, Fetcher, Priority};
use crate::{
    block::{BLOCKS_PER_EXTENT, BlockNo},
    digest::BlockSum,
};

/// Tries of one request before it fails, and the first pause between them (doubled each time).
const TRIES: u32 = 6;
const FIRST_PAUSE: Duration = Duration::from_millis(50);
/// A block that does not match its sum is fetched once more.
const DAMAGE_TRIES: u32 = 2;

/// Adjacent blocks that are fetched together, at most an extent of them.
pub struct Run {
    first: u64,
    senders: Vec<watch::Sender<Block>>,
    memory: Option<OwnedSemaphorePermit>,
    /// Blocks that have arrived.
    done: usize,
}

impl Run {
    pub fn new(first: u64, sender: watch::Sender<Block>, memory: Option<OwnedSemaphorePermit>) -> Self {
        Self { first, senders: vec![sender], memory, done: 0 }
    }

    /// Adjacent, and still in one extent.
    pub fn takes(&self, number: u64) -> bool {
        number == self.first + self.senders.len() as u64
            && number / BLOCKS_PER_EXTENT == self.first / BLOCKS_PER_EXTENT
    }

    pub fn push(&mut self, sender: watch::Sender<Block>, memory: Option<OwnedSemaphorePermit>) {
        self.senders.push(sender);
        match (&mut self.memory, memory) {
            (Some(held), Some(more)) => held.merge(more),
            (held @ None, more) => *held = more,
            (Some(_), None) => {}
        }
    }

    /// Fetches, retries, and tells every waiter how it went.
    pub async fn fly(mut self, fetcher: Arc<Fetcher>, object: Arc<FetchObject>, priority: Priority) {
        let give_up_at = fetcher.give_up_at();
        let mut tries = 0;
        let mut damaged = 0;
        let error = loop {
            let attempt = tokio::time::timeout_at(give_up_at.into(), self.attempt(&fetcher, &object, priority));
            let error = match attempt.await {
                Ok(Ok(())) => return,
                Ok(Err(error)) => error,
                Err(_) => {
                    let after = fetcher.config.read_deadline;
                    break FetchError::Deadline { key: object.source.key.clone(), after };
                }
            };
            tries += 1;
            let again = match &error {
                FetchError::Damaged { .. } => {
                    damaged += 1;
                    damaged < DAMAGE_TRIES
                }
                FetchError::Origin(error) => tries < TRIES && error.is_retryable(),
                _ => false,
            };
            let pause = FIRST_PAUSE * 2u32.pow(tries.min(8)) / 2;
            let pause = pause.mul_f64(rand::rng().random_range(0.5..1.5));
            if !again || Instant::now() + pause >= give_up_at {
                break error;
            }
            tracing::debug!(key = object.source.key, %error, "trying again");
            fetcher.tally.retries.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
            tokio::time::sleep(pause).await;
        };
        let mut flights = object.flights.lock();
        for (at, sender) in self.senders.iter().enumerate().skip(self.done) {
            flights.remove(&(self.first + at as u64));
            sender.send_replace(Block::Failed(error.clone()));
        }
    }

    /// One request for what has not arrived yet.
    async fn attempt(
        &mut self,
        fetcher: &Arc<Fetcher>,
        object: &Arc<FetchObject>,
        priority: Priority,
    ) -> Result<(), FetchError> {
        let ended = |_| FetchError::Ended;
        // Memory before a connection: who has a connection never waits for memory.
        let left = u32::try_from(self.senders.len() - self.done).unwrap_or(u32::MAX);
        let _memory = match priority {
            Priority::Waited => Some(fetcher.memory.acquire_many(left).await.map_err(ended)?),
            // Held since the claim.
            Priority::Readahead => None,
        };
        let _background = match priority {
            Priority::Waited => None,
            Priority::Readahead => Some(fetcher.background.acquire().await.map_err(ended)?),
        };
        let _connection = fetcher.connections.acquire().await.map_err(ended)?;

        let source = &object.source;
        let first = self.first + self.done as u64;
        let end = self.first + self.senders.len() as u64;
        let range = BlockNo(first).byte_range(source.size).start..BlockNo(end - 1).byte_range(source.size).end;
        fetcher.tally.gets.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let request = source.store.get_range(&source.key, &source.pin, range);
        // Sums travel beside the data, not before it.
        let (stream, sums) = tokio::join!(request, async {
            match &source.sums {
                Some(sums) => sums.sums(first..end).await.map(Some),
                None => Ok(None),
            }
        });
        let (mut stream, sums) = (stream?, sums?);
        let mut block = BytesMut::new();
        while let Some(mut chunk) = stream.try_next().await? {
            fetcher.took(chunk.len());
            while !chunk.is_empty() {
                let number = self.first + self.done as u64;
                if number >= end {
                    // The origin room gives exactly the range asked for.
                    return Ok(());
                }
                let bytes = BlockNo(number).byte_range(source.size);
                let size = (bytes.end - bytes.start) as usize;
                let taken = chunk.split_to(chunk.len().min(size - block.len()));
                if block.is_empty() && taken.len() == size {
                    // Copied all the same: a slice would keep the whole network buffer alive.
                    self.arrived(fetcher, object, number, first, &sums, Bytes::copy_from_slice(&taken), priority)?;
                    continue;
                }
                block.extend_from_slice(&taken);
                if block.len() == size {
                    let bytes = std::mem::take(&mut block).freeze();
                    self.arrived(fetcher, object, number, first, &sums, bytes, priority)?;
                }
            }
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "one call site per way a block becomes whole")]
    fn arrived(
        &mut self,
        fetcher: &Arc<Fetcher>,
        object: &Arc<FetchObject>,
        number: u64,
        first: u64,
        sums: &Option<Vec<BlockSum>>,
        bytes: Bytes,
        priority: Priority,
    ) -> Result<(), FetchError> {
        if let Some(sums) = sums {
            let expected = sums.get((number - first) as usize);
            if expected != Some(&BlockSum::of(&bytes)) {
                tracing::warn!(key = object.source.key, block = number, "a block does not match its sum");
                return Err(FetchError::Damaged { key: object.source.key.clone(), block: number });
            }
        }
        self.senders[self.done].send_replace(Block::Ready(bytes.clone()));
        self.done += 1;
        fetcher.land(object, number, bytes, priority);
        Ok(())
    }
}
