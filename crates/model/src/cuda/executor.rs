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

use super::beams::{DeviceSearch, Expansion, Logits};
use super::catalog::DeviceTrie;
use super::device::{Device, DeviceError, Memory, Scratch};
use super::kernels;
use super::layout::{ContextChunk, Layout, Upload};
use super::pages::DevicePages;
use super::qwen::{DeviceQwen, StepArrays, Workspace};
use crate::executor::slots::Slots;
use crate::executor::{Found, Job};
use crate::step::{Plan, Progress, Slot, StepError, StepModel};

/// Bytes of logits that are computed at a time; more rows go in several products.
const LOGITS_BYTES: usize = 512 << 20;

/// A decoder, its pages, and the requests in flight, all in device memory.
#[derive(Debug)]
pub struct DeviceExecutor {
    device: Arc<dyn Device>,
    model: Arc<DeviceQwen>,
    pages: DevicePages,
    slots: Slots<InFlight>,
    /// Tries of the catalogs in use, and of the last one.
    tries: Vec<(Arc<Catalog>, Arc<DeviceTrie>)>,
    layout: Layout,
    upload: Upload,
    expanding: Vec<Slot>,
    buffers: Buffers,
    workspace: Workspace,
}

/// Memory of a step beside the forward pass.
#[derive(Debug)]
struct Buffers {
    /// Arrays of the layout.
    arrays: Scratch,
    /// Descriptors of the expansions.
    steps: Scratch,
    /// Lineages of branch rows.
    lineage: Scratch,
    /// Final states, then logits of some rows, then what is kept of them.
    logits: Scratch,
    kept: Scratch,
    normalizers: Scratch,
    partial: Scratch,
    /// Zero between any two launches.
    arrived: Option<Memory>,
}

#[derive(Debug)]
struct InFlight {
    job: Job,
    search: Option<DeviceSearch>,
}

/// The rows of a search among the wanted ones, and where its logits are kept.
#[derive(Clone, Copy, Debug)]
struct Segment {
    first: usize,
    rows: usize,
    first_token: u32,
    tokens: usize,
    kept: u64,
}

impl From<DeviceError> for StepError {
    fn from(error: DeviceError) -> Self {
        Self(error.to_string())
    }
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
        let scratch = || Scratch::new(&device, 1 << 16);
        let buffers = Buffers {
            arrays: scratch()?,
            steps: scratch()?,
            lineage: scratch()?,
            logits: scratch()?,
            kept: scratch()?,
            normalizers: scratch()?,
            partial: scratch()?,
            arrived: None,
        };
        let workspace = Workspace::new(&device)?;
        Ok(Self {
            device,
            model,
            pages,
            slots: Slots::default(),
            tries: Vec::new(),
            layout: Layout::default(),
            upload: Upload::default(),
            expanding: Vec::new(),
            buffers,
            workspace,
        })
    }

    /// Copies a catalog's trie before the first request asks for it.
    ///
    /// # Errors
    ///
    /// When it does not fit.
    pub fn prepare(&mut self, catalog: &Arc<Catalog>) -> Result<Arc<DeviceTrie>, DeviceError> {
        if let Some((_, trie)) = self.tries.iter().find(|(known, _)| Arc::ptr_eq(known, catalog)) {
            return Ok(Arc::clone(trie));
        }
        let trie = Arc::new(DeviceTrie::new(&self.device, catalog.trie())?);
        // What nobody else holds is not asked for any more.
        self.tries.retain(|(known, _)| Arc::strong_count(known) > 1);
        self.tries.push((Arc::clone(catalog), Arc::clone(&trie)));
        Ok(trie)
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
                ContextChunk {
                    owner: chunk.slot.0,
                    tokens: tokens.ok_or_else(missing)?,
                    first_position: chunk.positions.start,
                    cached: chunk.cached,
                    pages: &plan.pages[chunk.context_pages.clone()],
                    wanted: wanted.is_some(),
                },
            );
            if let Some(width) = wanted {
                self.expanding.push(chunk.slot);
                self.begin(chunk.slot, width)?;
            }
        }
        for branch in &plan.branches {
            let request = self.slots.get_mut(branch.slot)?;
            let search =
                request.search.as_ref().filter(|search| search.steps_done() > 0 && !search.is_over());
            let search = search.ok_or_else(|| StepError(format!("slot {} has no beams", branch.slot.0)))?;
            let (width, steps) = (search.width(), search.steps_done());
            let branch_pages = &plan.pages[branch.branch_pages.clone()];
            if branch_pages.len() * crate::cpu::pages::PAGE_SIZE < steps * width {
                return Err(StepError(format!(
                    "{} branch pages for {steps} steps of {width}",
                    branch_pages.len()
                )));
            }
            self.layout.push_branch(
                shape,
                branch.slot.0,
                width,
                steps,
                request.job.tokens.len(),
                &plan.pages[branch.context_pages.clone()],
                branch_pages,
            );
            self.expanding.push(branch.slot);
        }
        self.layout.check_writes(self.pages.pages()).map_err(StepError)
    }

    /// Begins the search of a request.
    fn begin(&mut self, slot: Slot, width: usize) -> Result<(), StepError> {
        let Some(request) = self.slots.get(slot)?.job.search.clone() else { return Ok(()) };
        let trie = self.prepare(&request.catalog)?;
        let search = DeviceSearch::new(&self.device, request, trie, width)?;
        self.slots.get_mut(slot)?.search = Some(search);
        Ok(())
    }

    /// Copies the arrays of the layout.
    fn upload_arrays(&mut self) -> Result<StepArrays, StepError> {
        let Self { layout, upload, .. } = self;
        upload.clear();
        let tokens = upload.push(&layout.tokens);
        let positions = upload.push(&layout.positions);
        let places = upload.push(&layout.places);
        let pages = upload.push(&layout.pages);
        let prefill = [upload.push(&layout.prefill.many), upload.push(&layout.prefill.few)];
        let final_prefill = [upload.push(&layout.final_prefill.many), upload.push(&layout.final_prefill.few)];
        let branch = [upload.push(&layout.branch.many), upload.push(&layout.branch.few)];
        let merge = upload.push(&layout.merge);
        let wanted = upload.push(&layout.wanted);
        // The descriptors of branch rows hold addresses of this very memory: it is known only when it is large enough.
        let requests_bytes = layout.requests.len() * size_of::<super::beams::BranchRows>();
        let base = self.buffers.arrays.at_least(upload.bytes().len() + requests_bytes + 64)?;
        let first_branch = self.expanding.len() - layout.requests.len();
        let mut rows = Vec::with_capacity(layout.requests.len());
        for (request, slot) in layout.requests.iter().zip(&self.expanding[first_branch..]) {
            let search = self.slots.get(*slot)?.search.as_ref();
            let search = search.ok_or_else(|| StepError(format!("slot {} has no beams", slot.0)))?;
            let own_pages = base + pages + 4 * request.branch_pages as u64;
            rows.push(search.branch_rows(
                own_pages,
                request.context_len,
                request.first_row,
                request.first_lineage,
            ));
        }
        let requests = upload.push(&rows);
        self.device.upload(upload.bytes(), base)?;
        Ok(StepArrays {
            tokens: base + tokens,
            positions: base + positions,
            places: base + places,
            pages: base + pages,
            prefill: prefill.map(|at| base + at),
            final_prefill: final_prefill.map(|at| base + at),
            branch: branch.map(|at| base + at),
            merge: base + merge,
            wanted: base + wanted,
            requests: base + requests,
            lineage: self.buffers.lineage.at_least(4 * layout.lineage_len)?,
        })
    }

    /// Takes the searches of this step further, given the final states of the wanted rows.
    fn expand(&mut self, states: u64) -> Result<(), StepError> {
        let vocab = self.model.config().vocab_size;
        let mut segments = Vec::with_capacity(self.expanding.len());
        let (mut first, mut kept) = (0, 0);
        for slot in &self.expanding {
            let search = self.slots.get(*slot)?.search.as_ref();
            let search = search.ok_or_else(|| StepError(format!("slot {} has no search", slot.0)))?;
            let (rows, window) = (search.rows(), search.window());
            let tokens = (window.end - window.start) as usize;
            segments.push(Segment { first, rows, first_token: window.start, tokens, kept });
            first += rows;
            kept += (4 * rows * tokens).next_multiple_of(16) as u64;
        }
        let rows = first;
        if rows == 0 {
            return Ok(());
        }
        let buffers = &mut self.buffers;
        let kept_base = buffers.kept.at_least(kept as usize)?;
        let normalizers = buffers.normalizers.at_least(4 * rows)?;
        let at_a_time = (LOGITS_BYTES / (4 * vocab)).max(1);
        let logits = buffers.logits.at_least(4 * vocab * at_a_time.min(rows))?;
        let partial =
            buffers.partial.at_least(kernels::log_sum_exp_partial_bytes(at_a_time.min(rows), vocab))?;
        let arrived = match &buffers.arrived {
            Some(arrived) if arrived.bytes() >= 4 * at_a_time.min(rows) => arrived.address(),
            _ => {
                let bytes = 4 * at_a_time.min(rows).next_power_of_two();
                buffers.arrived.insert(Memory::zeroed(&self.device, bytes)?).address()
            }
        };
        for start in (0..rows).step_by(at_a_time) {
            let end = rows.min(start + at_a_time);
            self.model.logits(states, start..end, logits)?;
            for segment in &segments {
                let own = segment.first.max(start)..(segment.first + segment.rows).min(end);
                if own.is_empty() {
                    continue;
                }
                let offset = (own.start - segment.first) * segment.tokens * 4;
                kernels::log_sum_exp(
                    &*self.device,
                    &kernels::LogSumExp {
                        logits: logits + (4 * (own.start - start) * vocab) as u64,
                        rows: own.len(),
                        columns: vocab,
                        out: normalizers + 4 * own.start as u64,
                        kept: kept_base + segment.kept + offset as u64,
                        kept_first: segment.first_token,
                        kept_count: segment.tokens,
                        partial,
                        arrived,
                    },
                )?;
            }
        }
        let mut steps = Vec::with_capacity(segments.len());
        let mut sizes = Expansion::default();
        for (slot, segment) in self.expanding.iter().zip(&segments) {
            if let Some(search) = self.slots.get_mut(*slot)?.search.as_mut() {
                sizes.add(search);
                steps.push(search.expand(Logits {
                    kept: kept_base + segment.kept,
                    normalizers: normalizers + 4 * segment.first as u64,
                }));
            }
        }
        let bytes: &[u8] = bytemuck::cast_slice(&steps);
        let descriptors = self.buffers.steps.at_least(bytes.len())?;
        self.device.upload(bytes, descriptors)?;
        kernels::expand(&*self.device, descriptors, &sizes)?;
        Ok(())
    }

    /// What the step did for a request whose search went on.
    fn outcome(&mut self, slot: Slot) -> Result<Progress<Found>, StepError> {
        let request = self.slots.get_mut(slot)?;
        let Some(search) = &request.search else { return Ok(Progress::Failed("nothing to decode".into())) };
        if !search.is_over() {
            return Ok(Progress::Expanded { rows: search.most() });
        }
        let steps = search.steps_done();
        let found = search.found()?;
        request.search = None;
        Ok(match found {
            Some(hypotheses) => Progress::Finished(Found { hypotheses, steps }),
            None => Progress::Failed(crate::decode::NotFinite.to_string()),
        })
    }

    fn run_plan(
        &mut self,
        plan: &Plan,
        outcomes: &mut Vec<(Slot, Progress<Found>)>,
    ) -> Result<(), StepError> {
        for transfer in &plan.transfers {
            transfer.carry_out(&mut self.pages).map_err(|error| StepError(error.to_string()))?;
        }
        self.lay_out(plan)?;
        let arrays = self.upload_arrays()?;
        let states = self.model.forward(&self.layout, &arrays, &self.pages, &mut self.workspace)?;
        self.expand(states)?;
        self.device.keep_pace()?;
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
