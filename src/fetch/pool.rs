//! The connections to one origin, given out by priority.
//!
//! Owns who may send the next request: waiting readers first, then readahead, then warm-up, each lower
//! class with a smaller share, and nobody for a while after the origin asked to slow down.

use std::{
    collections::VecDeque,
    sync::Arc,
    time::{Duration, Instant},
};

use parking_lot::Mutex;
use tokio::sync::{Notify, oneshot};

/// Who a request is for. Lower values go first.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Priority {
    /// Somebody waits for the bytes.
    Waited = 0,
    Readahead = 1,
    WarmUp = 2,
}

/// The urgency of one queued request: it rises when a reader comes to wait for it.
#[derive(Debug)]
pub(super) struct Urgency {
    priority: Mutex<Priority>,
    raised: Notify,
    /// Asked for by a waiting reader from the start; what was fetched ahead and is now waited for is not.
    born_waited: bool,
}

impl Urgency {
    pub fn new(priority: Priority) -> Self {
        Self {
            priority: Mutex::new(priority),
            raised: Notify::new(),
            born_waited: priority == Priority::Waited,
        }
    }

    pub fn get(&self) -> Priority {
        *self.priority.lock()
    }

    /// Ends when somebody comes to wait for the request.
    pub async fn raised(&self) {
        self.raised.notified().await;
    }

    pub fn raise(&self) {
        let mut priority = self.priority.lock();
        if *priority != Priority::Waited {
            *priority = Priority::Waited;
            self.raised.notify_one();
        }
    }
}

#[derive(Debug)]
pub(super) struct Pool {
    connections: usize,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Permits out, by the class they were given to.
    running: [usize; 3],
    queues: [VecDeque<oneshot::Sender<Permit>>; 3],
    /// When a waiting reader last asked for a connection, and when before that: once is how a stream begins.
    last_waited: [Option<Instant>; 2],
    resume_at: Option<Instant>,
    slow_downs: u32,
}

/// The right to have one request in flight.
#[derive(Debug)]
pub(super) struct Permit {
    pool: Arc<Pool>,
    class: Priority,
}

/// For so long after a waiting reader's request, warm-up keeps to its small share.
const READERS_ARE_ABOUT: Duration = Duration::from_millis(500);
/// For so long after the last but one, readahead leaves the reserve free. A sequential reader's requests are all
/// readahead but the first: it may have everything.
const A_READER_MAY_COME_BACK: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(4);

impl Pool {
    pub fn new(connections: usize) -> Arc<Self> {
        Arc::new(Self {
            connections: connections.max(2),
            state: Mutex::new(State {
                running: [0; 3],
                queues: Default::default(),
                last_waited: [None; 2],
                resume_at: None,
                slow_downs: 0,
            }),
        })
    }

    /// How many connections requests of this class may hold.
    fn share(&self, class: Priority, state: &State) -> usize {
        let reserve = (self.connections / 4).max(1);
        let [last, before] = state.last_waited;
        let quiet = |since: Option<Instant>, period| since.is_none_or(|at| at.elapsed() >= period);
        match class {
            Priority::Waited => self.most(class),
            Priority::Readahead if quiet(before, A_READER_MAY_COME_BACK) => self.connections,
            Priority::Readahead => self.connections - reserve,
            Priority::WarmUp if !quiet(last, READERS_ARE_ABOUT) => (self.connections / 16).max(1),
            Priority::WarmUp => self.connections - reserve,
        }
    }

    /// Connections that are open when this class asks for one more. A few are for waiting readers alone: what
    /// is fetched ahead may take all others, and may stall on all of them.
    fn most(&self, class: Priority) -> usize {
        match class {
            Priority::Waited => self.connections + (self.connections / 16).max(1),
            Priority::Readahead | Priority::WarmUp => self.connections,
        }
    }

    fn may_run(&self, class: Priority, state: &State) -> bool {
        let total: usize = state.running.iter().sum();
        // What a class holds counts with all classes below it, so that a lower one never fills the pool.
        let held: usize = state.running[class as usize..].iter().sum();
        total < self.most(class) && held < self.share(class, state)
    }

    /// Waits for a connection; a request that becomes urgent meanwhile moves to the front class.
    pub async fn acquire(self: &Arc<Self>, urgency: &Urgency) -> Permit {
        loop {
            let pause = self
                .state
                .lock()
                .resume_at
                .and_then(|at| at.checked_duration_since(Instant::now()));
            if let Some(pause) = pause {
                tokio::time::sleep(pause).await;
                continue;
            }
            let class = urgency.get();
            let turn = {
                let mut state = self.state.lock();
                if urgency.born_waited {
                    state.last_waited = [Some(Instant::now()), state.last_waited[0]];
                }
                // Those who gave up waiting there, perhaps this very request, are in nobody's way.
                state.queues[class as usize].retain(|turn| !turn.is_closed());
                if state.queues[class as usize].is_empty() && self.may_run(class, &state) {
                    state.running[class as usize] += 1;
                    return Permit {
                        pool: Arc::clone(self),
                        class,
                    };
                }
                let (sender, turn) = oneshot::channel();
                state.queues[class as usize].push_back(sender);
                turn
            };
            tokio::select! {
                biased;
                permit = turn => if let Ok(permit) = permit { return permit },
                () = urgency.raised.notified(), if class != Priority::Waited => {}
                // A share that grew with time (no reader about any more) is noticed without a release.
                () = tokio::time::sleep(READERS_ARE_ABOUT), if class != Priority::Waited => {}
            }
        }
    }

    fn hand_on(self: &Arc<Self>) {
        loop {
            let next = {
                let mut state = self.state.lock();
                let class = [Priority::Waited, Priority::Readahead, Priority::WarmUp]
                    .into_iter()
                    .find(|class| !state.queues[*class as usize].is_empty() && self.may_run(*class, &state));
                let Some(class) = class else { return };
                let Some(sender) = state.queues[class as usize].pop_front() else {
                    return;
                };
                if sender.is_closed() {
                    continue;
                }
                state.running[class as usize] += 1;
                (
                    sender,
                    Permit {
                        pool: Arc::clone(self),
                        class,
                    },
                )
            };
            // Outside the lock: a permit nobody takes releases itself, which hands on again.
            drop(next.0.send(next.1));
        }
    }

    /// The origin asked to slow down: nobody sends anything for a while, longer each time in a row.
    pub fn slow_down(&self) {
        let mut state = self.state.lock();
        state.slow_downs = (state.slow_downs + 1).min(6);
        let pause = (Duration::from_millis(50) * (1 << state.slow_downs)).min(LONGEST_PAUSE);
        let until = Instant::now() + pause.mul_f64(rand::random_range(0.75..1.25));
        state.resume_at = state.resume_at.max(Some(until));
    }

    pub fn all_is_well(&self) {
        let mut state = self.state.lock();
        state.slow_downs = state.slow_downs.saturating_sub(1);
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.pool.state.lock().running[self.class as usize] -= 1;
        self.pool.hand_on();
    }
}

#[cfg(test)]
mod tests {
    use futures::FutureExt as _;

    use super::*;

    #[tokio::test]
    async fn lower_classes_leave_room_and_waiting_readers_go_first() {
        let pool = Pool::new(4);
        let low = Urgency::new(Priority::Readahead);
        let mut held: Vec<_> = futures::future::join_all((0..4).map(|_| pool.acquire(&low))).await;
        assert!(
            pool.acquire(&low).now_or_never().is_none(),
            "readahead took what is for readers"
        );
        let first = pool
            .acquire(&Urgency::new(Priority::Waited))
            .now_or_never()
            .expect("some are for readers alone");
        drop(held.pop());
        assert!(
            pool.acquire(&low).now_or_never().is_none(),
            "readahead took the reserve while a reader is about"
        );

        let warm = Urgency::new(Priority::WarmUp);
        let waited = Urgency::new(Priority::Waited);
        let second = pool
            .acquire(&waited)
            .now_or_never()
            .expect("a connection is free");
        let mut queued_low = Box::pin(pool.acquire(&warm));
        let mut queued = Box::pin(pool.acquire(&waited));
        assert!(queued_low.as_mut().now_or_never().is_none());
        assert!(queued.as_mut().now_or_never().is_none(), "more than there are");
        drop(first);
        assert!(queued_low.as_mut().now_or_never().is_none());
        assert!(queued.now_or_never().is_some());
        drop((held, second));
    }

    #[tokio::test]
    async fn readahead_takes_the_reserve_until_a_second_reader_waits() {
        let pool = Pool::new(8);
        let (low, waited) = (Urgency::new(Priority::Readahead), Urgency::new(Priority::Waited));
        for (readers, most) in [(1, 8), (2, 6)] {
            drop(pool.acquire(&waited).await);
            let held = Vec::from_iter((0..9).map_while(|_| pool.acquire(&low).now_or_never()));
            assert_eq!(held.len(), most, "after {readers} readers");
        }
    }

    #[tokio::test]
    async fn a_raised_request_moves_to_the_front() {
        let pool = Pool::new(2);
        let waited = Urgency::new(Priority::Waited);
        let mut held = Vec::new();
        while let Some(permit) = pool.acquire(&waited).now_or_never() {
            held.push(permit);
        }
        let urgency = Urgency::new(Priority::WarmUp);
        let mut queued = Box::pin(pool.acquire(&urgency));
        assert!(queued.as_mut().now_or_never().is_none());
        urgency.raise();
        assert!(queued.as_mut().now_or_never().is_none());
        drop(held.pop());
        let permit = queued.await;
        assert_eq!(permit.class, Priority::Waited);
    }
}
