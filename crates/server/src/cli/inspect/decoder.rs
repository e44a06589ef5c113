//! What is special to decoders: sizes, and the convention.

use beamline_model::checkpoint::config::Config;
use beamline_model::convention::Convention;
use beamline_model::convention::format::Format;
use beamline_model::cpu::kv_format::KvFormat;
use beamline_model::cpu::pages::PAGE_SIZE;
use beamline_model::families::qwen::page_shape;

use super::{Findings, within};
use crate::runtime::Files;
use crate::settings::ByteSize;

/// What config.json says.
pub(super) fn describe(config: &Config, kv_format: KvFormat, findings: &mut Findings) {
    findings.line("architecture", config.architecture.name());
    findings.line(
        "sizes",
        format!(
            "{} layers, hidden {}, feed-forward {}, {} heads of {} over {} key-value heads",
            config.layers,
            config.hidden_size,
            config.intermediate_size,
            config.heads,
            config.head_dim,
            config.kv_heads
        ),
    );
    let head = if config.tied_head { "tied" } else { "untied" };
    findings.line("vocabulary", format!("{} rows, {head} output matrix", config.vocab_size));
    findings.line("positions", config.max_positions);
    let page = page_shape(config, kv_format).page_bytes();
    findings.line("KV memory", format!("{} per {PAGE_SIZE} context tokens, in {kv_format}", ByteSize(page)));
}

/// How histories and items are written as tokens.
pub(super) fn convention(
    files: &Files,
    config: Option<&Config>,
    findings: &mut Findings,
) -> Option<Convention> {
    let format: Format = findings.take(files.format().map_err(within))?;
    findings.line("SID", format.level_token_patterns.join(" "));
    findings
        .line("codes", format.level_code_counts.iter().map(u32::to_string).collect::<Vec<_>>().join(", "));
    // Without config.json the vocabulary's size is unknown; the tokenizer can be looked at all the same.
    let vocab_size = config.map_or(format.vocab_size.unwrap_or(usize::MAX), |config| config.vocab_size);
    let convention = match Convention::bind(format, &files.checkpoint, vocab_size) {
        Ok(convention) => convention,
        Err(error) => {
            findings.model_error(&error);
            return None;
        }
    };
    findings.notes(convention.notes());
    findings.line("generated", format!("{} tokens per item", convention.steps().len()));
    match convention.prompt(std::iter::empty::<&[u32]>()) {
        Ok(prompt) => {
            let cold = if prompt.is_empty() { " (an empty history cannot be answered)" } else { "" };
            let per_item = convention.tokens_per_item();
            findings.line(
                "prompt",
                format!("{} tokens without items{cold}, {per_item} more per item", prompt.len()),
            );
        }
        Err(error) => findings.problem(error),
    }
    Some(convention)
}
