//! The atomics that decide races. `tests/cache_races.rs` puts a model checker's in their place.

pub use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
