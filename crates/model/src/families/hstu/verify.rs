//! The engine beside the reference in candle-nn: what `beamline inspect --verify` says of a
//! checkpoint.
//!
//! A context is computed in two parts where the mask allows it, the candidates in two micro-batches
//! after it: keys and values are then read from pages, as they are for a request that is served.

use std::sync::Arc;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::pages::PAGE_SIZE;
use beamline_kv_cache::PageId;
use candle_core::{DType, Device};

use super::batch::HstuBatch;
use super::config::HstuConfig;
use super::inputs::Prepared;
use super::retrieval::TopItems;
use super::stack::Workspace;
use super::{Hstu, Task};
use crate::checkpoint::Checkpoint;
use crate::error::ModelError;
use crate::reference::HstuReference;
use crate::reference::verify::Verified;
use crate::reference::verify_hstu::{EngineOutputs, verify_hstu};
use crate::rows::{CandidateRows, ContextPart};
use crate::step::ContextShape;

/// Compares the engine with a second implementation in double precision on random requests.
///
/// # Errors
///
/// When tensors cannot be used.
pub fn verify(checkpoint: &Checkpoint<HstuConfig>, cpu: &Arc<Cpu>) -> Result<Verified, ModelError> {
    let (config, tensors) = (checkpoint.config(), checkpoint.tensors());
    let mut engine = engine_outputs(checkpoint, cpu)?;
    let reference = HstuReference::new(config, tensors, DType::F64, &Device::Cpu)?;
    verify_hstu(&mut *engine, &reference, config)
}

/// The engine's outputs for a request, in single precision on the CPU, one request at a time.
///
/// # Errors
///
/// When tensors cannot be used.
pub fn engine_outputs(
    checkpoint: &Checkpoint<HstuConfig>,
    cpu: &Arc<Cpu>,
) -> Result<Box<EngineOutputs<'static>>, ModelError> {
    let model = Hstu::load(checkpoint, cpu, WeightFormat::F32)?;
    let cpu = Arc::clone(cpu);
    Ok(Box::new(move |request| cpu.run(|| outputs(&model, &cpu, request))))
}

fn outputs(model: &Hstu, cpu: &Cpu, request: &Prepared) -> Result<Vec<f32>, ModelError> {
    let states = states(model, cpu, request)?;
    Ok(match model.task() {
        Task::Tokens(head) => head.logits(cpu, &states),
        Task::Retrieval(retrieval) => {
            let (mut user, items) = (states, retrieval.items());
            retrieval.users(cpu, &mut user);
            let asked = TopItems { count: items.items(), allowed: &|_| true };
            let found = items.top(cpu, &user, &[asked]).remove(0);
            let mut found = found.map_err(|error| ModelError::Internal(error.to_string()))?;
            found.sort_by_key(|scored| scored.item);
            found.iter().map(|scored| scored.score).collect()
        }
        Task::Ranking(_) if request.candidates() == 0 => Vec::new(),
        Task::Ranking(_) => {
            let predictions = model.predict(cpu, &states, request, 0..request.candidates());
            predictions.ok_or_else(|| ModelError::Internal("a model that ranks has no predictions".into()))?
        }
    })
}

/// Final states: of the candidates where there are any, else of the last row of the context.
fn states(model: &Hstu, cpu: &Cpu, request: &Prepared) -> Result<Vec<f32>, ModelError> {
    let (len, candidates) = (request.context_len(), request.candidates());
    let [own, branch] = [len, candidates.div_ceil(2)].map(|rows| rows.div_ceil(PAGE_SIZE) as u32);
    let mut store = model.page_store(KvFormat::F32, (own + branch) as usize)?;
    let (pages, branch_pages): (Vec<_>, Vec<_>) =
        (0..own + branch).map(PageId).partition(|page| page.0 < own);
    let (mut batch, mut workspace) = (HstuBatch::default(), Workspace::default());
    let mut run = |batch: &mut HstuBatch| -> Result<Vec<f32>, ModelError> {
        batch.layout.check_writes(store.pages()).map_err(ModelError::Internal)?;
        model.forward(cpu, batch, &mut store, &mut workspace, &mut |_, _| {});
        batch.clear();
        Ok(workspace.hidden.clone())
    };
    let middle = if model.config().context_shape() == ContextShape::Whole { len } else { len / 2 };
    let mut last = Vec::new();
    for positions in [0..middle, middle..len] {
        if positions.is_empty() {
            continue;
        }
        let part = ContextPart { owner: 0, cached: positions.start, positions, pages: &pages, wanted: 1 };
        let pushed = model.push_context(cpu, &mut batch, request, part);
        pushed.map_err(|error| ModelError::Internal(error.to_string()))?;
        last = run(&mut batch)?;
    }
    if candidates == 0 {
        return Ok(last);
    }
    let (mut states, half) = (Vec::new(), candidates.div_ceil(2));
    for candidates in [0..half, half..candidates] {
        if candidates.is_empty() {
            continue;
        }
        let branch_pages = &branch_pages[..candidates.len().div_ceil(PAGE_SIZE)];
        let rows = CandidateRows { owner: 0, candidates, context_pages: &pages, branch_pages };
        model.push_candidates(cpu, &mut batch, request, rows);
        states.extend(run(&mut batch)?);
    }
    Ok(states)
}
