//! Names that would end a line of the log or steer a terminal.

use std::fs;
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;

const EVIL: &str = "a\r\nERROR forged \u{1b}[31m\u{1b}]0;title\u{7}";

/// A tensor, its type, and a model in a request are named so.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    let (root, copy) = arena.root_with_copy("forgery")?;
    let root = root.to_str().context("a folder that is no text")?;
    let mut server = arena.serve_logging_to(&["--model-root", root, "--log", "debug"], Stdio::piped())?;
    let bystanders = Bystanders::watch(&server);
    let weights = copy.join("model.safetensors");
    let whole = fs::read(&weights)?;
    for what in ["name", "type"] {
        fs::write(&weights, forged(&whole, what)?)?;
        server.post("/v1/models/victim/load", r#"{"directory":"forgery"}"#)?;
    }
    for field in ["model", "tenant", "user_id", "unheard-of"] {
        server.post("/v1/recommend", &json!({"history": [], field: EVIL}).to_string())?;
    }
    let witness = bystanders.stop();
    let (_, status) = server.end("TERM", Duration::from_secs(10))?;
    let log = server.log_to_its_end()?;
    let forged = log.lines().filter(|line| line.starts_with("ERROR forged")).count();
    let mut outcome = Outcome {
        happened: format!("{} lines of log, {forged} forged", log.lines().count()),
        witness: Some(witness),
        ..Outcome::default()
    };
    outcome.expect(forged == 0, "a line of the log is forged");
    outcome.expect(!log.contains('\u{1b}') && !log.contains('\u{7}'), "the log has control characters");
    outcome.expect(status.is_some_and(|status| status.success()), "the drain failed");
    Ok(outcome)
}

/// The weights with the first tensor renamed, or its type.
fn forged(whole: &[u8], what: &str) -> Result<Vec<u8>> {
    let (length, rest) = whole.split_first_chunk::<8>().context("no safetensors file")?;
    let length = usize::try_from(u64::from_le_bytes(*length))?;
    let (header, data) = rest.split_at_checked(length).context("no safetensors file")?;
    let mut header: serde_json::Map<String, Value> = serde_json::from_slice(header)?;
    let name = header.keys().find(|name| *name != "__metadata__").cloned().context("no tensors")?;
    let mut tensor = header.remove(&name).context("no tensors")?;
    match what {
        "name" => header.insert(EVIL.into(), tensor),
        _ => {
            tensor["dtype"] = json!(EVIL);
            header.insert(name, tensor)
        }
    };
    let header = serde_json::to_vec(&header)?;
    Ok([&(header.len() as u64).to_le_bytes()[..], &header, data].concat())
}
