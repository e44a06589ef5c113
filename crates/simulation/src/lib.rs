//! The scheduler and the cache in virtual time: how policies affect waiting, and how memory affects
//! hits, without a model and without a machine.
//!
//! Place in the flow: this crate is not part of the server. `cargo xtask simulate` and
//! `cargo xtask hit-rate` run its binary and draw what it prints. Reading order:
//!
//! | module | one idea |
//! | --- | --- |
//! | [`curve`] | how long a step takes, as measured |
//! | [`fit`] | a curve fitted to what `cargo xtask bench` measured |
//! | [`traffic`] | when requests arrive |
//! | [`ours`] | the real [`Scheduler`](beamline_scheduler::Scheduler) under that traffic |
//! | [`reference`](mod@reference) | policies to compare with: first come, sharing, shortest first |
//! | [`outcome`] | the results of the requests, in numbers |
//! | [`scenarios`] | the questions to answer |
//! | [`logs`], [`replay`], [`hit_rate`] | real logs through the real cache bookkeeping |
//!
//! Invariants:
//!
//! - Time is a number of microseconds, and all randomness comes from seeds: the same command prints
//!   the same bytes on every machine.
//! - All policies see the same arrivals, and a request alone takes the same time under each of
//!   them.
//! - Only the public interface of the scheduler and of the cache is used, so the simulated code is
//!   the code that serves.

#![forbid(unsafe_code)]

pub mod curve;
pub mod fit;
pub mod hit_rate;
pub mod logs;
pub mod ours;
pub mod outcome;
mod parallel;
pub mod random;
pub mod reference;
pub mod replay;
pub mod scenarios;
pub mod traffic;
