//! Changes that were acknowledged, and then the power goes.

use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::neighbours::history;
use crate::attack::arena::Arena;
use crate::attack::outcome::Outcome;
use crate::attack::server::Server;

/// A catalog patch and a label must be there after `kill -9` and a start with the same command line.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    if !arena.has_flag("--state")? {
        return Ok(Outcome {
            happened: "this build keeps no state: nothing to lose".into(),
            ..Outcome::default()
        });
    }
    let (root, _) = arena.root_with_copy("state")?;
    let folder = arena.folder("state-files")?;
    let flags = [
        "--model-root",
        root.to_str().context("a folder that is no text")?,
        "--state",
        folder.to_str().context("a folder that is no text")?,
    ];
    let item = history(&arena.checkpoint, 1)?[0]["item_id"].clone();
    let mut server = arena.serve(&flags)?;
    let change = |answer: crate::attack::server::Answer, what: &str| {
        anyhow::ensure!(answer.status == 200, "{what}: {} {}", answer.status, answer.text);
        Ok(())
    };
    change(server.post("/v1/models/victim/load", r#"{"directory":"state","label":"canary"}"#)?, "load")?;
    let patch = json!({"remove": [item]}).to_string();
    change(server.patch("/v1/models/default/catalog", &patch)?, "patch")?;
    let before = facts(&server)?;
    server.end("KILL", Duration::from_secs(10))?;
    let server = arena.serve(&flags)?;
    let after = facts(&server)?;
    let mut outcome = Outcome {
        happened: "a patch, a load and a label, then kill -9 and a restart".into(),
        ..Outcome::default()
    };
    outcome.expect(before == after, format!("before {before}, after {after}"));
    Ok(outcome)
}

/// What is loaded, under which labels, with which catalogs.
fn facts(server: &Server) -> Result<Value> {
    let models: Value = serde_json::from_str(&server.get("/v1/models")?.text)?;
    let models = models["models"].as_array().cloned().unwrap_or_default();
    let fact = |model: &Value| {
        let catalog = &model["catalog"];
        json!([model["name"], model["version"], model["labels"], catalog["version"], catalog["items"]])
    };
    Ok(models.iter().map(fact).collect())
}
