//! `beamline recommend`: one request from the command line, by the same service as over HTTP, or to
//! a running server.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, anyhow, bail};
use beamline_catalog::SidPart;

use super::client::{Payload, ServerArgs};
use super::{demo, output, report};
use crate::api::{self, Filters, HistoryAction, Normalization, Reason, RecommendRequest, RecommendResponse};
use crate::runtime::{Runtime, Scale};
use crate::settings::{Flags, HttpLayer, Settings};

/// Largest request that is read from a file, in bytes.
const MAX_REQUEST_BYTES: u64 = 64 << 20;

/// Flags of `recommend`.
#[derive(Debug, clap::Args)]
#[command(after_help = "\
Try it:
  beamline recommend --history soft-baby-blanket-dogs,soft-night-light-circus           asks the demo
  beamline recommend --checkpoint DIR --history item-1,item-2 --num-items 5 --exclude-seen
  beamline recommend --checkpoint DIR --history item-1@1700000000,item-2@1700003600 --query-time 1700007200
  beamline recommend --checkpoint DIR --cold-start --json
  beamline recommend --server http://127.0.0.1:8080 --request request.json")]
pub(super) struct Args {
    /// Items of the history, oldest first. For a model that reads times, write ITEM@TIME. The time
    /// is a whole number as in the model's training, often seconds since 1970.
    #[arg(long, value_name = "IDS", value_delimiter = ',', value_parser = word,
          required_unless_present_any = ["prompt", "cold_start", "request"])]
    history: Vec<String>,
    /// A prompt instead of a history.
    #[arg(long, value_name = "TEXT", conflicts_with = "history")]
    prompt: Option<String>,
    /// An empty history.
    #[arg(long, conflicts_with_all = ["history", "prompt"])]
    cold_start: bool,
    /// A whole request as JSON, like the body of POST /v1/recommend: a file, or - for stdin.
    #[arg(long, value_name = "FILE", conflicts_with_all = [
        "history", "prompt", "cold_start", "query_time", "num_items", "beam_width", "beam_widths", "allowed_set", "sid_prefix", "exclude",
        "exclude_seen", "require_tags", "forbid_tags",
    ])]
    request: Option<PathBuf>,
    /// Time for which to recommend, for models that read times [default: the newest time of the
    /// history].
    #[arg(long, value_name = "TIME", allow_negative_numbers = true)]
    query_time: Option<i64>,
    /// Number of items [default: 10].
    #[arg(short, long, value_name = "N")]
    num_items: Option<u64>,
    /// Width of the beam [default: 50, or --num-items if that is more].
    #[arg(short, long, value_name = "N")]
    beam_width: Option<u64>,
    /// Instead of one width: how many hypotheses survive each level of the semantic ID, as in
    /// 10,50,80.
    #[arg(long, value_name = "WIDTHS", value_delimiter = ',', conflicts_with = "beam_width")]
    beam_widths: Option<Vec<u64>>,
    /// Scores relative to the allowed continuations instead of the whole vocabulary.
    #[arg(long)]
    allowed_set: bool,
    /// Return only items whose semantic ID begins with these codes.
    #[arg(long, value_name = "CODES", value_delimiter = ',', value_parser = word)]
    sid_prefix: Option<Vec<String>>,
    /// Never return these items.
    #[arg(long, value_name = "IDS", value_delimiter = ',', value_parser = word)]
    exclude: Vec<String>,
    /// Never return items of the history.
    #[arg(long)]
    exclude_seen: bool,
    /// Return only items with all of these tags.
    #[arg(long, value_name = "TAGS", value_delimiter = ',', value_parser = word)]
    require_tags: Vec<String>,
    /// Never return items with one of these tags.
    #[arg(long, value_name = "TAGS", value_delimiter = ',', value_parser = word)]
    forbid_tags: Vec<String>,
    /// Print the whole answer as JSON.
    #[arg(long)]
    json: bool,
    /// Send the request to a running server instead of loading a checkpoint.
    #[arg(long, value_name = "URL")]
    server: Option<String>,
    #[command(flatten)]
    flags: Flags,
}

pub(super) fn run(mut args: Args) -> anyhow::Result<ExitCode> {
    let mut settings = Settings::resolve(std::mem::take(&mut args.flags), HttpLayer::default())?;
    super::start_log(&settings.log, "warn")?;
    let (json, server) = (args.json, args.server.take());
    let request = match &args.request {
        Some(file) => read_request(file)?,
        None => request(args),
    };
    let answer = match (server, settings.model.checkpoint().is_ok()) {
        (Some(_), true) => bail!(
            "--server and a checkpoint are both given: give one of them (the checkpoint may come from \
                                  BEAMLINE_CHECKPOINT or the config file)"
        ),
        (Some(server), false) => {
            let body = Payload::Json(serde_json::to_value(&request)?);
            let answer = ServerArgs::at(server).call("POST", "/v1/recommend", body)?;
            serde_json::from_value(answer)
                .context("the server answers in another form: is it of another version?")?
        }
        (None, named) => {
            if !named {
                settings.model.checkpoint = Some(demo::find(None)?);
                report::line("no --checkpoint DIR and no --server URL: the demo answers");
            }
            ask(&settings, request)?
        }
    };
    if json {
        output::print(&(serde_json::to_string_pretty(&answer)? + "\n"))?;
    } else {
        output::print(&readable(&answer))?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Loads the model and sends it the request.
fn ask(settings: &Settings, request: RecommendRequest) -> anyhow::Result<RecommendResponse> {
    let runtime = Runtime::load(settings, Scale::OneRequest)?;
    let service = runtime.service.patient();
    let answer = super::tokio_runtime()?.block_on(async {
        tokio::spawn(async move { service.recommend(request, "recommend".into()).await }).await
    })?;
    answer.map_err(|error| {
        let cure = match error.param() {
            Some("query_time") => "; give --query-time TIME",
            Some(param) if param.contains("timestamp") => "; give times as --history ITEM@TIME,ITEM@TIME",
            Some(param) if param.contains("features") || param.contains("action") => {
                "; ask with --request FILE"
            }
            _ => "",
        };
        anyhow!("{}: {error}{cure}", error.class().kind)
    })
}

fn read_request(file: &Path) -> anyhow::Result<RecommendRequest> {
    let mut text = Vec::new();
    let read = match file.as_os_str() == "-" {
        true => std::io::stdin().take(MAX_REQUEST_BYTES).read_to_end(&mut text),
        false => {
            std::fs::File::open(file).and_then(|open| open.take(MAX_REQUEST_BYTES).read_to_end(&mut text))
        }
    };
    read.with_context(|| format!("cannot read {}", file.display()))?;
    api::parse(&text).map_err(|error| anyhow!("{}: {error}", file.display()))
}

/// One element of a list, without the blanks around it.
fn word(text: &str) -> Result<String, &'static str> {
    match text.trim() {
        "" => Err("a part of the list is empty: write a,b without a comma too many"),
        word => Ok(word.to_owned()),
    }
}

/// Parses `ITEM` or `ITEM@TIME`. A part after the last `@` that is not a whole number belongs to
/// the item.
fn action(text: String) -> HistoryAction {
    let timed = text.rsplit_once('@').filter(|(item, _)| !item.is_empty());
    let timed = timed.and_then(|(item, time)| Some((item.to_owned(), time.parse().ok()?)));
    let (item_id, timestamp) = timed.map_or((text, None), |(item, time)| (item, Some(time)));
    HistoryAction { item_id, action: None, timestamp, features: None }
}

fn request(args: Args) -> RecommendRequest {
    let part = |text: String| text.parse().map_or_else(|_| SidPart::from(text.as_str()), SidPart::Code);
    let history: Vec<HistoryAction> = args.history.into_iter().map(action).collect();
    let newest = history.iter().filter_map(|action| action.timestamp).max();
    RecommendRequest {
        history: args.prompt.is_none().then_some(history),
        prompt: args.prompt,
        sid_prefix: args.sid_prefix.map(|parts| parts.into_iter().map(part).collect()),
        num_items: args.num_items,
        beam_width: args.beam_width,
        beam_widths: args.beam_widths,
        query_time: args.query_time.or(newest),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_follows_the_last_at_sign() {
        let read = |text: &str| {
            let action = action(text.to_owned());
            (action.item_id, action.timestamp)
        };
        assert_eq!(read("tea"), ("tea".into(), None));
        assert_eq!(read("tea@1700000000"), ("tea".into(), Some(1_700_000_000)));
        assert_eq!(read("a@b@-5"), ("a@b".into(), Some(-5)));
        assert_eq!(read("a@b"), ("a@b".into(), None));
        assert_eq!(read("@5"), ("@5".into(), None));
    }

    #[test]
    fn blanks_around_a_part_do_not_count() {
        assert_eq!(word(" b "), Ok("b".to_owned()));
        assert!(word("  ").is_err());
    }
}
