//! The rows of a step, and the device memory that it is computed in.
//!
//! Place in the flow: the executor fills a [`Step`] through the [model](super::model), which sends it in
//! one piece and runs it.

use std::sync::Arc;

use beamline_compute::cuda::device::{Device, DeviceError, Scratch};
use beamline_compute::cuda::rows::RowArrays;
use beamline_compute::cuda::upload::Upload;

use super::embedding::Embedded;
use super::layout::HstuLayout;
use super::stack::{StackArrays, Workspace};

/// The rows of a step. All vectors are reused.
#[derive(Debug, Default)]
pub struct Step {
    /// Rows, cut into items.
    pub layout: HstuLayout,
    pub(super) embedded: Embedded,
}

impl Step {
    /// Makes it empty and keeps its memory.
    pub fn clear(&mut self) {
        self.layout.clear();
        self.embedded.clear();
    }
}

/// Device memory of a step, reused from step to step.
#[derive(Debug)]
pub struct StepMemory {
    upload: Upload,
    arrays: Scratch,
    hidden: Scratch,
    /// Of the layers.
    pub workspace: Workspace,
    pub(super) finished: Scratch,
    pub(super) bounds: Scratch,
}

impl StepMemory {
    /// Nothing yet.
    ///
    /// # Errors
    ///
    /// When the device has no memory.
    pub fn new(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        let scratch = || Scratch::new(device, 1 << 16);
        Ok(Self {
            upload: Upload::default(),
            arrays: scratch()?,
            hidden: scratch()?,
            workspace: Workspace::new(device)?,
            finished: scratch()?,
            bounds: scratch()?,
        })
    }

    /// Room for the residual stream: this number of values in single precision.
    ///
    /// # Errors
    ///
    /// When the device has less memory.
    pub fn hidden(&mut self, values: usize) -> Result<u64, DeviceError> {
        self.hidden.at_least(4 * values)
    }

    /// Copies the arrays of a step whose layout is finished. `beams` describes how rows of beams are
    /// filled in, given the address of the page tables. Returns the addresses of the arrays and of the
    /// actions.
    ///
    /// # Errors
    ///
    /// When the device fails, or `beams` does.
    pub fn send<T: bytemuck::NoUninit, E: From<DeviceError>>(
        &mut self,
        device: &dyn Device,
        step: &Step,
        beams: impl FnOnce(u64) -> Result<Vec<T>, E>,
    ) -> Result<(StackArrays, u64), E> {
        let (layout, upload) = (&step.layout, &mut self.upload);
        upload.clear();
        let rows = layout.rows.upload(upload);
        let items = [upload.push(&layout.items.many), upload.push(&layout.items.few)];
        let final_items = [upload.push(&layout.final_items.many), upload.push(&layout.final_items.few)];
        let times = upload.push(&layout.times);
        let lineage = upload.push(&layout.lineage);
        let actions = upload.push(&step.embedded.actions);
        let fill = |base: u64| beams(base + rows.pages);
        let (base, requests) = upload.send(device, &mut self.arrays, layout.rows.requests.len(), fill)?;
        let arrays = StackArrays {
            rows: RowArrays { requests, lineage: base + lineage, ..rows.at(base) },
            items: items.map(|at| base + at),
            final_items: final_items.map(|at| base + at),
            times: base + times,
        };
        Ok((arrays, base + actions))
    }
}
