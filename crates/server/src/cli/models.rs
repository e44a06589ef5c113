//! `beamline models`: what a running server has loaded, and changing it.

use std::process::ExitCode;

use serde_json::{Value, json};

use super::client::{self, Payload, ServerArgs};
use super::output;
use crate::api::LoadRequest;
use crate::settings::ByteSize;

/// What to do with the models of a server.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Try it:
  beamline models list
  beamline models load shop --directory 2026-11-21 --label canary
  beamline models label shop stable 0123456789ab        switch, or roll back
  beamline models unload shop ba9876543210")]
pub(super) enum Command {
    /// List every loaded version, its labels, its catalog and the memory it takes.
    List {
        /// Print the server's answer as JSON.
        #[arg(long)]
        json: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Load a checkpoint from under the server's --model-root, next to what it serves.
    Load {
        /// The model, which is also its directory under the model root.
        name: String,
        /// The checkpoint's directory within that, if the model has several.
        #[arg(long, value_name = "NAME")]
        directory: Option<String>,
        /// Label to point at the version once it takes requests [default: stable, if the model has none].
        #[arg(long)]
        label: Option<String>,
        /// Catalog, a file of the checkpoint [default: catalog.jsonl or catalog.parquet].
        #[arg(long, value_name = "FILE")]
        catalog: Option<String>,
        /// Convention, a file of the checkpoint or a preset [default: convention.json].
        #[arg(long, value_name = "FILE|PRESET")]
        convention: Option<String>,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Take a version out of service and free its memory, once the requests that began on it have ended.
    Unload {
        /// The model.
        name: String,
        /// The version, as `list` shows it.
        version: String,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Point a label at a loaded version: new requests get it from then on.
    Label {
        /// The model.
        name: String,
        /// The label; `stable` is what requests get that name none.
        label: String,
        /// The version, as `list` shows it.
        #[arg(required_unless_present = "delete")]
        version: Option<String>,
        /// Delete the label instead.
        #[arg(long, conflicts_with = "version")]
        delete: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
}

pub(super) fn run(command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::List { json, server } => {
            let list = server.call("GET", "/v1/models", Payload::None)?;
            let text = if json { serde_json::to_string_pretty(&list)? + "\n" } else { table(&list) };
            output::print(&text)?;
        }
        Command::Load { name, directory, label, catalog, convention, server } => {
            let path = format!("/v1/models/{}/load", client::name("model", &name)?);
            let request = LoadRequest { directory, label, catalog, convention };
            let loaded = server.call("POST", &path, Payload::Json(serde_json::to_value(request)?))?;
            say("loaded", &loaded)?;
        }
        Command::Unload { name, version, server } => {
            let path = format!("/v1/models/{}/unload", client::name("model", &name)?);
            let gone = server.call("POST", &path, Payload::Json(json!({"version": version})))?;
            say("unloaded", &gone)?;
        }
        Command::Label { name, label, version, delete: _, server } => {
            let (name, label) = (client::name("model", &name)?, client::name("label", &label)?);
            let path = format!("/v1/models/{name}/labels/{label}");
            match version {
                Some(version) => {
                    let moved = server.call("PUT", &path, Payload::Json(json!({"version": version})))?;
                    say(&format!("{label} points at"), &moved)?;
                }
                None => {
                    server.call("DELETE", &path, Payload::None)?;
                    output::print(&format!("deleted {name}@{label}\n"))?;
                }
            }
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn say(done: &str, model: &Value) -> std::io::Result<()> {
    let labels = labels(model);
    let labels = if labels.is_empty() { String::new() } else { format!(" ({labels})") };
    output::print(&format!("{done} {}@{}{labels}\n", text(&model["name"]), text(&model["version"])))
}

fn table(list: &Value) -> String {
    let rows: Vec<Vec<String>> = list["models"].as_array().into_iter().flatten().map(row).collect();
    let header = ["model", "version", "labels", "state", "catalog", "items", "memory"];
    let right = [false, false, false, false, false, true, true];
    let memory = &list["memory"];
    let size =
        |bytes: &Value| bytes.as_u64().map(|bytes| ByteSize(usize::try_from(bytes).unwrap_or(usize::MAX)));
    let limit = size(&memory["limit_bytes"]).map_or(String::new(), |limit| format!(" of {limit}"));
    let used =
        size(&memory["used_bytes"]).map_or(String::new(), |used| format!("memory taken: {used}{limit}\n"));
    let loading = list["loading"].as_str().map_or(String::new(), |name| format!("being loaded: {name}\n"));
    output::table(&header, &right, &rows) + &used + &loading
}

fn row(model: &Value) -> Vec<String> {
    let (memory, catalog) = (&model["memory"], &model["catalog"]);
    let parts = ["weights_bytes", "kv_bytes", "kv_host_bytes"].map(|part| &memory[part]);
    let parts = parts.into_iter().chain([&catalog["memory_bytes"]]);
    let bytes = parts.fold(0_u64, |sum, part| sum.saturating_add(part.as_u64().unwrap_or(0)));
    let bytes = usize::try_from(bytes).unwrap_or(usize::MAX);
    vec![
        text(&model["name"]),
        text(&model["version"]),
        labels(model),
        text(&model["state"]),
        text(&catalog["version"]),
        catalog["items"].to_string(),
        ByteSize(bytes).to_string(),
    ]
}

fn labels(model: &Value) -> String {
    let labels: Vec<&str> =
        model["labels"].as_array().into_iter().flatten().filter_map(Value::as_str).collect();
    labels.join(", ")
}

fn text(value: &Value) -> String {
    value.as_str().unwrap_or("?").to_owned()
}
