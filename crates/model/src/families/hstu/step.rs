//! Rows of an HSTU model in a step on the CPU, and what is made of their final states.

use std::ops::Range;

use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::{Rows, Scores};
use beamline_compute::cpu::pages::PageStore;

use super::batch::HstuBatch;
use super::retrieval::{Scored, TopItems, UserNotFinite};
use super::stack::Workspace;
use super::{Hstu, Task};
use crate::error::ModelError;
use crate::executor::cpu::CpuFamily;
use crate::rows::{BeamRows, CandidateRows, ContextPart};
use crate::task::{Context, Head};

impl CpuFamily for Hstu {
    type Batch = HstuBatch;
    type Workspace = Workspace;

    fn page_store(&self, format: KvFormat, pages: usize) -> Result<PageStore, ModelError> {
        self.page_store(format, pages)
    }

    fn head(&self) -> Head {
        match self.task() {
            Task::Tokens(_) => Head::Tokens,
            Task::Retrieval(_) => Head::Items,
            Task::Ranking(_) => Head::Predictions,
        }
    }

    fn width(&self) -> usize {
        self.config().stack.model_dim
    }

    fn clear(batch: &mut HstuBatch) {
        batch.clear();
    }

    fn clear_wave(batch: &mut HstuBatch) {
        batch.clear_part();
    }

    fn wanted(batch: &HstuBatch) -> usize {
        batch.layout.wanted.len()
    }

    fn push_context(
        &self,
        cpu: &Cpu,
        batch: &mut HstuBatch,
        context: &Context,
        part: ContextPart<'_>,
    ) -> Result<(), String> {
        self.push_context(cpu, batch, context.as_events()?, part).map_err(|error| error.to_string())
    }

    fn push_beams(&self, batch: &mut HstuBatch, context: &Context, rows: BeamRows<'_>) -> Result<(), String> {
        self.push_tokens(batch, context.as_events()?, rows).map_err(|error| error.to_string())
    }

    fn push_candidates(
        &self,
        cpu: &Cpu,
        batch: &mut HstuBatch,
        context: &Context,
        rows: CandidateRows<'_>,
    ) -> Result<(), String> {
        self.push_candidates(cpu, batch, context.as_events()?, rows);
        Ok(())
    }

    fn check_writes(batch: &mut HstuBatch, pages: usize) -> Result<(), String> {
        batch.layout.check_writes(pages)
    }

    fn forward(
        &self,
        cpu: &Cpu,
        batch: &HstuBatch,
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
        if let Task::Tokens(head) = self.task() {
            head.score(cpu, states, rows, scores);
        }
    }

    fn retrieve(
        &self,
        cpu: &Cpu,
        users: &mut [f32],
        asked: &[TopItems<'_>],
    ) -> Vec<Result<Vec<Scored>, UserNotFinite>> {
        let Task::Retrieval(retrieval) = self.task() else { return Vec::new() };
        retrieval.users(cpu, users);
        retrieval.items().top(cpu, users, asked)
    }

    fn predict(
        &self,
        cpu: &Cpu,
        states: &[f32],
        context: &Context,
        candidates: Range<usize>,
    ) -> Option<Vec<f32>> {
        self.predict(cpu, states, context.as_events().ok()?, candidates)
    }
}
