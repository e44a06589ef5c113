//! How large everything of a model is made: told from its configuration, before anything large is read.
//!
//! Place in the flow: a checkpoint was opened; memory is asked for by what is planned here, and weights and pages are made by it.
//!
//! Invariant: the memory of a plan is at least what the model takes.

use beamline_model::convention::format::Format;
use beamline_model::families::tokens::DeviceLimits;
use beamline_model::step::ContextShape;

use super::sizing::LargestRequest;
use super::{AnyCheckpoint, Files, LoadError, Machine, Scale, gpu, host, sizing};
use crate::service::{MAX_CANDIDATES, MICRO_BATCH, Memory};
use crate::settings::{EngineSettings, Settings};

/// How large everything is made.
pub(super) struct LoadPlan {
    /// What a request holds at a time.
    pub(super) largest: LargestRequest,
    /// Most expansions of a request: of candidates, each overwrites the one before.
    pub(super) generated_steps: usize,
    pub(super) page_bytes: usize,
    pub(super) pages: u32,
    pub(super) words_per_position: usize,
    pub(super) pairs_per_row: u64,
    pub(super) memory: Memory,
    /// What of it is of this machine's memory.
    pub(super) here: usize,
    /// Of a model that reads tokens.
    pub(super) format: Option<Format>,
}

/// How much memory a model takes, at most.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bytes {
    /// Of a page.
    pub(super) page: usize,
    /// Of the weights, where the model runs.
    pub(super) weights: usize,
    /// Of weights in this machine's memory, beside those on a graphics processor.
    pub(super) beside: usize,
}

impl Bytes {
    /// Of a model that runs on the CPU.
    pub(super) fn here(page: usize, weights: usize) -> Self {
        Self { page, weights, beside: 0 }
    }
}

impl LoadPlan {
    pub(super) fn new(
        files: &Files,
        checkpoint: &AnyCheckpoint,
        settings: &Settings,
        scale: Scale,
        machine: &Machine,
    ) -> Result<Self, LoadError> {
        let EngineSettings { weight_format, kv_format, .. } = settings.engine;
        let (largest, generated_steps, bytes, words_per_position, pairs_per_row, format) = match checkpoint {
            AnyCheckpoint::Tokens(checkpoint) => {
                let facts = checkpoint.facts();
                let format = files.format()?;
                let steps = format.steps();
                // A context that cannot be cut takes one step. A longer history loses its oldest items.
                let most = match facts.shape {
                    ContextShape::Causal => settings.engine.max_context,
                    ContextShape::Whole => settings.engine.max_context.min(settings.engine.max_step_tokens),
                };
                let context = sizing::context_limit(facts.max_positions, steps, most)?;
                let largest = LargestRequest { context, beams: settings.limits.max_beam_width, steps };
                let positions = context.saturating_add(steps);
                let limits = DeviceLimits { positions, steps, beams: largest.beams };
                let bytes = match &machine.gpu {
                    Some(_) => checkpoint.device_bytes(limits).map_err(|source| files.blame(source))?,
                    None => checkpoint.bytes(positions, weight_format, kv_format),
                };
                let bytes = Bytes::here(bytes.page, bytes.weights);
                (largest, steps, bytes, 1, facts.pairs_per_row, Some(format))
            }
            AnyCheckpoint::Hstu(checkpoint) => {
                let config = checkpoint.config();
                let context = config.max_context();
                let (largest, generated) = match config.semantic_id_levels() {
                    Some(levels) => {
                        let (beams, steps) = (settings.limits.max_beam_width, levels.len());
                        (LargestRequest { context, beams, steps }, steps)
                    }
                    // Each micro-batch overwrites the one before: two steps say how much a request holds at a time.
                    None => (
                        LargestRequest { context, beams: MICRO_BATCH, steps: 2 },
                        1 + MAX_CANDIDATES.div_ceil(MICRO_BATCH),
                    ),
                };
                let bytes = match &machine.gpu {
                    Some(_) => gpu::hstu_sizes(files, checkpoint, settings.limits.max_beam_width)?,
                    None => Bytes::here(
                        config.stack.page_shape(kv_format).page_bytes(),
                        // Tables stay in single precision, and the items to retrieve from are packed beside theirs.
                        checkpoint.tensors().parameters().saturating_mul(8),
                    ),
                };
                (largest, generated, bytes, config.words_per_position(), config.stack.pairs_per_row(), None)
            }
        };
        let kv_memory = match &machine.gpu {
            Some(gpu) => settings.engine.kv_memory.or_else(|| gpu::kv_memory(&**gpu, bytes.weights, scale)),
            None => settings.engine.kv_memory,
        };
        let page_bytes = bytes.page;
        let pages = sizing::pages(kv_memory, page_bytes, largest, scale)?;
        let memory = Memory {
            weights: bytes.weights,
            kv: page_bytes.saturating_mul(pages as usize),
            kv_host: host::bytes(settings, page_bytes, largest, scale)?,
            kv_disk: host::disk_bytes(settings, machine, page_bytes, words_per_position, largest, scale)?,
        };
        // What lies in the memory of a graphics processor is not of this machine's.
        let here = match &machine.gpu {
            Some(_) => memory.kv_host.saturating_add(memory.kv_disk).saturating_add(bytes.beside),
            None => memory.total(),
        };
        Ok(Self {
            largest,
            generated_steps,
            page_bytes,
            pages,
            words_per_position,
            pairs_per_row,
            memory,
            here,
            format,
        })
    }
}
