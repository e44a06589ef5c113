//! Rows of a decoder in a step on the CPU.

use beamline_compute::batch::{Batch, ContextRows};
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::{Rows, Scores};
use beamline_compute::cpu::pages::PageStore;

use super::{Decoder, Workspace, page_shape};
use crate::error::ModelError;
use crate::executor::cpu::CpuFamily;
use crate::rows::{BeamRows, ContextPart};
use crate::task::{Context, Head};

impl CpuFamily for Decoder {
    type Batch = Batch;
    type Workspace = Workspace;

    fn page_store(&self, format: KvFormat, pages: usize) -> Result<PageStore, ModelError> {
        Ok(PageStore::new(page_shape(self.config(), format), pages)?)
    }

    fn head(&self) -> Head {
        Head::Tokens
    }

    fn width(&self) -> usize {
        self.config().hidden_size
    }

    fn clear(batch: &mut Batch) {
        batch.clear();
    }

    fn clear_wave(batch: &mut Batch) {
        batch.clear_part();
    }

    fn wanted(batch: &Batch) -> usize {
        batch.wanted.len()
    }

    fn push_context(
        &self,
        _cpu: &Cpu,
        batch: &mut Batch,
        context: &Context,
        part: ContextPart<'_>,
    ) -> Result<(), String> {
        let ContextPart { owner, positions, cached, pages, wanted } = part;
        let tokens = context.as_tokens()?.get(positions.clone()).unwrap_or_default();
        let first_position = positions.start;
        batch.push_context(ContextRows { owner, tokens, first_position, cached, pages, wanted });
        Ok(())
    }

    fn push_beams(&self, batch: &mut Batch, context: &Context, rows: BeamRows<'_>) -> Result<(), String> {
        batch.push_branches(rows.at(context.len()));
        Ok(())
    }

    fn check_writes(batch: &mut Batch, pages: usize) -> Result<(), String> {
        batch.check_writes(pages)
    }

    fn forward(
        &self,
        cpu: &Cpu,
        batch: &Batch,
        pages: &mut PageStore,
        workspace: &mut Workspace,
        beat: &mut dyn FnMut(),
    ) {
        self.forward(cpu, batch, pages, workspace, &mut |_, _| beat());
    }

    fn states(workspace: &Workspace) -> &[f32] {
        &workspace.hidden
    }

    fn score(&self, cpu: &Cpu, states: &[f32], rows: &mut Rows, scores: &mut Scores) {
        self.score(cpu, states, rows, scores);
    }
}
