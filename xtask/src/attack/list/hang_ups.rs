//! Clients that hang up before their answer.

use std::time::{Duration, Instant};

use anyhow::Result;

use super::neighbours::heavy_request;
use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;
use crate::attack::wire;

const AT_A_TIME: usize = 20;

/// What they asked for must not be computed to its end, and its memory comes back.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    let server = arena.serve(&[])?;
    let request = wire::post("/v1/recommend", &heavy_request(&arena.checkpoint, "hang-up")?);
    let bystanders = Bystanders::watch(&server);
    let (start, mut count) = (Instant::now(), 0);
    while start.elapsed() < arena.time {
        let asked = wire::connect_many(server.address, AT_A_TIME, request.as_bytes());
        count += asked.len();
        std::thread::sleep(Duration::from_millis(20));
        asked.into_iter().for_each(wire::hang_up);
    }
    let witness = bystanders.stop();
    let empty = server.within(Duration::from_secs(10), |server| {
        let is_zero = |name: &str, label: &str| server.metric(name, label).is_ok_and(|value| value == 0.0);
        is_zero("beamline_pages", "referenced")
            && is_zero("beamline_requests_running", "")
            && is_zero("beamline_requests_queued", "")
    });
    let mut outcome =
        Outcome { happened: format!("{count} hang-ups"), witness: Some(witness), ..Outcome::default() };
    outcome.expect(empty, "the engine still works for clients that are gone");
    Ok(outcome)
}
