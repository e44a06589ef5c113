//! Connections that say nothing.

use anyhow::Result;

use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;
use crate::attack::wire;

const CLIENTS: usize = 2000;

/// Others find a place all the same.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    let server = arena.serve(&["--max-connections", "200"])?;
    let bystanders = Bystanders::watch(&server);
    let idle = wire::connect_many(server.address, CLIENTS, b"");
    std::thread::sleep(arena.time);
    Ok(Outcome {
        happened: format!("{} idle connections", idle.len()),
        witness: Some(bystanders.stop()),
        ..Outcome::default()
    })
}
