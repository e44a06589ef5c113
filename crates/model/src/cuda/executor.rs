//! Carries out plans on a graphics processor: the [`StepModel`] of a decoder there.
//!
//! Place in the flow: as the CPU's executor; the engine thread owns it. A step is one ragged forward pass over all context and
//! branch rows of the plan, logits of the rows that are expanded, and a step of every search involved, all of it asked for
//! without waiting for it: the host plans the next step while the device runs this one. Only where a request finishes are its beams
//! read back, which waits for the step.
//!
//! Because nothing is waited for, the host does not know how many beams are alive: a branch step has as many rows as the
//! beam is wide, and [`Progress::Expanded`] tells how many there can be at most.
//!
//! Invariant: what happens to one request in a step is independent of the others in it; a request whose logits are not
//! finite fails alone, when it finishes.

use std::sync::Arc;

use beamline_catalog::Catalog;
use beamline_compute::batch::ContextRows;
use beamline_compute::cuda::device::{Device, DeviceError, Scratch};
use beamline_compute::cuda::kernels::StepArrays;
use beamline_compute::cuda::layout::Layout;
use beamline_compute::cuda::pages::DevicePages;
use beamline_compute::cuda::rows::{BranchChunk, RowArrays};
use beamline_compute::cuda::transfers::PageTransfers;
use beamline_compute::cuda::upload::Upload;

use super::beams::DeviceSearch;
use super::catalog::DeviceTrie;
use super::qwen::{DeviceQwen, Workspace};
use super::searches::{self, Searches};
use crate::executor::slots::Slots;
use crate::executor::{Found, Job};
use crate::step::{Plan, Progress, Pulse, Slot, StepError, StepModel};

/// A decoder, its pages, and the requests in flight, all in device memory.
#[derive(Debug)]
pub struct DeviceExecutor {
    device: Arc<dyn Device>,
    model: Arc<DeviceQwen>,
    /// Before the pages: it waits for what uses them.
    transfers: PageTransfers,
    pages: DevicePages,
    slots: Slots<InFlight>,
    searches: Searches,
    layout: Layout,
    upload: Upload,
    expanding: Vec<Slot>,
    /// Arrays of the layout.
    arrays: Scratch,
    /// Lineages of branch rows.
    lineage: Scratch,
    workspace: Workspace,
    pulse: Pulse,
}

#[derive(Debug)]
struct InFlight {
    job: Job,
    search: Option<DeviceSearch>,
}

impl DeviceExecutor {
    /// Allocates `pages` pages for a model.
    ///
    /// # Errors
    ///
    /// When they do not fit.
    pub fn new(model: Arc<DeviceQwen>, pages: usize) -> Result<Self, DeviceError> {
        let device = Arc::clone(model.device());
        let config = model.config();
        let pages =
            DevicePages::new(&device, config.layers, config.kv_heads, [model.padded_dim(); 2], pages)?;
        let workspace = Workspace::new(&device)?;
        Ok(Self {
            transfers: PageTransfers::new(&device, &pages),
            searches: Searches::new(&device)?,
            arrays: Scratch::new(&device, 1 << 16)?,
            lineage: Scratch::new(&device, 1 << 16)?,
            device,
            model,
            pages,
            slots: Slots::default(),
            layout: Layout::default(),
            upload: Upload::default(),
            expanding: Vec::new(),
            workspace,
            pulse: Pulse::default(),
        })
    }

    /// Copies a catalog's trie before the first request asks for it.
    ///
    /// # Errors
    ///
    /// When it does not fit.
    pub fn prepare(&mut self, catalog: &Arc<Catalog>) -> Result<Arc<DeviceTrie>, DeviceError> {
        self.searches.prepare(catalog)
    }

    /// Lays out the rows of a plan, and notes whose searches go on, in the order of their rows.
    fn lay_out(&mut self, plan: &Plan) -> Result<(), StepError> {
        let shape = self.model.shape();
        self.layout.clear();
        self.expanding.clear();
        for chunk in &plan.chunks {
            let request = self.slots.get_mut(chunk.slot)?;
            let tokens = request.job.tokens.get(chunk.positions.clone());
            let missing = || StepError(format!("positions {:?} are not there", chunk.positions));
            let wanted = chunk.expand.filter(|_| request.job.search.is_some());
            self.layout.push_context(
                shape,
                ContextRows {
                    owner: chunk.slot.0,
                    tokens: tokens.ok_or_else(missing)?,
                    first_position: chunk.positions.start,
                    cached: chunk.cached,
                    pages: &plan.pages[chunk.context_pages.clone()],
                    wanted: usize::from(wanted.is_some()),
                },
            );
            if let Some(width) = wanted {
                self.expanding.push(chunk.slot);
                self.begin(chunk.slot, width)?;
            }
        }
        for branch in &plan.branches {
            let request = self.slots.get_mut(branch.slot)?;
            let branch_pages = &plan.pages[branch.branch_pages.clone()];
            let search = searches::going(request.search.as_ref(), branch.slot.0, branch_pages.len())?;
            self.layout.push_branch(
                shape,
                &BranchChunk {
                    owner: branch.slot.0,
                    width: search.width(),
                    ancestors: search.steps_done(),
                    context_len: request.job.tokens.len(),
                    context_pages: &plan.pages[branch.context_pages.clone()],
                    branch_pages,
                },
            );
            self.expanding.push(branch.slot);
        }
        self.layout.rows.check_writes(self.pages.pages()).map_err(StepError)
    }

    /// Begins the search of a request.
    fn begin(&mut self, slot: Slot, width: usize) -> Result<(), StepError> {
        let Some(request) = self.slots.get(slot)?.job.search.clone() else { return Ok(()) };
        let search = self.searches.begin(request, width)?;
        self.slots.get_mut(slot)?.search = Some(search);
        Ok(())
    }

    /// Copies the arrays of the layout.
    fn upload_arrays(&mut self) -> Result<StepArrays, StepError> {
        let Self { layout, upload, slots, .. } = self;
        upload.clear();
        let rows = layout.rows.upload(upload);
        let prefill = [upload.push(&layout.prefill.many), upload.push(&layout.prefill.few)];
        let final_prefill = [upload.push(&layout.final_prefill.many), upload.push(&layout.final_prefill.few)];
        let branch = [upload.push(&layout.branch.many), upload.push(&layout.branch.few)];
        let requests = &layout.rows.requests;
        let of_beams = &self.expanding[self.expanding.len() - requests.len()..];
        let descriptors = |base: u64| {
            let descriptor = |(request, slot): (_, &Slot)| {
                let search = slots.get(*slot)?.search.as_ref();
                let search = search.ok_or_else(|| StepError(format!("slot {} has no beams", slot.0)))?;
                Ok(search.branch_rows(base + rows.pages, request))
            };
            requests.iter().zip(of_beams).map(descriptor).collect::<Result<Vec<_>, StepError>>()
        };
        let (base, requests) = upload.send(&*self.device, &mut self.arrays, requests.len(), descriptors)?;
        let lineage = self.lineage.at_least(4 * layout.rows.lineage_len)?;
        Ok(StepArrays {
            rows: RowArrays { requests, lineage, ..rows.at(base) },
            prefill: prefill.map(|at| base + at),
            final_prefill: final_prefill.map(|at| base + at),
            branch: branch.map(|at| base + at),
        })
    }

    /// Takes the searches of this step further, given the final states of the wanted rows.
    fn expand(&mut self, states: u64) -> Result<(), StepError> {
        let mut going = Vec::with_capacity(self.expanding.len());
        for slot in &self.expanding {
            let search = self.slots.get_mut(*slot)?.search.take();
            going.push(search.ok_or_else(|| StepError(format!("slot {} has no search", slot.0)))?);
        }
        let model = &self.model;
        let logits = |rows, out| model.logits(states, rows, out);
        self.searches.expand(&mut going, model.config().vocab_size, logits)?;
        for (slot, search) in self.expanding.iter().zip(going) {
            self.slots.get_mut(*slot)?.search = Some(search);
        }
        Ok(())
    }

    /// What the step did for a request whose search went on.
    fn outcome(&mut self, slot: Slot) -> Result<Progress<Found>, StepError> {
        Ok(searches::outcome(&mut self.slots.get_mut(slot)?.search)?)
    }

    fn run_plan(
        &mut self,
        plan: &Plan,
        outcomes: &mut Vec<(Slot, Progress<Found>)>,
    ) -> Result<(), StepError> {
        let transferred = self.transfers.begin(&self.pages, &plan.transfers);
        transferred.map_err(|error| StepError(error.to_string()))?;
        self.lay_out(plan)?;
        self.transfers.before_writes(self.layout.rows.written())?;
        let arrays = self.upload_arrays()?;
        let arrivals = self.transfers.arrivals(&self.layout.rows.pages);
        let states = self.model.forward(&self.layout, &arrays, &self.pages, arrivals, &mut self.workspace)?;
        self.pulse.beat();
        self.expand(states)?;
        self.pulse.beat();
        let end = self.device.keep_pace()?;
        self.transfers.end(end, &self.layout.rows.pages);
        for chunk in &plan.chunks {
            let expands = self.expanding.contains(&chunk.slot);
            let progress = match (chunk.expand, expands) {
                (_, true) => self.outcome(chunk.slot)?,
                (None, false) => Progress::Prefilled,
                (Some(_), false) => Progress::Failed("nothing to decode".into()),
            };
            outcomes.push((chunk.slot, progress));
        }
        for branch in &plan.branches {
            outcomes.push((branch.slot, self.outcome(branch.slot)?));
        }
        Ok(())
    }
}

impl StepModel for DeviceExecutor {
    type Payload = Job;
    type Answer = Found;

    fn set_pulse(&mut self, pulse: Pulse) {
        self.pulse = pulse;
    }

    fn open(&mut self, slot: Slot, payload: Job) {
        self.slots.open(slot, InFlight { job: payload, search: None });
    }

    fn step(&mut self, plan: &Plan, outcomes: &mut Vec<(Slot, Progress<Found>)>) -> Result<(), StepError> {
        self.run_plan(plan, outcomes)
    }

    fn close(&mut self, slot: Slot) {
        self.slots.close(slot);
    }
}
