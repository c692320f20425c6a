//! grid-mount: mounts an immutable, versioned data set of a team read-only through FUSE.
//!
//! One room per concern; `ARCHITECTURE.md` draws the rooms and the arrows between them, and
//! `tests/architecture.rs` checks the arrows.

pub mod block;
pub mod cache;
pub mod catalog;
pub mod digest;
pub mod fetch;
pub mod origin;
pub mod reference;
pub mod tree;
