//! How often one token, and everybody without one, may ask.

use std::{num::NonZeroUsize, time::Duration};

use lru::LruCache;
use parking_lot::Mutex;
use tokio::time::Instant;

use crate::digest::Digest;

/// Tokens remembered; one that was forgotten starts anew.
const TOKENS: NonZeroUsize = NonZeroUsize::new(8192).expect("is not zero");
/// At once, as a multiple of a second's worth.
const BURST: f64 = 10.0;
/// Requests per second with tokens that were not good lately: guessing costs a look-up each.
const STRANGERS: f64 = 50.0;

pub struct Limits {
    rate: f64,
    tokens: Mutex<LruCache<Digest, Bucket>>,
    strangers: Mutex<Bucket>,
}

#[derive(Clone, Copy)]
struct Bucket {
    left: f64,
    since: Instant,
}

impl Bucket {
    fn full(rate: f64) -> Self {
        Self {
            left: rate * BURST,
            since: Instant::now(),
        }
    }

    /// Takes one; or says how long to wait for it.
    fn take(&mut self, rate: f64) -> Result<(), Duration> {
        let now = Instant::now();
        let earned = now.duration_since(self.since).as_secs_f64() * rate;
        self.left = (self.left + earned).min(rate * BURST);
        self.since = now;
        if self.left >= 1.0 {
            self.left -= 1.0;
            return Ok(());
        }
        Err(Duration::from_secs_f64((1.0 - self.left) / rate))
    }
}

impl Limits {
    /// `rate` requests per second and token.
    pub fn new(rate: u32) -> Self {
        Self {
            rate: f64::from(rate.max(1)),
            tokens: Mutex::new(LruCache::new(TOKENS)),
            strangers: Mutex::new(Bucket::full(STRANGERS)),
        }
    }

    /// Before the token is looked up.
    pub fn admit(&self, token: &Digest) -> Result<(), Duration> {
        if let Some(bucket) = self.tokens.lock().get_mut(token) {
            return bucket.take(self.rate);
        }
        self.strangers.lock().take(STRANGERS)
    }

    /// The token turned out to be good.
    pub fn known(&self, token: &Digest) {
        let mut tokens = self.tokens.lock();
        if !tokens.contains(token) {
            tokens.push(*token, Bucket::full(self.rate));
        }
    }

    /// The token is good no more.
    pub fn stranger(&self, token: &Digest) {
        self.tokens.lock().pop(token);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_token_gets_its_rate_and_no_other_token_pays_for_it() {
        let limits = Limits::new(5);
        let (mine, yours) = (Digest::of(b"mine"), Digest::of(b"yours"));
        limits.known(&mine);
        limits.known(&yours);
        let mut admitted = 0;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(20) {
            match limits.admit(&mine) {
                Ok(()) => admitted += 1,
                Err(wait) => tokio::time::sleep(wait + Duration::from_millis(1)).await,
            }
        }
        // A full bucket, and twenty seconds.
        assert!((148..=151).contains(&admitted), "{admitted}");
        assert!(limits.admit(&yours).is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn guessing_is_slow_and_harms_nobody_who_is_known() {
        let limits = Limits::new(5);
        let mine = Digest::of(b"mine");
        limits.known(&mine);
        let refused = (0..10_000u32)
            .filter(|guess| limits.admit(&Digest::of(&guess.to_le_bytes())).is_err())
            .count();
        assert!(refused >= 9_000, "{refused}");
        assert!(limits.admit(&mine).is_ok());
    }
}
