//! The real binary against the fixtures, over HTTP and from the command line.

#![allow(clippy::unwrap_used, reason = "helpers of tests fail by panicking, as tests do")]

mod batch;
mod catalogs;
mod cli;
mod conformance;
mod determinism;
mod disk_tier;
mod doors;
mod encoder_decoder;
mod errors;
mod examples;
mod first_hour;
mod fuzz;
mod harness;
mod host_tier;
mod hostile;
mod hstu;
#[path = "../../../model/tests/common/hstu.rs"]
mod hstu_models;
mod hstu_semantic_ids;
mod liveness;
mod loading;
mod log_sink;
#[allow(dead_code, reason = "made for tests of the model")]
#[path = "../../../model/tests/common/made.rs"]
mod made;
mod managing;
mod openapi;
mod operations;
mod protocol;
mod recommending;
mod refusing;
mod replaying;
mod root;
mod signals;
mod state;
mod swapping;
