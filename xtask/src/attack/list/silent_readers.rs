//! Clients that ask and never read.

use std::time::Duration;

use anyhow::Result;

use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;
use crate::attack::wire;

const CLIENTS: usize = 60;
/// Questions of each, with answers of about 100 kB: more than sockets hold.
const QUESTIONS: usize = 200;
/// A drain waits for nobody who does not read.
const DRAIN: Duration = Duration::from_secs(8);

/// They must not hold connections for ever, nor the drain.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    let mut server = arena.serve(&["--max-connections", "40", "--write-timeout-ms", "3000"])?;
    let bystanders = Bystanders::watch(&server);
    let questions = "GET /openapi.json HTTP/1.1\r\nhost: x\r\n\r\n".repeat(QUESTIONS);
    let mut silent = wire::connect_many(server.address, CLIENTS, questions.as_bytes());
    std::thread::sleep(arena.time.max(Duration::from_secs(3)));
    silent.extend(wire::connect_many(server.address, 20, questions.as_bytes()));
    std::thread::sleep(Duration::from_millis(500));
    let witness = bystanders.stop();
    let (took, status) = server.end("TERM", DRAIN * 4)?;
    let mut outcome = Outcome {
        happened: format!("{} silent readers; the drain took {:.1} s", silent.len(), took.as_secs_f64()),
        witness: Some(witness),
        ..Outcome::default()
    };
    outcome.expect(took <= DRAIN, "clients that do not read hold the drain");
    outcome.expect(status.is_some_and(|status| status.success()), "the drain failed");
    Ok(outcome)
}
