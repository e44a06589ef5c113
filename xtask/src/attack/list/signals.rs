//! Signals while requests are at hand.

use std::time::Duration;

use anyhow::Result;

use super::neighbours::heavy_request;
use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;
use crate::attack::wire;

const AT_HAND: usize = 8;
const PATIENCE: Duration = Duration::from_secs(30);

/// HUP and USR1 break nothing; QUIT lets what is at hand finish.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    let mut server = arena.serve(&[])?;
    let request = wire::post("/v1/recommend", &heavy_request(&arena.checkpoint, "signals")?);
    let bystanders = Bystanders::watch(&server);
    let mut at_hand = wire::connect_many(server.address, AT_HAND, request.as_bytes());
    for signal in ["HUP", "USR1", "HUP", "USR1"] {
        std::thread::sleep(Duration::from_millis(50));
        server.signal(signal)?;
    }
    std::thread::sleep(Duration::from_millis(100));
    let ended = server.ended()?;
    let witness = bystanders.stop();
    at_hand.extend(wire::connect_many(server.address, 1, request.as_bytes()));
    let arrived = server.within(Duration::from_secs(1), |server| {
        server.metric("beamline_requests_running", "").is_ok_and(|running| running > 0.0)
    });
    let mut outcome = Outcome { witness: Some(witness), ..Outcome::default() };
    outcome.expect(ended.is_none(), format!("a signal for logs ended the server: {ended:?}"));
    let answered = std::thread::scope(|scope| {
        let reading = scope.spawn(|| {
            let answers = at_hand.iter_mut().map(|stream| wire::read_all(stream, PATIENCE));
            answers.filter(|answer| wire::status(answer) == 200).count()
        });
        let end = server.end("QUIT", PATIENCE);
        let status = end.map(|(_, status)| status);
        outcome.expect(
            matches!(status, Ok(Some(status)) if status.success()),
            format!("QUIT ended with {status:?}"),
        );
        reading.join().unwrap_or(0)
    });
    outcome.happened = format!("{answered} of {} at hand answered, work seen: {arrived}", AT_HAND + 1);
    outcome.expect(answered == AT_HAND + 1, "requests at hand were broken");
    Ok(outcome)
}
