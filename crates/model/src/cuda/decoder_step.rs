//! Rows of a decoder in a step on a graphics processor, and how they get there.

use std::ops::Range;
use std::sync::Arc;

use beamline_compute::batch::ContextRows;
use beamline_compute::cuda::device::{Device, DeviceError, Mark, Scratch};
use beamline_compute::cuda::kernels::StepArrays;
use beamline_compute::cuda::layout::Layout;
use beamline_compute::cuda::pages::DevicePages;
use beamline_compute::cuda::rows::{BranchChunk, RowArrays, Rows};
use beamline_compute::cuda::upload::Upload;

use super::decoder::{DeviceDecoder, Workspace};
use crate::executor::cuda::{DeviceFamily, FillBeams, Finished};
use crate::rows::ContextPart;
use crate::step::StepError;
use crate::task::{Context, Head};

/// Device memory of a step.
#[derive(Debug)]
pub struct StepMemory {
    upload: Upload,
    /// Arrays of the layout.
    arrays: Scratch,
    /// Lineages of branch rows.
    lineage: Scratch,
    workspace: Workspace,
}

impl StepMemory {
    /// Copies the arrays of a layout. Returns where they lie.
    fn send(
        &mut self,
        device: &dyn Device,
        layout: &Layout,
        beams: &FillBeams<'_>,
    ) -> Result<StepArrays, StepError> {
        let upload = &mut self.upload;
        upload.clear();
        let rows = layout.rows.upload(upload);
        let prefill = [upload.push(&layout.prefill.many), upload.push(&layout.prefill.few)];
        let final_prefill = [upload.push(&layout.final_prefill.many), upload.push(&layout.final_prefill.few)];
        let branch = [upload.push(&layout.branch.many), upload.push(&layout.branch.few)];
        let fill = |base: u64| beams(base + rows.pages);
        let (base, requests) = upload.send(device, &mut self.arrays, layout.rows.requests.len(), fill)?;
        let lineage = self.lineage.at_least(4 * layout.rows.lineage_len)?;
        Ok(StepArrays {
            rows: RowArrays { requests, lineage, ..rows.at(base) },
            prefill: prefill.map(|at| base + at),
            final_prefill: final_prefill.map(|at| base + at),
            branch: branch.map(|at| base + at),
        })
    }
}

impl DeviceFamily for DeviceDecoder {
    type Step = Layout;
    type Memory = StepMemory;

    fn device(&self) -> &Arc<dyn Device> {
        self.device()
    }

    fn memory(&self) -> Result<StepMemory, DeviceError> {
        let scratch = || Scratch::new(self.device(), 1 << 16);
        let (arrays, lineage, workspace) = (scratch()?, scratch()?, Workspace::new(self.device())?);
        Ok(StepMemory { upload: Upload::default(), arrays, lineage, workspace })
    }

    fn page_store(&self, pages: usize) -> Result<DevicePages, DeviceError> {
        let config = self.config();
        DevicePages::new(self.device(), config.layers, config.kv_heads, [self.padded_dim(); 2], pages)
    }

    fn head(&self) -> Head {
        Head::Tokens
    }

    fn width(&self) -> usize {
        self.config().hidden_size
    }

    fn vocab_size(&self) -> usize {
        self.config().vocab_size
    }

    fn clear(layout: &mut Layout) {
        layout.clear();
    }

    fn rows(layout: &Layout) -> &Rows {
        &layout.rows
    }

    fn push_context(
        &self,
        layout: &mut Layout,
        context: &Context,
        part: ContextPart<'_>,
    ) -> Result<(), String> {
        let ContextPart { owner, positions, cached, pages, wanted } = part;
        let tokens = context.as_tokens()?.get(positions.clone()).unwrap_or_default();
        let first_position = positions.start;
        let rows = ContextRows { owner, tokens, first_position, cached, pages, wanted };
        layout.push_context(self.shape(), rows);
        Ok(())
    }

    fn push_beams(
        &self,
        layout: &mut Layout,
        _context: &Context,
        rows: &BranchChunk<'_>,
    ) -> Result<(), String> {
        layout.push_branch(self.shape(), rows);
        Ok(())
    }

    fn finish_rows(layout: &mut Layout, pages: usize) -> Result<(), String> {
        layout.rows.check_writes(pages)
    }

    fn forward(
        &self,
        layout: &Layout,
        pages: &DevicePages,
        arrivals: &[Mark],
        memory: &mut StepMemory,
        beams: &FillBeams<'_>,
    ) -> Result<u64, StepError> {
        let arrays = memory.send(&**self.device(), layout, beams)?;
        Ok(self.forward(layout, &arrays, pages, arrivals, &mut memory.workspace)?)
    }

    /// They are normed already.
    fn finish(&self, states: u64, _rows: usize, _memory: &mut StepMemory) -> Result<Finished, DeviceError> {
        Ok(Finished { states, bounds: 0 })
    }

    fn scores(
        &self,
        finished: Finished,
        rows: Range<usize>,
        _columns: Range<usize>,
        out: u64,
    ) -> Result<(), DeviceError> {
        self.logits(finished.states, rows, out)
    }
}
