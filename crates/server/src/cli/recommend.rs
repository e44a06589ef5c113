//! `beamline recommend`: one request from the command line, by the same service as over HTTP.

use std::process::ExitCode;

use anyhow::anyhow;
use beamline_catalog::SidPart;

use super::output;
use crate::api::{Filters, HistoryAction, Normalization, Reason, RecommendRequest, RecommendResponse};
use crate::logging;
use crate::runtime::{Runtime, Scale};
use crate::settings::{Flags, HttpLayer, Settings};

/// Flags of `recommend`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Try it:
  beamline recommend --checkpoint DIR --history item-1,item-2 --num-items 5 --exclude-seen
  beamline recommend --checkpoint DIR --cold-start --json")]
pub(super) struct Args {
    /// Items of the history, oldest first.
    #[arg(long, value_name = "IDS", value_delimiter = ',', required_unless_present_any = ["prompt", "cold_start"])]
    history: Vec<String>,
    /// A prompt instead of a history.
    #[arg(long, value_name = "TEXT", conflicts_with = "history")]
    prompt: Option<String>,
    /// An empty history.
    #[arg(long, conflicts_with_all = ["history", "prompt"])]
    cold_start: bool,
    /// Items wanted.
    #[arg(short, long, value_name = "N", default_value_t = 10)]
    num_items: u64,
    /// Width of the beam [default: 50, or --num-items if that is more].
    #[arg(short, long, value_name = "N")]
    beam_width: Option<u64>,
    /// Scores relative to the allowed continuations instead of the whole vocabulary.
    #[arg(long)]
    allowed_set: bool,
    /// Only items whose semantic ID begins with these codes.
    #[arg(long, value_name = "CODES", value_delimiter = ',')]
    sid_prefix: Option<Vec<String>>,
    /// Never these items.
    #[arg(long, value_name = "IDS", value_delimiter = ',')]
    exclude: Vec<String>,
    /// Never items of the history.
    #[arg(long)]
    exclude_seen: bool,
    /// Only items with all of these tags.
    #[arg(long, value_name = "TAGS", value_delimiter = ',')]
    require_tags: Vec<String>,
    /// Never items with one of these tags.
    #[arg(long, value_name = "TAGS", value_delimiter = ',')]
    forbid_tags: Vec<String>,
    /// Print the whole answer as JSON.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    flags: Flags,
}

pub(super) fn run(args: Args) -> anyhow::Result<ExitCode> {
    let settings = Settings::resolve(args.flags.clone(), HttpLayer::default())?;
    logging::start(&settings.log, "warn")?;
    let json = args.json;
    let request = request(args);
    let runtime = Runtime::load(&settings, Scale::OneRequest)?;
    let service = runtime.service.patient();
    let answer = super::tokio_runtime()?
        .block_on(async {
            tokio::spawn(async move { service.recommend(request, "recommend".into()).await }).await
        })?
        .map_err(|error| anyhow!("{}: {error}", error.class().kind))?;
    if json {
        output::print(&(serde_json::to_string_pretty(&answer)? + "\n"))?;
    } else {
        output::print(&readable(&answer))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn request(args: Args) -> RecommendRequest {
    let action = |item_id| HistoryAction { item_id, action: None, timestamp: None, features: None };
    let part = |text: String| text.parse().map_or_else(|_| SidPart::from(text.as_str()), SidPart::Code);
    RecommendRequest {
        history: args.prompt.is_none().then(|| args.history.into_iter().map(action).collect()),
        prompt: args.prompt,
        sid_prefix: args.sid_prefix.map(|parts| parts.into_iter().map(part).collect()),
        num_items: Some(args.num_items),
        beam_width: args.beam_width,
        normalization: args.allowed_set.then_some(Normalization::AllowedSet),
        filters: Some(Filters {
            exclude_items: args.exclude,
            exclude_seen: args.exclude_seen,
            require_tags: args.require_tags,
            forbid_tags: args.forbid_tags,
            allow_items: None,
        }),
        ..RecommendRequest::default()
    }
}

fn readable(answer: &RecommendResponse) -> String {
    let titles = answer.items.iter().any(|item| item.title.is_some());
    let row = |item: &crate::api::Item| {
        let sid: Vec<String> = item
            .sid
            .iter()
            .map(|part| match part {
                SidPart::Code(code) => code.to_string(),
                SidPart::Token(text) => text.to_string(),
            })
            .collect();
        let mut row = vec![item.rank.to_string(), format!("{:.4}", item.score), item.item_id.clone()];
        row.extend(titles.then(|| item.title.clone().unwrap_or_default()));
        row.push(sid.join(" "));
        row
    };
    let rows: Vec<Vec<String>> = answer.items.iter().map(row).collect();
    let mut text = if titles {
        output::table(&["rank", "score", "item", "title", "sid"], &[true, true, false, false, false], &rows)
    } else {
        output::table(&["rank", "score", "item", "sid"], &[true, true, false, false], &rows)
    };
    let reason = answer.reason.map(|reason| match reason {
        Reason::FiltersLeaveNothing => "the filters leave nothing",
        Reason::FewerItemsThanRequested => "the filters leave no more",
    });
    if let Some(reason) = reason {
        text.push_str(&format!("{} of {} items: {reason}\n", answer.items_returned, answer.items_requested));
    }
    if !answer.unknown_items.is_empty() {
        text.push_str(&format!("not in the catalog, skipped: {}\n", answer.unknown_items.join(", ")));
    }
    if answer.dropped_history > 0 {
        text.push_str(&format!("oldest items cut off: {}\n", answer.dropped_history));
    }
    let (usage, timings) = (answer.usage, answer.timings_ms);
    text.push_str(&format!(
        "\n{} context tokens, {} beams, {:.1} ms (context {:.1}, generation {:.1})\n",
        usage.context_tokens, usage.beam_width, timings.total, timings.prefill, timings.decode
    ));
    text
}
