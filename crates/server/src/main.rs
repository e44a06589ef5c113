//! The `beamline` binary.
fn main() {}
