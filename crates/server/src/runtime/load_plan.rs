//! How large everything of a model is made: told from its configuration, before anything large is read.
//!
//! Place in the flow: after a checkpoint was opened. The plan decides how much memory to reserve and how
//! weights and pages are made.
//!
//! Invariant: the memory of a plan is at least what the model takes.

use beamline_model::convention::format::Format;
use beamline_model::loaded::{DeviceLimits, Facts, Loaded};
use beamline_model::step::ContextShape;

use super::sizing::LargestRequest;
use super::{Files, LoadError, Machine, Scale, gpu, host, sizing};
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
    /// The part of `memory` that is this machine's.
    pub(super) here: usize,
    /// Of a model that reads tokens.
    pub(super) format: Option<Format>,
}

impl LoadPlan {
    pub(super) fn new(
        files: &Files,
        checkpoint: &dyn Loaded,
        settings: &Settings,
        scale: Scale,
        machine: &Machine,
    ) -> Result<Self, LoadError> {
        let EngineSettings { weight_format, kv_format, .. } = settings.engine;
        let facts = checkpoint.facts();
        let format = match &facts {
            Facts::Tokens(_) => Some(files.format()?),
            Facts::Events(_) => None,
        };
        let (largest, generated_steps) = largest_request(&facts, format.as_ref(), settings)?;
        let positions = largest.context.saturating_add(largest.steps);
        let limits = DeviceLimits { positions, steps: largest.steps, beams: settings.limits.max_beam_width };
        let bytes = match &machine.gpu {
            Some(_) => checkpoint.device_bytes(limits).map_err(|source| files.blame(source))?,
            None => checkpoint.bytes(positions, weight_format, kv_format),
        };
        let words_per_position = facts.words_per_position();
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
            pairs_per_row: facts.pairs_per_row(),
            memory,
            here,
            format,
        })
    }
}

/// The most that a request holds at a time, and its most expansions.
fn largest_request(
    facts: &Facts,
    format: Option<&Format>,
    settings: &Settings,
) -> Result<(LargestRequest, usize), LoadError> {
    let beams = settings.limits.max_beam_width;
    match facts {
        Facts::Tokens(facts) => {
            let steps = format.map_or(0, Format::steps);
            // A context that cannot be cut takes one step. A longer history loses its oldest items.
            let most = match facts.shape {
                ContextShape::Causal => settings.engine.max_context,
                ContextShape::Whole => settings.engine.max_context.min(settings.engine.max_step_tokens),
            };
            let context = sizing::context_limit(facts.max_positions, steps, most)?;
            Ok((LargestRequest { context, beams, steps }, steps))
        }
        Facts::Events(config) => {
            let context = config.max_context();
            Ok(match config.semantic_id_levels() {
                Some(levels) => (LargestRequest { context, beams, steps: levels.len() }, levels.len()),
                // Each micro-batch overwrites the one before, so a request holds two steps at a time.
                None => (
                    LargestRequest { context, beams: MICRO_BATCH, steps: 2 },
                    1 + MAX_CANDIDATES.div_ceil(MICRO_BATCH),
                ),
            })
        }
    }
}
