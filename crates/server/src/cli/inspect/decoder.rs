//! What is special to decoders: sizes, and the convention.

use beamline_model::checkpoint::config::Config;
use beamline_model::convention::Convention;
use beamline_model::convention::format::Format;
use beamline_model::cpu::pages::PageStore;

use super::{Findings, kv_memory, within};
use crate::runtime::Files;

pub(super) fn config(text: &str, findings: &mut Findings) -> Option<Config> {
    // What is wrong with it is told with the weights.
    let config = Config::parse(text).ok()?;
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
    kv_memory(PageStore::bytes_per_page(config.layers, config.kv_heads, config.head_dim), findings);
    Some(config)
}

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
    let convention = findings.take(Convention::bind(format, &files.checkpoint, vocab_size))?;
    findings.notes.extend(convention.notes().iter().map(ToString::to_string));
    findings.line("generated", format!("{} tokens per item", convention.steps().len()));
    match convention.prompt(std::iter::empty::<&[u32]>()) {
        Ok(prompt) => findings.line(
            "prompt",
            format!("{} tokens without items, {} more per item", prompt.len(), convention.tokens_per_item()),
        ),
        Err(error) => findings.problems.push(error.to_string()),
    }
    Some(convention)
}
