//! The findings that only HSTU models have: sizes, inputs, answers.

use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::pages::PAGE_SIZE;
use beamline_kv_cache::ReuseClass;
use beamline_model::families::hstu::config::{HstuConfig, ResearchHead, VariantConfig};

use super::Findings;
use crate::settings::ByteSize;

/// Adds the settings in config.json.
pub(super) fn describe(config: &HstuConfig, kv_format: KvFormat, findings: &mut Findings) {
    let stack = &config.stack;
    let variant = match &config.variant {
        VariantConfig::Research(..) => "research",
        VariantConfig::Dlrm(..) => "dlrm",
        VariantConfig::Nvidia(..) => "nvidia",
    };
    findings.line("architecture", format!("hstu, variant {variant}"));
    findings.line(
        "sizes",
        format!(
            "{} layers, width {}, {} heads with keys of {} and values of {}",
            stack.layers, stack.model_dim, stack.heads, stack.key_dim, stack.value_dim
        ),
    );
    let input = match &config.variant {
        VariantConfig::Research(input, _) => {
            let bias = if stack.relative_bias.is_some() { ", times" } else { "" };
            let actions =
                input.actions.map_or(String::new(), |actions| format!(", {} actions", actions.count));
            format!("{} rows in the item table{actions}{bias}", input.num_items + 1)
        }
        VariantConfig::Dlrm(input, _) => {
            let names = input.features.iter().chain([]).map(|feature| feature.name.as_str());
            format!(
                "{}; {} action bits, times",
                names.collect::<Vec<_>>().join(", "),
                input.action_weights.len()
            )
        }
        VariantConfig::Nvidia(input, _) => {
            let tables = input.tables.iter().map(|table| format!("{} ({} rows)", table.name, table.rows));
            tables.collect::<Vec<_>>().join(", ")
        }
    };
    findings.line("reads", input);
    findings.line("history", format!("at most {} events", config.max_events() / config.rows_per_event()));
    let answers = match &config.variant {
        VariantConfig::Research(_, output) => match &output.head {
            ResearchHead::Items { .. } => "POST /v1/recommend: the best items by inner product".to_owned(),
            ResearchHead::Tokens { semantic_id_levels, .. } => {
                let codes = semantic_id_levels.iter().map(|level| level.codes.to_string());
                let codes = codes.collect::<Vec<_>>().join(", ");
                format!("POST /v1/recommend and /v1/rank: semantic IDs, codes by level {codes}")
            }
        },
        VariantConfig::Dlrm(_, output) => {
            ranks(output.tasks.iter().map(|task| task.name.as_str()), config.max_candidates())
        }
        VariantConfig::Nvidia(_, output) => {
            ranks(output.tasks.iter().map(String::as_str), config.max_candidates())
        }
    };
    findings.line("answers", answers);
    findings.line("cached", reuse(config.reuse()));
    let page = stack.page_shape(kv_format).page_bytes();
    findings.line("KV memory", format!("{} per {PAGE_SIZE} context rows, in {kv_format}", ByteSize(page)));
}

/// The part of a user's history that the cache keeps for the next visit.
fn reuse(class: ReuseClass) -> &'static str {
    match class {
        ReuseClass::CrossRequest => "the history, for later requests of the user",
        ReuseClass::CrossRequestMinusLast => "the history but its last event, for later requests of the user",
        ReuseClass::WithinRequest => "the history within one request: each event changes what came before",
        ReuseClass::Exact => "the history, for later requests with exactly the same one",
    }
}

fn ranks<'a>(tasks: impl Iterator<Item = &'a str>, most: usize) -> String {
    let tasks = tasks.collect::<Vec<_>>().join(", ");
    format!("POST /v1/rank: {tasks}, at most {most} candidates")
}
