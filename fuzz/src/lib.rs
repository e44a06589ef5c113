//! Fuzz targets: one function a parser, from bytes to an outcome.
//!
//! Two drivers share them. `cargo xtask fuzz` mutates inputs with a seeded generator and needs stable
//! Rust only; `fuzz/libfuzzer` holds the same targets for cargo-fuzz, which measures coverage and needs
//! nightly. Both begin with `fuzz/corpus/TARGET` and the seeds of [`seeds`].
//!
//! A target fails by a panic, by taking longer than [`limits::TIME`], or by taking more memory than
//! [`limits::MEMORY`]. An input that failed becomes a file ([`failed`]); by hand it becomes one of
//! `fuzz/corpus/TARGET`. `cargo test` runs both.

#![forbid(unsafe_code)]

pub mod corpus;
pub mod failed;
pub mod limits;
pub mod mutate;
pub mod seeds;
pub mod targets;

pub use targets::{TARGETS, Target};

/// Runs a target by name, as the libFuzzer drivers do.
pub fn run(name: &str, input: &[u8]) {
    if let Some(target) = TARGETS.iter().find(|target| target.name == name) {
        let _ = (target.run)(input);
    }
}
