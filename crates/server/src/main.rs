//! The `beamline` binary: all code is in the library.

use std::process::ExitCode;

/// Requests allocate many small vectors on several threads.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

fn main() -> ExitCode {
    beamline::cli::main()
}
