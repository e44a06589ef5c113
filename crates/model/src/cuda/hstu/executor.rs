//! Carries out plans for an HSTU model on a graphics processor: retrieval, ranking and decoding in the same steps.
//!
//! Place in the flow: as the CPU's executor of the family, with the same words; the engine thread owns it.
//!
//! ```text
//! retrieve   context rows | the last state x all items -> exact best that the filter allows, by a search of one level
//! rank       context rows | candidates | candidates ..  -> their final states are read back, the heads run on the host
//! decode     context rows, the last state expanded | beams | beams ..  as a decoder does it
//! ```
//!
//! Retrieval is a [search](crate::cuda::beams) over a catalog of one level: its kernels find the exact best of any number of candidates under
//! the request's filter, in whichever form that is kept, and nothing but these comes back. Exact is with respect to items and
//! user in bf16. Scores of as many users as fit into a bounded memory are computed at a time.
//!
//! Steps that rank or retrieve are waited for; those that only compute contexts or decode are not, but for the step before.
//!
//! Invariant: what happens to one request in a step is independent of the others in it; a request whose states are not finite fails
//! alone.

use std::sync::Arc;

use beamline_catalog::Catalog;
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::pages::PAGE_SIZE;
use beamline_compute::cuda::device::{Device, DeviceError, Scratch};
use beamline_compute::cuda::pages::DevicePages;
use beamline_compute::cuda::rows::BranchChunk;
use beamline_compute::cuda::transfers::PageTransfers;

use super::model::DeviceHstu;
use super::step::{Step, StepMemory};
use crate::cuda::beams::{DeviceSearch, Logits, MOST_BEAMS};
use crate::cuda::catalog::DeviceTrie;
use crate::cuda::searches::{self, LOGITS_BYTES, Searches};
use crate::decode::{Hypothesis, Normalization, SearchRequest, Step as Generated};
use crate::executor::hstu::{HstuAnswer, HstuJob, Retrieve, Work};
use crate::executor::parts::{MicroBatches, Part};
use crate::executor::slots::Slots;
use crate::families::hstu::retrieval::{Scored, UserNotFinite};
use crate::families::hstu::{PushCandidates, PushContext};
use crate::step::{BranchStep, Chunk, Plan, Progress, Pulse, Slot, StepError, StepModel};

/// A model, its pages, and the requests in flight, all in device memory.
#[derive(Debug)]
pub struct HstuDeviceExecutor {
    device: Arc<dyn Device>,
    model: Arc<DeviceHstu>,
    cpu: Arc<Cpu>,
    /// Before the pages: it waits for what uses them.
    transfers: PageTransfers,
    pages: DevicePages,
    slots: Slots<InFlight>,
    searches: Searches,
    step: Step,
    memory: StepMemory,
    /// Scores of all items of a catalog.
    scores: Scratch,
    /// What the step does, in the order of the plan.
    parts: Vec<(Slot, Part)>,
    pulse: Pulse,
}

#[derive(Debug)]
struct InFlight {
    job: HstuJob,
    search: Option<DeviceSearch>,
    batches: MicroBatches,
}

impl HstuDeviceExecutor {
    /// Allocates `pages` pages for a model. What is left to the host runs on `cpu`.
    ///
    /// # Errors
    ///
    /// When they do not fit.
    pub fn new(model: Arc<DeviceHstu>, cpu: Arc<Cpu>, pages: usize) -> Result<Self, DeviceError> {
        let device = Arc::clone(model.device());
        let pages = model.stack().pages(pages)?;
        Ok(Self {
            transfers: PageTransfers::new(&device, &pages),
            pages,
            searches: Searches::new(&device)?,
            memory: StepMemory::new(&device)?,
            scores: Scratch::new(&device, 1 << 16)?,
            device,
            model,
            cpu,
            slots: Slots::default(),
            step: Step::default(),
            parts: Vec::new(),
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

    /// Lays out the context rows of a chunk, and begins its search if it has one.
    fn push_chunk(&mut self, plan: &Plan, chunk: &Chunk) -> Result<Part, StepError> {
        let request = self.slots.get_mut(chunk.slot)?;
        let context_len = request.job.request.context_len();
        if chunk.positions.end > context_len {
            return Err(StepError(format!("positions {:?} of a context of {context_len}", chunk.positions)));
        }
        let row = self.step.layout.rows.wanted.len();
        // What fails has no rows, so that those of the others are where they are looked for.
        let (search, part) = match (&request.job.work, chunk.expand) {
            (_, None) => (None, Part::Context),
            (Work::Rank, Some(width)) => {
                request.batches.begin(width);
                (None, Part::Prefilled)
            }
            (Work::Retrieve(wanted), Some(_)) if self.model.retrieves() => {
                let width = wanted.count.clamp(1, wanted.catalog.num_leaves().max(1));
                (Some((one_level(wanted), width)), Part::Retrieve { row })
            }
            (Work::Decode(search), Some(width)) if self.model.vocab_size().is_some() => {
                (Some((SearchRequest::clone(search), width)), Part::Decode)
            }
            (Work::Retrieve(_), Some(_)) => return Ok(Part::Failed("the model retrieves nothing".into())),
            (Work::Decode(_), Some(_)) => return Ok(Part::Failed("nothing to decode".into())),
            (Work::Warm, Some(_)) => {
                return Ok(Part::Failed("a request that warms the cache expands nothing".into()));
            }
        };
        if let Some((_, width)) = search.as_ref().filter(|(_, width)| *width > MOST_BEAMS) {
            return Ok(Part::Failed(format!("{width} at once: at most {MOST_BEAMS} on CUDA")));
        }
        let rows = PushContext {
            owner: chunk.slot.0,
            positions: chunk.positions.clone(),
            cached: chunk.cached,
            pages: &plan.pages[chunk.context_pages.clone()],
            wanted: usize::from(search.is_some()),
        };
        let pushed = self.model.push_context(&self.cpu, &mut self.step, &request.job.request, rows);
        if let Err(error) = pushed {
            return Ok(Part::Failed(error.to_string()));
        }
        if let Some((search, width)) = search {
            request.search = Some(self.searches.begin(search, width)?);
        }
        Ok(part)
    }

    /// Lays out the branch rows of a request: its next candidates, or its beams.
    fn push_branch(&mut self, plan: &Plan, branch: &BranchStep) -> Result<Part, StepError> {
        let slot = branch.slot;
        let request = self.slots.get_mut(slot)?;
        let job = &request.job.request;
        let row = self.step.layout.rows.wanted.len();
        let (context_pages, branch_pages) =
            (&plan.pages[branch.context_pages.clone()], &plan.pages[branch.branch_pages.clone()]);
        if matches!(request.job.work, Work::Rank) {
            let candidates = request.batches.next(job.candidates(), branch.rows, branch_pages.len())?;
            let rows = PushCandidates {
                owner: slot.0,
                candidates: candidates.clone(),
                context_pages,
                branch_pages: &branch_pages[..candidates.len().div_ceil(PAGE_SIZE)],
            };
            let ranks = self.model.push_candidates(&self.cpu, &mut self.step, job, rows);
            return Ok(if ranks { Part::Rank { row, candidates } } else { Part::Failed(NO_RANKING.into()) });
        }
        let search = searches::going(request.search.as_ref(), slot.0, branch_pages.len())?;
        let rows = BranchChunk {
            owner: slot.0,
            width: search.width(),
            ancestors: search.steps_done(),
            context_len: job.context_len(),
            context_pages,
            branch_pages,
        };
        Ok(match self.model.push_beams(&mut self.step, job, &rows) {
            Ok(()) => Part::Decode,
            Err(error) => Part::Failed(error.to_string()),
        })
    }

    /// Runs the forward pass. Returns where the final states of the wanted rows lie.
    fn forward(&mut self) -> Result<u64, StepError> {
        let Self { model, step, pages, memory, slots, parts, transfers, .. } = self;
        let requests = &step.layout.rows.requests;
        let decoding = parts.iter().filter(|(_, part)| matches!(part, Part::Decode));
        // Those whose context ends in this step come first, and have no beams yet.
        let first = decoding.clone().count() - requests.len();
        let beams = |page_table: u64| {
            let descriptor = |(request, (slot, _)): (_, &(Slot, Part))| {
                let search = slots.get(*slot)?.search.as_ref();
                let search = search.ok_or_else(|| StepError(format!("slot {} has no beams", slot.0)))?;
                Ok(search.branch_rows(page_table, request))
            };
            requests.iter().zip(decoding.skip(first)).map(descriptor).collect::<Result<Vec<_>, StepError>>()
        };
        let arrivals = transfers.arrivals(&step.layout.rows.pages);
        model.forward(step, pages, arrivals, memory, beams)
    }

    /// Takes searches out of their slots, in the order of the plan.
    fn take_searches(&mut self, of: impl Fn(&Part) -> bool) -> Result<Vec<(Slot, DeviceSearch)>, StepError> {
        let mut taken = Vec::new();
        for (slot, _) in self.parts.iter().filter(|(_, part)| of(part)) {
            let search = self.slots.get_mut(*slot)?.search.take();
            taken.push((*slot, search.ok_or_else(|| StepError(format!("slot {} has no search", slot.0)))?));
        }
        Ok(taken)
    }

    /// Takes the searches of requests that decode a step further.
    fn decode(&mut self, states: u64) -> Result<(), StepError> {
        let taken = self.take_searches(|part| matches!(part, Part::Decode))?;
        let (slots, mut going): (Vec<_>, Vec<_>) = taken.into_iter().unzip();
        let rows = self.step.layout.rows.wanted.len();
        let Some(vocab) = self.model.vocab_size().filter(|_| !going.is_empty()) else { return Ok(()) };
        let finished = self.model.finish(states, rows, &mut self.memory)?;
        let logits = |rows, out| self.model.scores(finished, rows, 0..vocab, out);
        self.searches.expand(&mut going, vocab, logits)?;
        for (slot, search) in slots.into_iter().zip(going) {
            self.slots.get_mut(slot)?.search = Some(search);
        }
        Ok(())
    }

    /// Finds items for all requests of the step that want some, in the order of the plan.
    fn retrieve(&mut self, states: u64) -> Result<Vec<Retrieved>, StepError> {
        let taken = self.take_searches(|part| matches!(part, Part::Retrieve { .. }))?;
        if taken.is_empty() {
            return Ok(Vec::new());
        }
        let (slots, mut going): (Vec<_>, Vec<_>) = taken.into_iter().unzip();
        // Nothing else is wanted of a model that retrieves: search i looks at row i.
        let finished = self.model.finish(states, going.len(), &mut self.memory)?;
        let mut first = 0;
        while first < going.len() {
            let items = going[first].window();
            let bytes = 4 * items.len().max(1);
            let most = (LOGITS_BYTES / bytes).max(1);
            let alike = going[first..].iter().take(most).take_while(|search| search.window() == items);
            let rows = first..first + alike.count();
            let scores = self.scores.at_least(bytes * rows.len())?;
            let columns = items.start as usize..items.end as usize;
            self.model.scores(finished, rows.clone(), columns, scores)?;
            let place = |row: usize| Logits {
                kept: scores + (bytes * (row - first)) as u64,
                normalizers: finished.bounds + 4 * row as u64,
            };
            let places: Vec<Logits> = rows.clone().map(place).collect();
            self.searches.advance(&mut going[rows.clone()], &places)?;
            first = rows.end;
        }
        let mut bounds = vec![0.0_f32; going.len()];
        self.device.download(finished.bounds, bytemuck::cast_slice_mut(&mut bounds))?;
        let mut answers = Vec::with_capacity(going.len());
        for ((slot, search), bound) in slots.into_iter().zip(going).zip(bounds) {
            let Work::Retrieve(wanted) = &self.slots.get(slot)?.job.work else {
                return Err(StepError(format!("slot {} retrieves nothing", slot.0)));
            };
            answers.push(match search.found()? {
                None => Err(UserNotFinite),
                Some(found) => Ok(scored(wanted, &found, bound)),
            });
        }
        Ok(answers)
    }

    fn run_plan(
        &mut self,
        plan: &Plan,
        outcomes: &mut Vec<(Slot, Progress<HstuAnswer>)>,
    ) -> Result<(), StepError> {
        self.step.clear();
        self.parts.clear();
        let transferred = self.transfers.begin(&self.pages, &plan.transfers);
        transferred.map_err(|error| StepError(error.to_string()))?;
        for chunk in &plan.chunks {
            let part = self.push_chunk(plan, chunk)?;
            self.parts.push((chunk.slot, part));
        }
        for branch in &plan.branches {
            let part = self.push_branch(plan, branch)?;
            self.parts.push((branch.slot, part));
        }
        self.step.layout.finish(self.pages.pages()).map_err(StepError)?;
        self.transfers.before_writes(self.step.layout.rows.written())?;
        let states = self.forward()?;
        self.pulse.beat();
        self.decode(states)?;
        let mut retrieved = self.retrieve(states)?.into_iter();
        self.pulse.beat();
        let ranks = self.parts.iter().any(|(_, part)| matches!(part, Part::Rank { .. }));
        // Nothing else is wanted of a model that ranks.
        let read = if ranks { self.step.layout.rows.wanted.len() } else { 0 };
        let read = self.model.read(states, 0..read)?;
        let end = self.device.keep_pace()?;
        self.transfers.end(end, &self.step.layout.rows.pages);

        let width = self.model.config().stack.model_dim;
        for (slot, part) in self.parts.drain(..) {
            let request = self.slots.get_mut(slot)?;
            let job = &request.job.request;
            let progress = match part {
                Part::Context => Progress::Prefilled,
                Part::Failed(why) => Progress::Failed(why),
                Part::Prefilled => request.batches.prefilled(job.candidates()),
                Part::Retrieve { .. } => match retrieved.next() {
                    Some(Ok(items)) => Progress::Finished(HstuAnswer::Items(items)),
                    Some(Err(error)) => Progress::Failed(error.to_string()),
                    None => Progress::Failed("the model retrieves nothing".into()),
                },
                Part::Rank { row, candidates } => {
                    let states = &read[row * width..][..candidates.len() * width];
                    let end = candidates.end;
                    let predictions = self.model.predict(&self.cpu, states, job, candidates);
                    request.batches.take(states, predictions, end, job.candidates())
                }
                Part::Decode => searches::outcome(&mut request.search)?.map(HstuAnswer::Found),
            };
            outcomes.push((slot, progress));
        }
        Ok(())
    }
}

type Retrieved = Result<Vec<Scored>, UserNotFinite>;

const NO_RANKING: &str = "the model does not rank";

/// The search of a request that retrieves: one level, of which the best are kept.
fn one_level(wanted: &Retrieve) -> SearchRequest {
    SearchRequest {
        catalog: Arc::clone(&wanted.catalog),
        filter: wanted.filter.clone(),
        start: wanted.catalog.trie().root(),
        steps: [Generated::Level].into(),
        normalization: Normalization::FullVocab,
        normalize_over: None,
        widths: None,
    }
}

/// Items and their inner products, given what was taken off each.
fn scored(wanted: &Retrieve, found: &[Hypothesis], bound: f32) -> Vec<Scored> {
    let mut path = Vec::new();
    let scored = |hypothesis: &Hypothesis| {
        path.clear();
        wanted.catalog.trie().path(hypothesis.leaf, &mut path);
        let score = (hypothesis.score + f64::from(bound)) as f32;
        path.first().map(|&item| Scored { item, score })
    };
    found.iter().filter_map(scored).take(wanted.count).collect()
}

impl StepModel for HstuDeviceExecutor {
    type Payload = HstuJob;
    type Answer = HstuAnswer;

    fn set_pulse(&mut self, pulse: Pulse) {
        self.pulse = pulse;
    }

    fn open(&mut self, slot: Slot, payload: HstuJob) {
        self.slots.open(slot, InFlight { job: payload, search: None, batches: MicroBatches::default() });
    }

    fn step(
        &mut self,
        plan: &Plan,
        outcomes: &mut Vec<(Slot, Progress<HstuAnswer>)>,
    ) -> Result<(), StepError> {
        self.run_plan(plan, outcomes)
    }

    fn close(&mut self, slot: Slot) {
        self.slots.close(slot);
    }
}
