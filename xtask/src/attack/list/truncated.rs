//! Files that change while they are loaded.

use std::fs::{self, OpenOptions};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;

/// Cuts a weights file short at different moments of a load.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    let (root, copy) = arena.root_with_copy("truncated")?;
    let root = root.to_str().context("a folder that is no text")?;
    let mut server = arena.serve(&["--model-root", root])?;
    let bystanders = Bystanders::watch(&server);
    let weights = copy.join("model.safetensors");
    let whole = fs::read(&weights)?;
    let (start, mut loads, mut answered) = (Instant::now(), 0_u64, 0);
    while start.elapsed() < arena.time.max(Duration::from_secs(2)) && server.ended()?.is_none() {
        fs::write(&weights, &whole)?;
        let load = || server.post("/v1/models/victim/load", r#"{"directory":"truncated"}"#);
        let answer = std::thread::scope(|scope| {
            let loading = scope.spawn(load);
            std::thread::sleep(Duration::from_micros(500 * (loads % 40)));
            let cut = OpenOptions::new().write(true).open(&weights);
            cut.and_then(|file| file.set_len(whole.len() as u64 / (2 + loads % 50))).ok();
            loading.join().ok().and_then(Result::ok)
        });
        loads += 1;
        let Some(answer) = answer else { continue };
        answered += u64::from(answer.status == 200 || answer.status == 422);
        if answer.status == 200 {
            // Out again, for the next time.
            server.post("/v2/repository/models/victim/unload", "{}")?;
        }
    }
    let ended = server.ended()?;
    let mut outcome = Outcome {
        happened: format!("{loads} loads, {answered} loaded or refused"),
        witness: Some(bystanders.stop()),
        ..Outcome::default()
    };
    outcome.expect(ended.is_none(), format!("the server ended: {ended:?}"));
    outcome.expect(answered == loads, "a load was not answered");
    Ok(outcome)
}
