//! Words for people: every crate writes its messages with these helpers, so that all of them read alike.
//!
//! | module | one idea |
//! | --- | --- |
//! | [`suggest`](mod@suggest) | the known word that a misspelt one stands for |
//! | [`plain`](mod@plain) | what a parser says, without the names of Rust types |
//! | [`size`] | a number of bytes, as people read it |
//!
//! Place in the flow: below every other crate. It knows texts and numbers, nothing of beamline.

#![forbid(unsafe_code)]

pub mod plain;
pub mod size;
pub mod suggest;

pub use plain::plain;
pub use size::bytes;
pub use suggest::{did_you_mean, suggest};
