//! Keys that are lent for a while: by a control plane, a token service, or whoever implements [`Lender`].
//!
//! Owns how they are kept (one renewal for all readers, ahead of time, in the background) and how they are
//! hidden ([`Secret`]). Knows nothing of who lends.

use std::{error::Error, fmt, sync::Arc, time::Duration};

use async_trait::async_trait;
use jiff::Timestamp;
use object_store::{CredentialProvider, aws::AwsCredential};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use tokio::time::Instant;
use zeroize::Zeroizing;

use super::{OriginError, http::SEEN, remote::carried};

/// A lender that does not answer must not hold a reader longer than the reader's own deadline.
const LEND_DEADLINE: Duration = Duration::from_secs(20);
/// Between two tries to renew, at first and at most.
const PAUSE: Duration = Duration::from_millis(500);
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

/// Text that is never printed, and is wiped from memory when it goes.
#[derive(Clone, PartialEq, Eq)]
pub struct Secret(Zeroizing<String>);

impl Secret {
    pub fn new(text: impl Into<String>) -> Self {
        Self(Zeroizing::new(text.into()))
    }

    /// For the one place that sends it.
    pub fn expose(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("…")
    }
}

/// What requests to S3 are signed with.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Keys {
    pub id: String,
    pub secret: Secret,
    pub token: Option<Secret>,
}

/// Keys, and how much longer they are good for; `None`: until they are refused. A duration, not a time: it
/// holds whatever this machine's clock says.
#[derive(Clone, Debug)]
pub struct Lent {
    pub keys: Keys,
    pub expires_in: Option<Duration>,
}

#[async_trait]
pub trait Lender: Send + Sync {
    async fn lend(&self) -> Result<Lent, Box<dyn Error + Send + Sync>>;
}

/// What a store asks for keys.
#[async_trait]
pub trait Credentials: Send + Sync {
    /// What to sign the next request with.
    async fn current(&self) -> Result<Arc<Keys>, OriginError>;
    /// The store refused what was signed with the keys of this id: other keys. Many readers may ask at once;
    /// one renewal serves them all.
    async fn renew(&self, refused: &str) -> Result<Arc<Keys>, OriginError>;
}

/// How lent keys are doing, for `status`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LoanState {
    /// When the keys in use run out, by this machine's clock.
    pub expires: Option<Timestamp>,
    pub expired: bool,
    /// Times that keys were lent after the first.
    pub renewals: u64,
    pub failures: u64,
    /// Why the last try failed, unless one has succeeded since.
    pub last_error: Option<String>,
}

/// Keys from a lender, renewed when two thirds of their life are over.
pub struct Borrowed {
    store: String,
    lender: Arc<dyn Lender>,
    state: Mutex<State>,
    /// Held by the one who asks the lender.
    asking: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    keys: Option<Arc<Keys>>,
    renew_at: Option<Instant>,
    expires_at: Option<Instant>,
    /// After a failure: not before then.
    pause_until: Option<Instant>,
    failures_in_a_row: u32,
    /// A background renewal is on its way.
    renewing: bool,
    seen: LoanState,
}

impl Borrowed {
    /// Asks nobody until keys are needed. `store` is for messages.
    pub fn new(store: impl Into<String>, lender: Arc<dyn Lender>) -> Arc<Self> {
        Arc::new(Self {
            store: store.into(),
            lender,
            state: Mutex::default(),
            asking: tokio::sync::Mutex::default(),
        })
    }

    /// As [`Borrowed::new`], with keys that came along with something else.
    pub fn starting_with(store: impl Into<String>, lent: Lent, lender: Arc<dyn Lender>) -> Arc<Self> {
        let borrowed = Self::new(store, lender);
        borrowed.accept(lent);
        borrowed
    }

    /// With keys of which nobody knows how long they last: used until others can be had.
    pub fn resuming_with(store: impl Into<String>, keys: Keys, lender: Arc<dyn Lender>) -> Arc<Self> {
        let borrowed = Self::new(store, lender);
        borrowed.accept(Lent {
            keys,
            expires_in: None,
        });
        borrowed.state.lock().renew_at = Some(Instant::now());
        borrowed
    }

    pub fn state(&self) -> LoanState {
        let state = self.state.lock();
        LoanState {
            expired: state.expires_at.is_some_and(|at| at <= Instant::now()),
            ..state.seen.clone()
        }
    }

    fn accept(&self, lent: Lent) -> Arc<Keys> {
        let now = Instant::now();
        let keys = Arc::new(lent.keys);
        let mut state = self.state.lock();
        if state.keys.is_some() {
            state.seen.renewals += 1;
        }
        state.keys = Some(Arc::clone(&keys));
        // Not all hosts at once.
        let share = rand::random_range(0.60..0.70);
        state.renew_at = lent.expires_in.map(|life| now + life.mul_f64(share));
        state.expires_at = lent.expires_in.map(|life| now + life);
        state.pause_until = None;
        state.failures_in_a_row = 0;
        state.seen.expires = lent
            .expires_in
            .and_then(|life| Timestamp::now().checked_add(life).ok());
        state.seen.last_error = None;
        keys
    }

    fn failed(&self, error: &(dyn Error + 'static)) -> OriginError {
        let reason = crate::causes::in_one_line(error);
        let mut state = self.state.lock();
        state.failures_in_a_row = state.failures_in_a_row.saturating_add(1);
        let pause = PAUSE * (1 << state.failures_in_a_row.min(8).saturating_sub(1));
        let pause = pause.min(LONGEST_PAUSE).mul_f64(rand::random_range(0.5..1.0));
        state.pause_until = Some(Instant::now() + pause);
        state.seen.failures += 1;
        state.seen.last_error = Some(reason.clone());
        tracing::warn!(store = self.store, reason, "keys could not be renewed");
        self.refused(reason)
    }

    fn refused(&self, reason: String) -> OriginError {
        OriginError::Credentials {
            store: self.store.clone(),
            reason: format!("they have run out and no new ones can be had: {reason}"),
            source: None,
        }
    }

    /// Asks the lender, one at a time; whoever waited takes what the one before got.
    async fn ask(&self, instead_of: Option<&str>) -> Result<Arc<Keys>, OriginError> {
        let _turn = self.asking.lock().await;
        let now = Instant::now();
        {
            let state = self.state.lock();
            if let Some(keys) = &state.keys {
                let fresh = state.renew_at.is_none_or(|at| at > now);
                if fresh && instead_of != Some(keys.id.as_str()) {
                    return Ok(Arc::clone(keys));
                }
            }
            if state.pause_until.is_some_and(|until| until > now) {
                let reason = state.seen.last_error.clone().unwrap_or_default();
                return Err(self.refused(reason));
            }
        }
        match tokio::time::timeout(LEND_DEADLINE, self.lender.lend()).await {
            Ok(Ok(lent)) => Ok(self.accept(lent)),
            Ok(Err(error)) => Err(self.failed(&*error)),
            Err(late) => Err(self.failed(&late)),
        }
    }
}

/// What the state says about the next request.
enum Due {
    Ready(Arc<Keys>),
    /// Good for now; to be renewed in the background.
    Soon(Arc<Keys>),
    Now,
}

#[async_trait]
impl Credentials for Arc<Borrowed> {
    async fn current(&self) -> Result<Arc<Keys>, OriginError> {
        let now = Instant::now();
        let due = {
            let mut state = self.state.lock();
            match state.keys.clone() {
                Some(keys) if state.expires_at.is_none_or(|at| at > now) => {
                    let paused = state.pause_until.is_some_and(|until| until > now);
                    if state.renew_at.is_some_and(|at| at <= now) && !state.renewing && !paused {
                        state.renewing = true;
                        Due::Soon(keys)
                    } else {
                        Due::Ready(keys)
                    }
                }
                _ => Due::Now,
            }
        };
        match due {
            Due::Ready(keys) => Ok(keys),
            Due::Soon(keys) => {
                let this = Arc::clone(self);
                tokio::spawn(async move {
                    // A failure is noted, and tried again while the old keys last.
                    let _ = this.ask(None).await;
                    this.state.lock().renewing = false;
                });
                Ok(keys)
            }
            Due::Now => self.ask(None).await,
        }
    }

    async fn renew(&self, refused: &str) -> Result<Arc<Keys>, OriginError> {
        self.ask(Some(refused)).await
    }
}

/// Credentials as the S3 client takes them.
pub(super) struct Provider(pub Arc<dyn Credentials>);

impl fmt::Debug for Provider {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Provider")
    }
}

#[async_trait]
impl CredentialProvider for Provider {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        let keys = self.0.current().await.map_err(carried)?;
        // Whoever is refused must say with what.
        let _ = SEEN.try_with(|seen| seen.lock().signed_with = Some(keys.id.clone()));
        Ok(Arc::new(AwsCredential {
            key_id: keys.id.clone(),
            secret_key: keys.secret.expose().to_owned(),
            token: keys.token.as_ref().map(|token| token.expose().to_owned()),
        }))
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::*;

    /// Lends numbered keys for as long as it is told; fails while it is broken.
    struct Bank {
        life: Duration,
        lent: AtomicU64,
        asked: AtomicU64,
        broken: Mutex<bool>,
    }

    impl Bank {
        fn new(seconds: u64) -> Arc<Self> {
            Arc::new(Self {
                life: Duration::from_secs(seconds),
                lent: AtomicU64::new(0),
                asked: AtomicU64::new(0),
                broken: Mutex::new(false),
            })
        }
    }

    #[async_trait]
    impl Lender for Bank {
        async fn lend(&self) -> Result<Lent, Box<dyn Error + Send + Sync>> {
            self.asked.fetch_add(1, Ordering::Relaxed);
            tokio::time::sleep(Duration::from_millis(20)).await;
            if *self.broken.lock() {
                return Err("the bank is closed".into());
            }
            let number = self.lent.fetch_add(1, Ordering::Relaxed);
            Ok(Lent {
                keys: Keys {
                    id: format!("key {number}"),
                    secret: Secret::new("hunter2"),
                    token: None,
                },
                expires_in: Some(self.life),
            })
        }
    }

    #[test]
    fn nothing_shows_a_secret() {
        let keys = Keys {
            id: "id".into(),
            secret: Secret::new("hunter2"),
            token: Some(Secret::new("hunter3")),
        };
        let shown = format!("{keys:?} {:#?}", Secret::new("hunter4"));
        assert!(!shown.contains("hunter"), "{shown}");
    }

    #[tokio::test(start_paused = true)]
    async fn many_readers_over_ten_lives_see_no_gap_and_as_many_renewals() {
        let bank = Bank::new(30);
        let keys = Borrowed::new("s3://b", Arc::clone(&bank) as _);
        let start = Instant::now();
        let reader = |_| {
            let keys = Arc::clone(&keys);
            async move {
                while start.elapsed() < Duration::from_secs(300) {
                    keys.current().await.unwrap();
                    assert!(!keys.state().expired);
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        };
        futures::future::join_all((0..8).map(reader)).await;
        let state = keys.state();
        // Each lives 18 to 21 seconds and the moment that a renewal takes.
        assert!((13..=16).contains(&state.renewals), "{state:?}");
        assert_eq!(state.renewals + 1, bank.asked.load(Ordering::Relaxed));
        assert_eq!(state.failures, 0);
    }

    #[tokio::test(start_paused = true)]
    async fn a_closed_lender_is_asked_again_while_the_keys_last_and_gently_after() {
        let bank = Bank::new(30);
        let keys = Borrowed::new("s3://b", Arc::clone(&bank) as _);
        keys.current().await.unwrap();
        *bank.broken.lock() = true;
        let start = Instant::now();
        while start.elapsed() < Duration::from_secs(29) {
            keys.current().await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        assert!(keys.state().failures >= 2, "{:?}", keys.state());
        tokio::time::sleep(Duration::from_secs(2)).await;
        let before = bank.asked.load(Ordering::Relaxed);
        for _ in 0..1000 {
            let error = keys.current().await.unwrap_err().to_string();
            assert!(error.contains("the bank is closed"), "{error}");
        }
        assert!(
            bank.asked.load(Ordering::Relaxed) <= before + 1,
            "a thousand reads do not become a thousand questions"
        );
        assert!(keys.state().expired);
        *bank.broken.lock() = false;
        tokio::time::sleep(LONGEST_PAUSE).await;
        keys.current().await.unwrap();
        assert!(!keys.state().expired && keys.state().last_error.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_refusal_renews_once_for_all_who_were_refused() {
        let bank = Bank::new(30);
        let keys = Borrowed::new("s3://b", Arc::clone(&bank) as _);
        let refused = keys.current().await.unwrap().id.clone();
        let renewed = futures::future::join_all((0..16).map(|_| keys.renew(&refused))).await;
        for keys in renewed {
            assert_eq!(keys.unwrap().id, "key 1");
        }
        assert_eq!(bank.asked.load(Ordering::Relaxed), 2);
    }
}
