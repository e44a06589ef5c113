//! Helpers for texts that people read. Every crate writes its messages with them, so that all read
//! alike.
//!
//! | module | one idea |
//! | --- | --- |
//! | [`suggest`](mod@suggest) | the known word that a misspelt one stands for |
//! | [`plain`](mod@plain) | what a parser says, without the names of Rust types |
//! | [`size`] | a number of bytes in a readable unit |
//!
//! Place in the flow: below every other crate. It knows texts and numbers, nothing of beamline.

#![forbid(unsafe_code)]

pub mod plain;
pub mod size;
pub mod suggest;

pub use plain::plain;
pub use size::bytes;
pub use suggest::{did_you_mean, suggest};
