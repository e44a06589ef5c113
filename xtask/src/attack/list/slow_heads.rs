//! Heads of requests that never come to their end.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;
use crate::attack::wire;

const CLIENTS: usize = 500;
const READ_TIMEOUT: Duration = Duration::from_secs(1);

/// Sends a byte every now and then. The read time-out must end all of them.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    let server = arena.serve(&["--read-timeout-ms", &READ_TIMEOUT.as_millis().to_string()])?;
    let bystanders = Bystanders::watch(&server);
    let mut open = wire::connect_many(server.address, CLIENTS, b"GET /livez HTTP/1.1\r\nhost: x\r\nx: ");
    let start = Instant::now();
    while start.elapsed() < arena.time.max(READ_TIMEOUT * 2) {
        std::thread::sleep(Duration::from_millis(200));
        open.retain_mut(|stream| stream.write_all(b"a").is_ok());
    }
    open.retain_mut(|stream| !wire::is_closed(stream));
    let mut outcome = Outcome {
        happened: format!("{} of {CLIENTS} still open after twice the time-out", open.len()),
        witness: Some(bystanders.stop()),
        ..Outcome::default()
    };
    outcome.expect(open.is_empty(), "slow heads outlive the read time-out");
    Ok(outcome)
}
