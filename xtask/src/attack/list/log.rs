//! A log that cannot be written.

use std::fs::OpenOptions;
use std::process::Stdio;
use std::time::{Duration, Instant};

use anyhow::Result;

use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;
use crate::attack::server::Server;
use crate::attack::wire;

const DRAIN: Duration = Duration::from_secs(10);
/// Much to log, in little time.
const FLAGS: [&str; 2] = ["--log", "debug"];

/// Nobody reads any more.
pub(super) fn broken(arena: &Arena) -> Result<Outcome> {
    let mut server = arena.serve_logging_to(&FLAGS, Stdio::piped())?;
    drop(server.take_stderr()?);
    judge(arena, server)
}

/// The disk is full.
pub(super) fn full(arena: &Arena) -> Result<Outcome> {
    let full = OpenOptions::new().write(true).open("/dev/full")?;
    judge(arena, arena.serve_logging_to(&FLAGS, full.into())?)
}

/// The pipe is full, and its reader is there.
pub(super) fn stuck(arena: &Arena) -> Result<Outcome> {
    let mut server = arena.serve_logging_to(&FLAGS, Stdio::piped())?;
    let _unread = server.take_stderr()?;
    judge(arena, server)
}

/// Everything is answered, the lost lines are counted, and the drain is clean.
fn judge(arena: &Arena, mut server: Server) -> Result<Outcome> {
    let bystanders = Bystanders::watch(&server);
    let id = "x".repeat(128);
    let request = format!("GET /v1/nothing HTTP/1.1\r\nhost: x\r\nx-request-id: {id}\r\n\r\n");
    let batch = format!("{}GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n", request.repeat(200));
    let (start, mut lost) = (Instant::now(), 0.0);
    while start.elapsed() < arena.time || (lost == 0.0 && start.elapsed() < Duration::from_secs(60)) {
        for mut stream in wire::connect_many(server.address, 4, batch.as_bytes()) {
            wire::read_all(&mut stream, Duration::from_secs(5));
        }
        lost = server.metric("beamline_log_lines_dropped_total", "")?;
    }
    let witness = bystanders.stop();
    let (took, status) = server.end("TERM", DRAIN)?;
    let mut outcome = Outcome {
        happened: format!("{lost} lines lost and counted; the drain took {:.1} s", took.as_secs_f64()),
        witness: Some(witness),
        ..Outcome::default()
    };
    outcome.expect(lost > 0.0, "lost lines are not counted");
    outcome.expect(status.is_some_and(|status| status.success()), format!("the drain ended with {status:?}"));
    Ok(outcome)
}
