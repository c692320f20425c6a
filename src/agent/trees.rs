//! The trees in use: a version that is mounted twice, by whomever, is fetched once and mapped once.

use std::{
    collections::HashMap,
    sync::{Arc, Weak},
};

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::{digest::Digest, tree::Tree};

#[derive(Default)]
pub struct Trees(Mutex<Known>);

#[derive(Default)]
struct Known {
    open: HashMap<Digest, Weak<Tree>>,
    /// One fetch of a tree at a time.
    turns: HashMap<Digest, Weak<Semaphore>>,
}

/// Held by the one who fetches a tree; the others wait, and then find it.
pub struct Turn(Option<OwnedSemaphorePermit>);

impl Trees {
    /// The tree, if somebody has it mapped.
    pub fn get(&self, digest: &Digest) -> Option<Arc<Tree>> {
        self.0.lock().open.get(digest)?.upgrade()
    }

    pub fn add(&self, digest: Digest, tree: &Arc<Tree>) {
        let mut known = self.0.lock();
        // Bounded by what is in use.
        known.open.retain(|_, tree| tree.strong_count() > 0);
        known.open.insert(digest, Arc::downgrade(tree));
    }

    /// Waits for whoever is fetching it, for as long as the caller waits.
    pub async fn turn(&self, digest: &Digest) -> Turn {
        let turn = {
            let mut known = self.0.lock();
            known.turns.retain(|_, turn| turn.strong_count() > 0);
            match known.turns.get(digest).and_then(Weak::upgrade) {
                Some(turn) => turn,
                None => {
                    let turn = Arc::new(Semaphore::new(1));
                    known.turns.insert(*digest, Arc::downgrade(&turn));
                    turn
                }
            }
        };
        // Never closed.
        Turn(turn.acquire_owned().await.ok())
    }
}

impl Turn {
    /// Whether anybody else has to wait.
    #[cfg(test)]
    fn is_held(&self) -> bool {
        self.0.is_some()
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        self.0.take();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_fetches_and_nothing_is_kept_for_those_that_are_done() {
        let trees = Arc::new(Trees::default());
        let (one, other) = (Digest::of(b"one"), Digest::of(b"other"));
        let turn = trees.turn(&one).await;
        assert!(turn.is_held() && trees.turn(&other).await.is_held());
        let waiting = tokio::spawn({
            let trees = Arc::clone(&trees);
            async move { trees.turn(&one).await.is_held() }
        });
        tokio::task::yield_now().await;
        assert!(!waiting.is_finished());
        drop(turn);
        assert!(waiting.await.unwrap());
        trees.turn(&other).await;
        assert_eq!(trees.0.lock().turns.len(), 1);
    }
}
