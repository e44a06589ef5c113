//! `beamline demo`, and `beamline` alone: serves the demo checkpoint and prints requests to try.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Read};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use beamline_catalog::{Catalog, ItemIndex};
use serde_json::json;

use super::{output, serve};
use crate::api::{self, RecommendRequest};
use crate::registry::Registry;
use crate::settings::{AdminLayer, Flags, HttpLayer, Settings};

/// The demo checkpoint's directory within the project.
const DEMO: &str = "weights/demo/checkpoint";
/// Items of the history in the printed request: enough to fill a page, so that a second request
/// hits the cache.
const HISTORY: usize = 8;
/// Index of the first of these items: there the visitor turns to things for a baby, as the README
/// says.
const BEGIN: usize = 8;
/// A tag of the demo's items by which a shop would filter.
const IN_STOCK: &str = "in_stock";
/// Visitors of the demo shop, one request per line, beside the checkpoint's directory.
const VISITORS: &str = "../sample_requests.jsonl";
/// Longest line of a visitor that is read, in bytes.
const MAX_VISITOR_BYTES: u64 = 1 << 20;

/// Flags of `demo`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The demo checkpoint [default: weights/demo/checkpoint in the project directory of this
    /// build, or in the current directory].
    #[arg(long, value_name = "DIR", env = "BEAMLINE_DEMO_DIR")]
    demo_dir: Option<PathBuf>,
    #[command(flatten)]
    flags: Flags,
    #[command(flatten)]
    http: HttpLayer,
    #[command(flatten)]
    admin: AdminLayer,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let mut settings = Settings::resolve_server(args.flags, args.http, args.admin)?;
    settings.model.checkpoint = Some(match settings.model.checkpoint {
        Some(named) => named,
        None => find(args.demo_dir)?,
    });
    super::start_log(&settings.log, "info")?;
    let visitor = settings.model.checkpoint.as_deref().and_then(visitor);
    serve::serve(settings, |registry, address| announce(registry, address, visitor.unwrap_or_default()))
}

/// Some items of the first visitor, if the file exists. The demo works without it.
fn visitor(checkpoint: &Path) -> Option<Vec<String>> {
    let mut line = Vec::new();
    let file = BufReader::new(File::open(checkpoint.join(VISITORS)).ok()?);
    file.take(MAX_VISITOR_BYTES).read_until(b'\n', &mut line).ok()?;
    let request: RecommendRequest = api::parse(&line).ok()?;
    Some(request.history?.into_iter().skip(BEGIN).take(HISTORY).map(|action| action.item_id).collect())
}

/// Finds the directory of the demo checkpoint.
///
/// # Errors
///
/// When it is neither in the project directory of this build nor in the current directory.
pub(super) fn find(named: Option<PathBuf>) -> anyhow::Result<PathBuf> {
    if let Some(directory) = named {
        return Ok(directory);
    }
    let built_from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(DEMO);
    let places = [built_from, PathBuf::from(DEMO)];
    match places.iter().find(|place| place.join("config.json").exists()) {
        Some(place) => Ok(place.canonicalize().unwrap_or_else(|_| place.clone())),
        None => bail!(
            "the demo checkpoint is not at {}; run this in a clone of the project, or name one with --demo-dir DIR. \
             To serve your own: beamline serve --checkpoint DIR",
            DEMO
        ),
    }
}

/// Prints requests to try.
fn announce(registry: &Registry, address: SocketAddr, mut visitor: Vec<String>) -> io::Result<()> {
    let service = registry.resolve(None).map_err(io::Error::other)?;
    let catalog = &service.served().catalog;
    visitor.retain(|item| catalog.item(item).is_some());
    if visitor.is_empty() {
        visitor = related(catalog).into_iter().map(|item| catalog.item_id(item).to_owned()).collect();
    }
    let tagged = catalog.items().any(|item| catalog.tags(item).any(|tag| tag == IN_STOCK));
    output::print(&format!(
        "\nThe demo is ready. Ask what somebody who looked at these items wants next:\n\n{}\n\n\
         Run it twice: the second answer reports the cached context in usage.cached_tokens.\n\
         More: http://{address}/v1/models, http://{address}/openapi.json, http://{address}/metrics\n\
         Your own model: beamline serve --checkpoint DIR; all settings: beamline serve --help\n\
         Stop with Ctrl-C.\n\n",
        curl(address, &visitor, tagged)
    ))
}

/// A request to copy: fields in reading order, one item per line, and a readable answer.
fn curl(address: SocketAddr, items: &[String], tagged: bool) -> String {
    let items: Vec<String> =
        items.iter().map(|item| format!("    {{\"item_id\": {}}}", json!(item))).collect();
    let tags = if tagged { format!(", \"require_tags\": [\"{IN_STOCK}\"]") } else { String::new() };
    let body = format!(
        "{{\n  \"user_id\": \"ada\",\n  \"history\": [\n{}\n  ],\n  \"num_items\": 3,\n  \"filters\": {{\"exclude_seen\": true{tags}}}\n}}",
        items.join(",\n")
    );
    // In single quotes, a shell ends the string at the next quote.
    let body = body.replace('\'', "'\\''");
    format!(
        "curl -s http://{address}/v1/recommend -H 'content-type: application/json' -d '{body}' | python3 -m json.tool"
    )
}

/// A few items that have something in common, so that the answer is instructive.
fn related(catalog: &Catalog) -> Vec<ItemIndex> {
    let all = || catalog.items();
    // Fewer items share two tags than one.
    let tags = all().next().map(|item| catalog.tags(item).take(2).collect::<Vec<_>>()).unwrap_or_default();
    let shares = |item: &ItemIndex| tags.iter().all(|tag| catalog.tags(*item).any(|other| other == *tag));
    let alike: Vec<ItemIndex> = all().filter(shares).collect();
    let step = (alike.len() / HISTORY).max(1);
    alike.into_iter().step_by(step).take(HISTORY).collect()
}

#[cfg(test)]
mod tests {
    use super::curl;

    #[test]
    fn the_request_to_copy_survives_quotes() {
        let text = curl(([127, 0, 0, 1], 8080).into(), &["men's \"shirt\"".to_owned()], false);
        assert!(text.contains(r#"{"item_id": "men'\''s \"shirt\""}"#), "{text}");
        assert!(text.ends_with("| python3 -m json.tool") && !text.contains("require_tags"), "{text}");
    }
}
