//! grid-mount: mounts an immutable, versioned data set of a team read-only through FUSE.
//!
//! One room per concern; `ARCHITECTURE.md` draws the rooms and the arrows between them, and
//! `tests/architecture.rs` checks the arrows.

pub mod agent;
pub mod block;
pub mod bytesize;
pub mod cache;
pub mod catalog;
pub mod causes;
pub mod cli;
pub mod config;
pub mod digest;
pub mod doctor;
pub mod fetch;
pub mod fs;
pub mod fuse;
pub mod handover;
pub mod histogram;
pub mod keeper;
pub mod origin;
pub mod pin;
pub mod prefetch_policy;
pub mod profile;
pub mod publish;
pub mod reference;
pub mod session;
pub mod tree;
