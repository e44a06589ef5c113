//! HSTU in a step on a graphics processor.

use std::ops::Range;
use std::sync::Arc;

use beamline_compute::cuda::device::{Device, DeviceError, Mark};
use beamline_compute::cuda::pages::DevicePages;
use beamline_compute::cuda::rows::{BranchChunk, Rows};

use super::model::DeviceHstu;
use super::step::{Step, StepMemory};
use crate::executor::cuda::{DeviceFamily, FillBeams, Finished};
use crate::rows::{CandidateRows, ContextPart};
use crate::step::StepError;
use crate::task::{Context, Head};

impl DeviceFamily for DeviceHstu {
    type Step = Step;
    type Memory = StepMemory;

    fn device(&self) -> &Arc<dyn Device> {
        self.device()
    }

    fn memory(&self) -> Result<StepMemory, DeviceError> {
        StepMemory::new(self.device())
    }

    fn page_store(&self, pages: usize) -> Result<DevicePages, DeviceError> {
        self.stack().pages(pages)
    }

    fn head(&self) -> Head {
        self.head()
    }

    fn width(&self) -> usize {
        self.config().stack.model_dim
    }

    fn vocab_size(&self) -> usize {
        self.vocab_size().unwrap_or_default()
    }

    fn clear(step: &mut Step) {
        step.clear();
    }

    fn rows(step: &Step) -> &Rows {
        &step.layout.rows
    }

    fn push_context(&self, step: &mut Step, context: &Context, part: ContextPart<'_>) -> Result<(), String> {
        self.push_context(step, context.as_events()?, part).map_err(|error| error.to_string())
    }

    fn push_beams(&self, step: &mut Step, context: &Context, rows: &BranchChunk<'_>) -> Result<(), String> {
        self.push_beams(step, context.as_events()?, rows).map_err(|error| error.to_string())
    }

    fn push_candidates(
        &self,
        step: &mut Step,
        context: &Context,
        rows: CandidateRows<'_>,
    ) -> Result<(), String> {
        match self.push_candidates(step, context.as_events()?, rows) {
            true => Ok(()),
            false => Err("the model scores no candidates".into()),
        }
    }

    fn finish_rows(step: &mut Step, pages: usize) -> Result<(), String> {
        step.layout.finish(pages)
    }

    fn forward(
        &self,
        step: &Step,
        pages: &DevicePages,
        arrivals: &[Mark],
        memory: &mut StepMemory,
        beams: &FillBeams<'_>,
    ) -> Result<u64, StepError> {
        self.forward(step, pages, arrivals, memory, beams)
    }

    fn finish(&self, states: u64, rows: usize, memory: &mut StepMemory) -> Result<Finished, DeviceError> {
        self.finish(states, rows, memory)
    }

    fn scores(
        &self,
        finished: Finished,
        rows: Range<usize>,
        columns: Range<usize>,
        out: u64,
    ) -> Result<(), DeviceError> {
        self.scores(finished, rows, columns, out)
    }

    fn predict(&self, states: &[f32], context: &Context, candidates: Range<usize>) -> Option<Vec<f32>> {
        self.predict(states, context.as_events().ok()?, candidates)
    }
}
