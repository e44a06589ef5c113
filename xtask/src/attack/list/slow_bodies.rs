//! Bodies that begin and do not go on.

use std::time::Duration;

use anyhow::Result;

use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;
use crate::attack::wire;

/// More than the engine has places by default.
const CLIENTS: usize = 1300;
/// The least pace of bodies is looked at this often.
const PACE: Duration = Duration::from_secs(5);

/// None of them may hold anything that others need.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    let server = arena.serve(&[])?;
    let bystanders = Bystanders::watch(&server);
    let head = wire::head("POST", "/v1/recommend", "application/json", 100_000);
    let mut slow = wire::connect_many(server.address, CLIENTS, format!("{head}{{\"history\":[ ").as_bytes());
    std::thread::sleep(arena.time.max(PACE + Duration::from_secs(2)));
    let opened = slow.len();
    slow.retain_mut(|stream| !wire::is_closed(stream));
    let mut outcome = Outcome {
        happened: format!("{opened} slow bodies, {} open at the end", slow.len()),
        witness: Some(bystanders.stop()),
        ..Outcome::default()
    };
    outcome.expect(slow.is_empty(), "bodies below the least pace are waited for");
    Ok(outcome)
}
