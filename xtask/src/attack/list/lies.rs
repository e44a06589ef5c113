//! A config.json that promises more than there is.

use std::fs::{self, File};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;

/// Longest time in which a lie must be found out.
const PATIENCE: Duration = Duration::from_secs(10);
/// Most memory that finding it out may take.
const MEMORY_MIB: u64 = 1024;

/// A sparse file of 6 GiB, and sizes whose product is zero in 64 bits.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    let (root, copy) = arena.root_with_copy("lies")?;
    let config = copy.join("config.json");
    let honest: Value = serde_json::from_slice(&fs::read(&config)?)?;
    let root = root.to_str().context("a folder that is no text")?;
    let mut server = arena.serve(&["--model-root", root])?;
    let before = server.resident_mib()?;
    let bystanders = Bystanders::watch(&server);
    let mut outcome = Outcome::default();
    let mut load = |what: &str, outcome: &mut Outcome| -> Result<()> {
        let start = Instant::now();
        let answer = server.post("/v1/models/victim/load", r#"{"directory":"lies"}"#);
        let status = answer.map_or(0, |answer| answer.status);
        outcome.expect(status == 422 || status == 409, format!("{what}: status {status}"));
        outcome.expect(start.elapsed() < PATIENCE, format!("{what}: took {:.1?}", start.elapsed()));
        if server.ended()?.is_none() {
            let grown = server.resident_mib()?.saturating_sub(before);
            outcome.expect(grown < MEMORY_MIB, format!("{what}: {grown} MiB more are resident"));
        }
        Ok(())
    };
    for layers in [1_000_000_u64, 1 << 24, 1 << 62] {
        let mut lie = honest.clone();
        lie["num_hidden_layers"] = json!(layers);
        lie["num_attention_heads"] = json!(1 << 24);
        lie["num_key_value_heads"] = json!(1 << 24);
        lie["head_dim"] = json!(4096);
        if let Some(fields) = lie.as_object_mut() {
            fields.remove("layer_types");
        }
        fs::write(&config, lie.to_string())?;
        load(&format!("{layers} layers"), &mut outcome)?;
    }
    File::create(&config)?.set_len(6 << 30)?;
    load("6 GiB of config.json", &mut outcome)?;
    fs::write(&config, honest.to_string())?;
    File::create(copy.join("convention.json"))?.set_len(6 << 30)?;
    load("6 GiB of convention.json", &mut outcome)?;
    outcome.happened = "5 loads".into();
    outcome.witness = Some(bystanders.stop());
    Ok(outcome)
}
