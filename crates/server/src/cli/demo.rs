//! `beamline demo`, and `beamline` alone: serve the demo checkpoint and say what to try.

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
use crate::logging;
use crate::registry::Registry;
use crate::settings::{AdminLayer, Flags, HttpLayer, Settings};

/// Where the demo lies within the project.
const DEMO: &str = "weights/demo/checkpoint";
/// Items of the history in the request to try: enough to fill a page, so that a second request finds it cached.
const HISTORY: usize = 12;
/// Visitors of the demo shop, one request per line, beside the checkpoint's directory.
const VISITORS: &str = "../sample_requests.jsonl";
/// Longest of them that is read.
const MAX_VISITOR_BYTES: u64 = 1 << 20;

/// Flags of `demo`.
#[derive(Debug, clap::Args)]
pub(super) struct Args {
    /// The demo checkpoint [default: weights/demo/checkpoint in the project this was built from, or in the current
    /// directory].
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
    logging::start(&settings.log, "info")?;
    let visitor = settings.model.checkpoint.as_deref().and_then(visitor);
    serve::serve(settings, |registry, address| announce(registry, address, visitor.unwrap_or_default()))
}

/// The newest items of the first visitor, if there is one. The demo works without.
fn visitor(checkpoint: &Path) -> Option<Vec<String>> {
    let mut line = Vec::new();
    let file = BufReader::new(File::open(checkpoint.join(VISITORS)).ok()?);
    file.take(MAX_VISITOR_BYTES).read_until(b'\n', &mut line).ok()?;
    let request: RecommendRequest = api::parse(&line).ok()?;
    let mut history = request.history?;
    let newest = history.split_off(history.len().saturating_sub(HISTORY));
    Some(newest.into_iter().map(|action| action.item_id).collect())
}

fn find(named: Option<PathBuf>) -> anyhow::Result<PathBuf> {
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

/// Says what to try.
fn announce(registry: &Registry, address: SocketAddr, mut visitor: Vec<String>) -> io::Result<()> {
    let service = registry.resolve(None).map_err(io::Error::other)?;
    let catalog = &service.served().catalog;
    visitor.retain(|item| catalog.item(item).is_some());
    if visitor.is_empty() {
        visitor = related(catalog).into_iter().map(|item| catalog.item_id(item).to_owned()).collect();
    }
    let items: Vec<_> = visitor.iter().map(|item| json!({"item_id": item})).collect();
    let body = json!({"user_id": "me", "history": items, "num_items": 5, "filters": {"exclude_seen": true}});
    // Within single quotes, a shell ends the string at a quote.
    let body = body.to_string().replace('\'', "'\\''");
    output::print(&format!(
        "\nThe demo is ready. Recommendations for somebody who looked at these items:\n\n\
         curl -s http://{address}/v1/recommend -H 'content-type: application/json' \\\n     -d '{body}'\n\n\
         Run it twice: the second answer reports the cached context in usage.cached_tokens.\n\
         More: http://{address}/v1/models, http://{address}/openapi.json, http://{address}/metrics\n\
         Your own model: beamline serve --checkpoint DIR; all settings: beamline serve --help\n\
         Stop with Ctrl-C.\n\n"
    ))
}

/// A few items that have something in common, so that the answer is worth reading.
fn related(catalog: &Catalog) -> Vec<ItemIndex> {
    let all = || catalog.items();
    // Two tags are shared by fewer items than one.
    let tags = all().next().map(|item| catalog.tags(item).take(2).collect::<Vec<_>>()).unwrap_or_default();
    let shares = |item: &ItemIndex| tags.iter().all(|tag| catalog.tags(*item).any(|other| other == *tag));
    let alike: Vec<ItemIndex> = all().filter(shares).collect();
    let step = (alike.len() / HISTORY).max(1);
    alike.into_iter().step_by(step).take(HISTORY).collect()
}
