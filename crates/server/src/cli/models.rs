//! `beamline models`: lists and changes the models of a running server.

use std::process::ExitCode;

use anyhow::bail;
use serde_json::{Value, json};

use super::client::{self, ModelFlag, Payload, ServerArgs};
use super::output;
use crate::api::LoadRequest;
use crate::settings::ByteSize;

/// Subcommands for the models of a server.
#[derive(Debug, clap::Subcommand)]
#[command(after_help = "\
Try it:
  beamline models list
  beamline models load shop --directory 2026-11-21 --label canary
  beamline models label shop stable 0123456789ab        switch
  beamline models label shop stable --previous          roll back
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
    /// Load a checkpoint from under the server's --model-root, beside the models that it serves.
    Load {
        /// The model, which is also the name of its directory under the model root.
        #[arg(value_name = "MODEL", num_args = 0..=1)]
        words: Vec<String>,
        #[command(flatten)]
        model: ModelFlag,
        /// The checkpoint's directory within that, if the model has several.
        #[arg(long, value_name = "NAME")]
        directory: Option<String>,
        /// Label to point at the version once it takes requests [default: stable, if the model has
        /// none].
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
    /// Unload a version and free its memory, once the requests that began on it have ended.
    Unload {
        /// The model, then the version, as `list` shows it.
        #[arg(value_names = ["MODEL", "VERSION"], num_args = 0..=2)]
        words: Vec<String>,
        #[command(flatten)]
        model: ModelFlag,
        #[command(flatten)]
        server: ServerArgs,
    },
    /// Point a label at a loaded version: new requests get it from then on.
    Label {
        /// The model, then the label (`stable` is for requests without one), then the version, as
        /// `list` shows it.
        #[arg(value_names = ["MODEL", "LABEL", "VERSION"], num_args = 0..=3)]
        words: Vec<String>,
        #[command(flatten)]
        model: ModelFlag,
        /// Roll back: point the label at the other version, if exactly two are loaded.
        #[arg(long, conflicts_with = "delete")]
        previous: bool,
        /// Delete the label instead.
        #[arg(long)]
        delete: bool,
        #[command(flatten)]
        server: ServerArgs,
    },
}

pub(super) fn run(command: Command) -> anyhow::Result<ExitCode> {
    super::warn_of_variables();
    match command {
        Command::List { json, server } => {
            let list = server.call("GET", "/v1/models", Payload::None)?;
            let text = if json { serde_json::to_string_pretty(&list)? + "\n" } else { table(&list) };
            output::print(&text)?;
        }
        Command::Load { words, model, directory, label, catalog, convention, server } => {
            let usage = "beamline models load shop --directory 2026-11-21";
            let (name, []) = model.split(&words, [], usage)?;
            let path = format!("/v1/models/{}/load", client::name("model", name)?);
            let request = LoadRequest { directory, label, catalog, convention };
            let loaded = server.call("POST", &path, Payload::Json(serde_json::to_value(request)?))?;
            say("loaded", &loaded)?;
        }
        Command::Unload { words, model, server } => {
            let usage = "beamline models unload shop ba9876543210";
            let (name, [version]) = model.split(&words, ["VERSION"], usage)?;
            let path = format!("/v1/models/{}/unload", client::name("model", name)?);
            let gone = server.call("POST", &path, Payload::Json(json!({"version": version})))?;
            say("unloaded", &gone)?;
        }
        Command::Label { words, model, previous, delete, server } => {
            label(&words, &model, previous, delete, &server)?;
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn label(
    words: &[String],
    model: &ModelFlag,
    previous: bool,
    delete: bool,
    server: &ServerArgs,
) -> anyhow::Result<()> {
    let path = |name: &str, label: &str| -> anyhow::Result<String> {
        let (name, label) = (client::name("model", name)?, client::name("label", label)?);
        Ok(format!("/v1/models/{name}/labels/{label}"))
    };
    if delete {
        let usage = "beamline models label shop canary --delete";
        let (name, [label]) = model.split(words, ["LABEL"], usage)?;
        server.call("DELETE", &path(name, label)?, Payload::None)?;
        output::print(&format!("deleted {name}@{label}\n"))?;
        return Ok(());
    }
    let (name, label, version) = if previous {
        let usage = "beamline models label shop stable --previous";
        let (name, [label]) = model.split(words, ["LABEL"], usage)?;
        let list = server.call("GET", "/v1/models", Payload::None)?;
        (name, label, other_version(&list, name, label)?)
    } else {
        let usage = "beamline models label shop stable 0123456789ab";
        let (name, [label, version]) = model.split(words, ["LABEL", "VERSION"], usage)?;
        (name, label, version.to_owned())
    };
    let moved = server.call("PUT", &path(name, label)?, Payload::Json(json!({"version": version})))?;
    Ok(say(&format!("{label} points at"), &moved)?)
}

/// The version that a label does not point at, if there is exactly one.
fn other_version(list: &Value, name: &str, label: &str) -> anyhow::Result<String> {
    let of_model = || list["models"].as_array().into_iter().flatten().filter(|model| model["name"] == name);
    let has_label =
        |model: &Value| model["labels"].as_array().is_some_and(|labels| labels.iter().any(|l| l == label));
    if !of_model().any(&has_label) {
        bail!("{name} has no label {label}; `beamline models list` shows the labels that it has");
    }
    let others: Vec<String> =
        of_model().filter(|model| !has_label(model)).map(|model| text(&model["version"])).collect();
    match others.as_slice() {
        [other] => Ok(other.clone()),
        [] => bail!(
            "no other version of {name} is loaded: load the earlier one first, with `beamline models load {name}`"
        ),
        _ => bail!(
            "{name} has several other versions, {}: name the one to point {label} at",
            others.join(", ")
        ),
    }
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
    output::table(&header, &right, &rows) + &used + &loading(list)
}

/// The model that is being loaded, and the progress, if the server reports one.
fn loading(list: &Value) -> String {
    let Some(name) = list["loading"].as_str() else { return String::new() };
    let progress = &list["load_progress"];
    let far = match (progress["stage"].as_str(), &progress["step"], &progress["steps"]) {
        (Some(stage), Value::Number(step), Value::Number(steps)) => {
            format!(", step {step} of {steps}: {stage}, {} s since it began", progress["seconds"])
        }
        _ => String::new(),
    };
    format!("being loaded: {name}{far}\n")
}

fn row(model: &Value) -> Vec<String> {
    let (memory, catalog) = (&model["memory"], &model["catalog"]);
    let parts = ["weights_bytes", "kv_bytes", "kv_host_bytes", "kv_disk_bytes"].map(|part| &memory[part]);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_load_tells_how_far_it_is() {
        let progress = json!({"stage": "building", "step": 2, "steps": 3, "seconds": 40});
        let list = |progress: &Value| json!({"models": [], "loading": "shop", "load_progress": progress});
        assert!(
            table(&list(&progress))
                .ends_with("being loaded: shop, step 2 of 3: building, 40 s since it began\n")
        );
        assert!(table(&list(&Value::Null)).ends_with("being loaded: shop\n"));
        assert!(!table(&json!({"models": [], "loading": null})).contains("being loaded"));
    }

    #[test]
    fn rolling_back_finds_the_other_version() {
        let list = |versions: &[(&str, &[&str])]| {
            let models: Vec<Value> = versions
                .iter()
                .map(|(version, labels)| json!({"name": "shop", "version": version, "labels": labels}))
                .collect();
            json!({"models": models})
        };
        let two = list(&[("new", &["stable"]), ("old", &[])]);
        assert_eq!(other_version(&two, "shop", "stable").unwrap(), "old");
        let error = |list: &Value, label: &str| other_version(list, "shop", label).unwrap_err().to_string();
        assert!(error(&two, "canary").contains("no label canary"));
        assert!(error(&list(&[("new", &["stable"])]), "stable").contains("load the earlier one first"));
        let three = list(&[("new", &["stable"]), ("old", &[]), ("older", &["canary"])]);
        assert!(error(&three, "stable").contains("old, older: name the one"));
    }
}
