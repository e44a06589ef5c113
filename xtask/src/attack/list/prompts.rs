//! Prompts that are far too long, and must be refused before much work is done.

use std::io::Write;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::Result;
use serde_json::json;

use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;
use crate::attack::wire;

const CLIENTS: usize = 8;
const BYTES: usize = 250_000;

/// Clients that send them without a pause.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    let server = arena.serve(&[])?;
    let request = wire::post("/v1/recommend", &json!({"prompt": "word ".repeat(BYTES / 5)}).to_string())
        .replacen("host: x", "host: x\r\nconnection: close", 1);
    let (refused, other) = (AtomicUsize::new(0), AtomicUsize::new(0));
    let bystanders = Bystanders::watch(&server);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..CLIENTS {
            scope.spawn(|| {
                while start.elapsed() < arena.time {
                    let answer = wire::connect(server.address).and_then(|mut stream| {
                        stream.write_all(request.as_bytes())?;
                        Ok(wire::read_all(&mut stream, Duration::from_secs(10)))
                    });
                    let status = answer.map_or(0, |answer| wire::status(&answer));
                    let counter = if [422, 429].contains(&status) { &refused } else { &other };
                    counter.fetch_add(1, Ordering::Relaxed);
                }
            });
        }
    });
    let (refused, other) = (refused.into_inner(), other.into_inner());
    let mut outcome = Outcome {
        happened: format!("{refused} refused, {other} otherwise"),
        witness: Some(bystanders.stop()),
        ..Outcome::default()
    };
    outcome.expect(other == 0, "a prompt that is too long was not refused");
    Ok(outcome)
}
