//! A family on a graphics processor: rows of a step, searches in device memory, pages that move beside
//! the computing.
//!
//! Place in the flow: a [`Backend`] over any [`DeviceFamily`]. A step is launched without waiting: the
//! host plans the next step while the device runs this one. Beams are read back only where a request
//! finishes, which waits for the step. The host also waits for steps that score or retrieve.
//!
//! Without waiting, the host does not know how many beams are alive. So a branch step has as many rows
//! as the beam is wide, and [`Progress::Expanded`](crate::step::Progress::Expanded) gives the most there
//! can be. Therefore beams are not computed in parts.
//!
//! Retrieval is a [search](crate::cuda::beams) over a catalog of one level: its kernels find the exact
//! best of any number of candidates under the request's filter. Exact is with respect to items and user
//! in bf16. A bounded memory limits how many users are scored at a time.
//!
//! What this must not know: what a family computes.

use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use beamline_catalog::Catalog;
use beamline_compute::cuda::device::{Device, DeviceError, Mark, Scratch};
use beamline_compute::cuda::pages::DevicePages;
use beamline_compute::cuda::rows::{BranchChunk, Rows};
use beamline_compute::cuda::transfers::PageTransfers;
use beamline_kv_cache::Transfer;

use super::Executor;
use super::backend::{Backend, BranchPages, Done, PushError, Then, finite};
use crate::cuda::beams::{BranchRows, DeviceSearch, Logits, MOST_BEAMS};
use crate::cuda::catalog::DeviceTrie;
use crate::cuda::searches::{self, LOGITS_BYTES, Searches};
use crate::decode::{Hypothesis, Normalization, SearchRequest, Step as Generated};
use crate::families::hstu::retrieval::{Scored, UserNotFinite};
use crate::rows::{CandidateRows, ContextPart};
use crate::step::{Plan, Pulse, StepError};
use crate::task::{Context, Head, Retrieve};

/// Final states as they are compared with items or tokens.
#[derive(Clone, Copy, Debug)]
pub struct Finished {
    /// bf16 `[rows, width]`.
    pub states: u64,
    /// f32 `[rows]`: no product with an item is more. Of a model with items only.
    pub bounds: u64,
}

/// How rows of beams are filled in, given the address of the page tables.
pub type FillBeams<'a> = dyn Fn(u64) -> Result<Vec<BranchRows>, StepError> + 'a;

/// What a family does on a graphics processor.
pub trait DeviceFamily: fmt::Debug + Send + Sync + 'static {
    /// Rows of a step.
    type Step: fmt::Debug + Default + Send;
    /// Device memory of a step, reused from step to step.
    type Memory: fmt::Debug + Send;

    /// Device that the family runs on.
    fn device(&self) -> &Arc<dyn Device>;

    /// Device memory for steps.
    ///
    /// # Errors
    ///
    /// When the device has none.
    fn memory(&self) -> Result<Self::Memory, DeviceError>;

    /// Allocates `pages` pages.
    ///
    /// # Errors
    ///
    /// When they do not fit.
    fn page_store(&self, pages: usize) -> Result<DevicePages, DeviceError>;

    /// What it makes of final states.
    fn head(&self) -> Head;

    /// Columns of a final state.
    fn width(&self) -> usize;

    /// Tokens of the vocabulary; 0 for a model without them.
    fn vocab_size(&self) -> usize;

    /// Makes a step empty.
    fn clear(step: &mut Self::Step);

    /// The rows of a step.
    fn rows(step: &Self::Step) -> &Rows;

    /// Adds rows of a context.
    ///
    /// # Errors
    ///
    /// When this request cannot be computed. Then nothing was added.
    fn push_context(
        &self,
        step: &mut Self::Step,
        context: &Context,
        part: ContextPart<'_>,
    ) -> Result<(), String>;

    /// Adds the rows of a beam, which are filled in on the device.
    ///
    /// # Errors
    ///
    /// When this request cannot be computed. Then nothing was added.
    fn push_beams(
        &self,
        step: &mut Self::Step,
        context: &Context,
        rows: &BranchChunk<'_>,
    ) -> Result<(), String>;

    /// Adds candidates.
    ///
    /// # Errors
    ///
    /// When this request cannot be computed. Then nothing was added.
    fn push_candidates(
        &self,
        _step: &mut Self::Step,
        _context: &Context,
        _rows: CandidateRows<'_>,
    ) -> Result<(), String> {
        Err("the model scores no candidates".into())
    }

    /// Ends the rows of a step: no page is written by one request and touched by another.
    ///
    /// # Errors
    ///
    /// The page that is.
    fn finish_rows(step: &mut Self::Step, pages: usize) -> Result<(), String>;

    /// Runs a step. Returns the address of the final states of the wanted rows. `arrivals` is empty, or
    /// names for each layer what its attention must wait for.
    ///
    /// # Errors
    ///
    /// When the device fails, or `beams` does.
    fn forward(
        &self,
        step: &Self::Step,
        pages: &DevicePages,
        arrivals: &[Mark],
        memory: &mut Self::Memory,
        beams: &FillBeams<'_>,
    ) -> Result<u64, StepError>;

    /// Makes final states ready to be compared with items or tokens.
    ///
    /// # Errors
    ///
    /// When the device fails.
    fn finish(&self, states: u64, rows: usize, memory: &mut Self::Memory) -> Result<Finished, DeviceError>;

    /// Logits of tokens, or scores of items, for some rows: single precision `[rows, columns]`.
    ///
    /// # Errors
    ///
    /// When the device fails.
    fn scores(
        &self,
        finished: Finished,
        rows: Range<usize>,
        columns: Range<usize>,
        out: u64,
    ) -> Result<(), DeviceError>;

    /// Predictions `[candidates, names]` from final states `[candidates, width]` in single precision.
    /// `None` for a model without them.
    fn predict(&self, _states: &[f32], _context: &Context, _candidates: Range<usize>) -> Option<Vec<f32>> {
        None
    }
}

/// A result that is owed, in the order in which it was pushed.
#[derive(Debug)]
enum Owed {
    /// Of the next search.
    Search,
    /// Of the next retrieval.
    Items(Arc<Retrieve>),
    /// Of the rows from this one on.
    Predictions { row: usize, context: Context, candidates: Range<usize> },
}

/// A family, its pages, and the rows of a step, in device memory.
#[derive(Debug)]
pub struct DeviceBackend<F: DeviceFamily> {
    device: Arc<dyn Device>,
    model: Arc<F>,
    /// Before the pages: it waits for what uses them.
    transfers: PageTransfers,
    pages: DevicePages,
    step: F::Step,
    memory: F::Memory,
    searches: Searches,
    /// Searches of the step, contexts first.
    going: Vec<DeviceSearch>,
    /// Searches whose beams have rows in this step are those from here on.
    first_beams: usize,
    /// Searches of one level, of requests that retrieve.
    retrieving: Vec<DeviceSearch>,
    owed: Vec<Owed>,
    /// Scores of all items of a catalog.
    scores: Scratch,
}

impl<F: DeviceFamily> Executor<DeviceBackend<F>> {
    /// Allocates `pages` pages for a model.
    ///
    /// # Errors
    ///
    /// When they do not fit.
    pub fn on_device(model: Arc<F>, pages: usize) -> Result<Self, DeviceError> {
        let device = Arc::clone(model.device());
        let pages = model.page_store(pages)?;
        Ok(Self::over(DeviceBackend {
            transfers: PageTransfers::new(&device, &pages),
            pages,
            step: F::Step::default(),
            memory: model.memory()?,
            searches: Searches::new(&device)?,
            scores: Scratch::new(&device, 1 << 16)?,
            device,
            model,
            going: Vec::new(),
            first_beams: 0,
            retrieving: Vec::new(),
            owed: Vec::new(),
        }))
    }

    /// Copies a catalog's trie before the first request asks for it.
    ///
    /// # Errors
    ///
    /// When it does not fit.
    pub fn prepare(&mut self, catalog: &Arc<Catalog>) -> Result<Arc<DeviceTrie>, DeviceError> {
        self.backend().searches.prepare(catalog)
    }
}

impl<F: DeviceFamily> DeviceBackend<F> {
    /// Runs the forward pass. Returns where the final states of the wanted rows lie.
    fn forward(&mut self) -> Result<u64, StepError> {
        let Self { model, step, pages, memory, transfers, going, first_beams, .. } = self;
        let rows = F::rows(step);
        let with_rows = going.get(*first_beams..).unwrap_or_default();
        let beams = |page_table: u64| {
            let requests = rows.requests.iter().zip(with_rows);
            Ok(requests.map(|(request, search)| search.branch_rows(page_table, request)).collect())
        };
        let arrivals = transfers.arrivals(&rows.pages);
        model.forward(step, pages, arrivals, memory, &beams)
    }

    /// Takes the searches of the step further.
    fn decode(&mut self, states: u64) -> Result<(), StepError> {
        if self.going.is_empty() {
            return Ok(());
        }
        let Self { model, step, memory, searches, going, .. } = self;
        let (rows, vocab) = (F::rows(step).wanted.len(), model.vocab_size());
        let finished = model.finish(states, rows, memory)?;
        Ok(searches.expand(going, vocab, |rows, out| model.scores(finished, rows, 0..vocab, out))?)
    }

    /// Finds items for all requests of the step that want some.
    fn retrieve(&mut self, states: u64) -> Result<Vec<Result<Vec<Scored>, UserNotFinite>>, StepError> {
        let mut going = std::mem::take(&mut self.retrieving);
        if going.is_empty() {
            return Ok(Vec::new());
        }
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
        let wanted = self.owed.iter().filter_map(|owed| match owed {
            Owed::Items(wanted) => Some(wanted),
            _ => None,
        });
        let mut answers = Vec::with_capacity(going.len());
        for ((wanted, search), bound) in wanted.zip(going).zip(bounds) {
            answers.push(match search.found()? {
                None => Err(UserNotFinite),
                Some(found) => Ok(scored(wanted, &found, bound)),
            });
        }
        Ok(answers)
    }

    /// Reads the final states of all wanted rows if candidates are scored. For other models they stay on
    /// the device.
    fn read(&self, states: u64) -> Result<Vec<f32>, StepError> {
        let scores = self.owed.iter().any(|owed| matches!(owed, Owed::Predictions { .. }));
        let rows = if scores { F::rows(&self.step).wanted.len() } else { 0 };
        if rows == 0 {
            return Ok(Vec::new());
        }
        let mut read = vec![0.0_f32; rows * self.model.width()];
        self.device.download(states, bytemuck::cast_slice_mut(&mut read))?;
        Ok(read)
    }
}

impl<F: DeviceFamily> Backend for DeviceBackend<F> {
    type Search = DeviceSearch;

    fn head(&self) -> Head {
        self.model.head()
    }

    fn begin(&mut self, transfers: &[Transfer]) -> Result<(), StepError> {
        F::clear(&mut self.step);
        self.going.clear();
        self.first_beams = 0;
        self.retrieving.clear();
        self.owed.clear();
        self.transfers.begin(&self.pages, transfers).map_err(|error| StepError(error.to_string()))
    }

    fn push_context(
        &mut self,
        context: &Context,
        part: ContextPart<'_>,
        then: Then<'_>,
    ) -> Result<(), PushError> {
        let search = match then {
            Then::Nothing => None,
            Then::Search(search, width) => Some((search.clone(), width, Owed::Search)),
            Then::Retrieve(wanted) => {
                let width = wanted.count.clamp(1, wanted.catalog.num_leaves().max(1));
                Some((one_level(wanted), width, Owed::Items(Arc::clone(wanted))))
            }
        };
        if let Some((_, width, _)) = search.as_ref().filter(|(_, width, _)| *width > MOST_BEAMS) {
            return Err(format!("{width} at once: at most {MOST_BEAMS} on CUDA").into());
        }
        self.model.push_context(&mut self.step, context, part)?;
        let Some((search, width, owed)) = search else { return Ok(()) };
        let search = self.searches.begin(search, width).map_err(StepError::from)?;
        match owed {
            Owed::Items(_) => self.retrieving.push(search),
            _ => {
                self.going.push(search);
                self.first_beams = self.going.len();
            }
        }
        self.owed.push(owed);
        Ok(())
    }

    fn push_beams(
        &mut self,
        context: &Context,
        search: Option<DeviceSearch>,
        index: usize,
        plan: &Plan,
    ) -> Result<(), PushError> {
        let branch = &plan.branches[index];
        let pages = BranchPages::new(plan, branch);
        let going = searches::going(search.as_ref(), branch.slot.0, pages.branch.len())?;
        let rows = BranchChunk {
            owner: branch.slot.0,
            width: going.width(),
            ancestors: going.steps_done(),
            context_len: context.len(),
            context_pages: pages.context,
            branch_pages: pages.branch,
        };
        self.model.push_beams(&mut self.step, context, &rows)?;
        self.going.extend(search);
        self.owed.push(Owed::Search);
        Ok(())
    }

    fn push_candidates(&mut self, context: &Context, rows: CandidateRows<'_>) -> Result<(), PushError> {
        let (row, candidates) = (F::rows(&self.step).wanted.len(), rows.candidates.clone());
        self.model.push_candidates(&mut self.step, context, rows)?;
        self.owed.push(Owed::Predictions { row, context: context.clone(), candidates });
        Ok(())
    }

    fn compute(
        &mut self,
        _plan: &Plan,
        pulse: &Pulse,
        done: &mut Vec<Done<DeviceSearch>>,
    ) -> Result<(), StepError> {
        F::finish_rows(&mut self.step, self.pages.pages()).map_err(StepError)?;
        self.transfers.before_writes(F::rows(&self.step).written())?;
        let states = self.forward()?;
        pulse.beat();
        self.decode(states)?;
        let mut retrieved = self.retrieve(states)?.into_iter();
        pulse.beat();
        let read = self.read(states)?;
        let end = self.device.keep_pace()?;
        self.transfers.end(end, &F::rows(&self.step).pages);

        let width = self.model.width();
        let mut going = self.going.drain(..);
        for owed in self.owed.drain(..) {
            done.push(match owed {
                Owed::Search => {
                    let mut search = going.next();
                    let progress = searches::outcome(&mut search)?;
                    Done::Search(progress, search)
                }
                Owed::Items(_) => Done::Items(match retrieved.next() {
                    Some(items) => items.map_err(|error| error.to_string()),
                    None => Err("the model has no result for it".into()),
                }),
                Owed::Predictions { row, context, candidates } => {
                    let states = &read[row * width..][..candidates.len() * width];
                    Done::Predictions(finite(states, self.model.predict(states, &context, candidates)))
                }
            });
        }
        Ok(())
    }
}

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
