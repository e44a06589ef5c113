//! Catalogs that are begun and not finished.

use std::io::Write;
use std::time::Duration;

use anyhow::Result;

use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;
use crate::attack::wire;

const UPLOADS: usize = 6;
const DECLARED: usize = 200 << 20;
/// What is sent of each.
const SENT: usize = 60 << 20;
/// Most that they may take together: what the largest catalog may.
const MEMORY_MIB: u64 = 300;

/// Together they may take what one of the largest may.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    let server = arena.serve(&[])?;
    let before = server.resident_mib()?;
    let bystanders = Bystanders::watch(&server);
    let head = wire::head("PUT", "/v1/models/default/catalog", "application/x-ndjson", DECLARED);
    let mut begun = wire::connect_many(server.address, UPLOADS, head.as_bytes());
    let piece = vec![b' '; 1 << 20];
    for stream in &mut begun {
        stream.set_write_timeout(Some(Duration::from_secs(2)))?;
        for _ in 0..SENT / piece.len() {
            if stream.write_all(&piece).is_err() {
                break;
            }
        }
    }
    std::thread::sleep(arena.time);
    let grown = server.resident_mib()?.saturating_sub(before);
    let mut outcome = Outcome {
        happened: format!("{} uploads begun, {grown} MiB more are resident", begun.len()),
        witness: Some(bystanders.stop()),
        ..Outcome::default()
    };
    outcome.expect(grown <= MEMORY_MIB, "uploads are not bounded together");
    Ok(outcome)
}
