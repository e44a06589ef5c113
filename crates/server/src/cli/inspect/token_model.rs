//! The findings that only models with tokens have: sizes, and the convention.

use beamline_model::convention::Convention;
use beamline_model::convention::format::Format;
use beamline_model::loaded::KvFormat;
use beamline_model::loaded::PAGE_SIZE;
use beamline_model::loaded::{Facts, Summary, TokenFacts};

use super::{Findings, within};
use crate::runtime::Files;
use crate::settings::ByteSize;

/// Adds the settings in config.json.
pub(super) fn describe(summary: &Summary, kv_format: KvFormat, findings: &mut Findings) {
    for (name, value) in &summary.lines {
        findings.line(name, value);
    }
    let rows = match &summary.facts {
        Facts::Tokens(_) => "tokens",
        Facts::Events(_) => "rows",
    };
    let page = ByteSize(summary.page_bytes);
    findings.line("KV memory", format!("{page} per {PAGE_SIZE} context {rows}, in {kv_format}"));
}

/// Adds how histories and items are written as tokens.
pub(super) fn convention(
    files: &Files,
    summary: Option<&Summary>,
    findings: &mut Findings,
) -> Option<Convention> {
    let format: Format = findings.take(files.format().map_err(within))?;
    findings.line("SID", format.level_token_patterns.join(" "));
    findings
        .line("codes", format.level_code_counts.iter().map(u32::to_string).collect::<Vec<_>>().join(", "));
    let facts = summary.and_then(|summary| match &summary.facts {
        Facts::Tokens(facts) => Some(facts),
        Facts::Events(_) => None,
    });
    // Without config.json the size of the vocabulary is unknown, but the tokenizer can still be
    // checked.
    let named = format.vocab_size.unwrap_or(usize::MAX);
    let vocab_size = facts.map_or(named, |facts| facts.vocab_size);
    let convention = match Convention::bind(format, &files.checkpoint, vocab_size) {
        Ok(convention) => convention,
        Err(error) => {
            findings.model_error(&error);
            return None;
        }
    };
    if let Some(Err(error)) = facts.map(|facts: &TokenFacts| convention.start_token(facts)) {
        findings.model_error(&error);
    }
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
