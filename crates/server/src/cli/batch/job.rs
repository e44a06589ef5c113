//! The settings that affect the output, besides the input. If any of them changes, the answers of
//! an interrupted run belong to another job.
//!
//! Threads, memory, and requests in flight are not here: they only change how fast the answers
//! come.

use std::path::Path;

use serde_json::{Value, json};
use sha2::{Digest, Sha256};

use super::input::hex;
use super::manifest::Job;
use super::trec::TrecRun;
use crate::service::{Family, Served};
use crate::settings::Settings;

/// Names and values of the settings, as they are compared and shown.
pub(super) fn describe(
    settings: &Settings,
    served: &Served,
    timings: bool,
    trec: Option<(&Path, &TrecRun)>,
) -> serde_json::Result<Job> {
    let limits = &settings.limits;
    let convention = match &served.family {
        Family::Tokens(model) => serde_json::to_string(model.convention.format())?,
        Family::Hstu(_) => String::new(),
    };
    let entries = [
        ("beamline version", json!(env!("CARGO_PKG_VERSION"))),
        ("model name", json!(served.name)),
        ("model sha256", json!(served.digest)),
        ("weight-format", json!(served.weight_format)),
        ("kv-format", json!(served.kv_format)),
        ("catalog version", json!(served.catalog.version())),
        ("convention sha256", json!(hex(Sha256::new_with_prefix(convention)))),
        ("context limit", json!(served.context_limit)),
        ("history-cut", json!(format!("{:?}", settings.engine.history_cut).to_lowercase())),
        ("default-beam-width", json!(limits.default_beam_width)),
        ("max-beam-width", json!(limits.max_beam_width)),
        ("max-num-items", json!(limits.max_num_items)),
        ("max-history-items", json!(limits.max_history_items)),
        ("max-list-items", json!(limits.max_list_items)),
        ("max-string-bytes", json!(limits.max_string_bytes)),
        ("max-prompt-bytes", json!(limits.max_prompt_bytes)),
        ("max-timeout-ms", json!(limits.max_timeout.as_millis() as u64)),
        ("max-body-bytes", json!(settings.http.max_body_bytes)),
        ("timings", json!(timings)),
        ("trec", trec.map_or(Value::Null, |(file, _)| json!(file.to_string_lossy()))),
        ("trec-tag", trec.map_or(Value::Null, |(_, run)| json!(run.describe().0))),
        ("trec-scores", trec.map_or(Value::Null, |(_, run)| json!(run.describe().1))),
    ];
    Ok(entries.into_iter().map(|(name, value)| (name.to_owned(), value)).collect())
}
