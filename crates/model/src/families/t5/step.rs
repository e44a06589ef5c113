//! Rows of an encoder-decoder in a step on the CPU.
//!
//! The tokens of a context are those of the encoder and one more, the row that the decoder starts with;
//! the context comes whole, in one chunk:
//!
//! ```text
//! positions 0..n + 1, nothing cached     the encoder, keys and values of cross-attention, the start row
//! positions n..n + 1, all of it cached   the start row alone, which writes nothing
//! branch steps                           beams, over the pages of both
//! ```

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::{Rows, Scores};
use beamline_compute::cpu::pages::PageStore;

use super::batch::{T5Batch, WholeContext};
use super::config::T5Config;
use super::{T5, Workspace};
use crate::error::ModelError;
use crate::executor::cpu::CpuFamily;
use crate::rows::{BeamRows, ContextPart};
use crate::task::{Context, Head};

impl CpuFamily for T5 {
    type Batch = T5Batch;
    type Workspace = Workspace;

    fn page_store(&self, format: KvFormat, pages: usize) -> Result<PageStore, ModelError> {
        self.page_store(format, pages)
    }

    fn head(&self) -> Head {
        Head::Tokens
    }

    fn width(&self) -> usize {
        self.config().d_model
    }

    fn clear(batch: &mut T5Batch) {
        batch.clear();
    }

    fn clear_wave(batch: &mut T5Batch) {
        batch.clear_part();
    }

    fn wanted(batch: &T5Batch) -> usize {
        batch.rows()
    }

    /// The start row is wanted in any case.
    fn push_context(
        &self,
        _cpu: &Cpu,
        batch: &mut T5Batch,
        context: &Context,
        part: ContextPart<'_>,
    ) -> Result<(), String> {
        let tokens = context.as_tokens()?;
        let cached = is_cached(&part, tokens, self.config())?;
        batch.push_context(WholeContext { owner: part.owner, tokens, cached, pages: part.pages })
    }

    fn push_beams(&self, batch: &mut T5Batch, context: &Context, rows: BeamRows<'_>) -> Result<(), String> {
        batch.push_beams(rows.at(context.len()))
    }

    fn check_writes(batch: &mut T5Batch, pages: usize) -> Result<(), String> {
        batch.check_writes(pages)
    }

    fn forward(
        &self,
        cpu: &Cpu,
        batch: &T5Batch,
        pages: &mut PageStore,
        workspace: &mut Workspace,
        beat: &mut dyn FnMut(),
    ) {
        self.forward(cpu, batch, pages, workspace, beat);
    }

    fn states(workspace: &Workspace) -> &[f32] {
        workspace.hidden()
    }

    fn score(&self, cpu: &Cpu, states: &[f32], rows: &mut Rows, scores: &mut Scores) {
        self.score(cpu, states, rows, scores);
    }
}

/// Whether the whole context lies in pages already.
///
/// # Errors
///
/// When the rows are a part of a context only, the context is too long, or a token is not in the vocabulary.
fn is_cached(part: &ContextPart<'_>, tokens: &[u32], config: &T5Config) -> Result<bool, String> {
    if let Some(token) = tokens.iter().find(|&&token| token as usize >= config.vocab_size) {
        return Err(format!("token {token} is not in the vocabulary of {}", config.vocab_size));
    }
    let (positions, len, most) = (&part.positions, tokens.len(), config.max_positions());
    if len > most {
        return Err(format!("a context of {len} positions, at most {most} are supported"));
    }
    if len < 2 {
        return Err("a context needs a token for the encoder and one that the decoder starts with".into());
    }
    match part.cached {
        0 if *positions == (0..len) => Ok(false),
        cached if cached == len && *positions == (len - 1..len) => Ok(true),
        cached => Err(format!(
            "positions {positions:?} with {cached} of {len} cached: an encoder takes its context whole, or all of it was cached"
        )),
    }
}
