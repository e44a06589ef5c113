//! A system that allows few open files.

use std::time::Instant;

use anyhow::Result;

use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;
use crate::attack::wire;

/// Connections keep below the limit, so that idle ones keep nobody out.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    let server = arena.serve_with_open_files(256)?;
    let bystanders = Bystanders::watch(&server);
    let (start, mut idle) = (Instant::now(), Vec::new());
    while start.elapsed() < arena.time {
        idle = wire::connect_many(server.address, 400, b"");
        std::thread::sleep(arena.time / 4);
    }
    Ok(Outcome {
        happened: format!("{} idle connections", idle.len()),
        witness: Some(bystanders.stop()),
        ..Outcome::default()
    })
}
