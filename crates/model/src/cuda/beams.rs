//! A beam search whose state lies in device memory: what `kernels/expand.cu` reads and writes.
//!
//! Place in the flow: made when a context ends, taken one step further after each forward pass, read
//! back when it is over. The semantics are those of [`Search`](crate::decode::Search), except that
//! scores are sums in single precision.
//!
//! Invariant: the host knows how many steps were launched and the most beams there can be. It learns how
//! many beams there are only from [`DeviceSearch::found`].

use std::ops::Range;
use std::sync::Arc;

use beamline_catalog::Leaf;
use beamline_compute::cuda::device::{Device, DeviceError, Memory};
use beamline_compute::cuda::kernels::ExpandSizes;
use beamline_compute::cuda::rows::BranchRequest;
use bytemuck::{Pod, Zeroable};

use super::catalog::{DeviceFilter, DeviceTrie, FilterAddresses};
use crate::decode::{Hypothesis, Normalization, SearchRequest, Step};
use crate::error::ModelError;

/// Candidates that are kept for the last selection, beyond twice the width of the beam. They fill the
/// bin of the last survivor.
const SPARE_CANDIDATES: usize = 2048;
/// Most beams of a search.
pub const MOST_BEAMS: usize = 8192;

/// Checks the width of a beam.
///
/// # Errors
///
/// When it is too wide.
pub fn check_beams(beams: usize) -> Result<(), ModelError> {
    match beams > MOST_BEAMS {
        true => Err(ModelError::Limit(format!("max-beam-width is {beams}: at most {MOST_BEAMS} on CUDA"))),
        false => Ok(()),
    }
}

/// Bins of the histogram of `expand.cu`.
const BINS: usize = 2048;

/// `Beams` of kernels/expand_step.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct BeamAddresses {
    nodes: u64,
    tokens: u64,
    scores: u64,
    parents: u64,
    lineage: u64,
    count: u64,
}

/// `ExpandStep` of kernels/expand_step.cuh.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub(crate) struct ExpandStep {
    children: u64,
    symbols: u64,
    leaves: u64,
    filter: FilterAddresses,
    normalize_over: FilterAddresses,
    logits: u64,
    normalizers: u64,
    logits_stride: u64,
    from: BeamAddresses,
    to: BeamAddresses,
    failed: u64,
    workspace: u64,
    first_token: u32,
    kind: u32,
    fixed_token: u32,
    width: u32,
    capacity: u32,
    is_first: u32,
    start_node: u32,
    steps_done: u32,
}

const LEVEL: u32 = 0;
const FIXED: u32 = 1;

/// `BranchRows` of kernels/branch_rows.cu.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
pub struct BranchRows {
    tokens: u64,
    lineage: u64,
    count: u64,
    branch_pages: u64,
    width: u32,
    entries: u32,
    context_length: u32,
    first_row: u32,
    first_lineage: u64,
}

const _: () = assert!(size_of::<ExpandStep>() == 256 && size_of::<BranchRows>() == 56);

/// Logits of the beams of one search: those of a window of tokens, and what normalises them.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Logits {
    /// f32 `[beams, tokens of the window]`.
    pub(crate) kept: u64,
    /// f32 `[beams]`, over the whole vocabulary.
    pub(crate) normalizers: u64,
}

/// Counts a search among those of a step.
pub(crate) fn add_to(sizes: &mut ExpandSizes, search: &DeviceSearch) {
    sizes.searches += 1;
    sizes.width = sizes.width.max(search.width);
    sizes.capacity = capacity(sizes.width);
    sizes.candidates = sizes.candidates.max(search.candidates());
    sizes.normalizes |= search.normalizes();
}

/// A search in progress.
#[derive(Debug)]
pub struct DeviceSearch {
    request: SearchRequest,
    trie: Arc<DeviceTrie>,
    filter: DeviceFilter,
    normalize_over: Option<DeviceFilter>,
    width: usize,
    steps_done: usize,
    /// Level of the nodes of its beams.
    level: usize,
    /// Most beams that can be alive.
    most: usize,
    memory: Memory,
    places: Places,
    /// Which of the two beams is the current one.
    current: usize,
}

/// Where what lies in the memory of a search.
#[derive(Clone, Copy, Debug)]
struct Places {
    beams: [BeamAddresses; 2],
    failed: u64,
    workspace: u64,
    bytes: usize,
}

impl Places {
    fn new(base: u64, width: usize, steps: usize) -> Self {
        let mut next = base;
        let mut take = |bytes: usize| {
            let taken = next;
            next += bytes.next_multiple_of(16) as u64;
            taken
        };
        // Count, nodes and scores lie one after the other: they are read back together.
        let mut beams = || BeamAddresses {
            count: take(16),
            nodes: take(4 * width),
            scores: take(4 * width),
            tokens: take(4 * width),
            parents: 0,
            lineage: take(4 * width * steps),
        };
        let beams = [beams(), beams()];
        let failed = take(16);
        let workspace = take(workspace_bytes(width));
        Self { beams, failed, workspace, bytes: (next - base) as usize }
    }
}

fn capacity(width: usize) -> usize {
    2 * width + SPARE_CANDIDATES
}

/// `expand_workspace_bytes` of kernels/expand_step.cuh.
fn workspace_bytes(width: usize) -> usize {
    let round = |bytes: usize| bytes.next_multiple_of(16);
    64 + 3 * BINS * 4
        + round((width + 1) * 4)
        + 2 * round(width * 4)
        + round(capacity(width) * 4)
        + round(capacity(width) * 8)
}

impl DeviceSearch {
    /// Begins a search of at most `width` beams.
    ///
    /// # Errors
    ///
    /// When it does not fit.
    pub fn new(
        device: &Arc<dyn Device>,
        request: SearchRequest,
        trie: Arc<DeviceTrie>,
        width: usize,
    ) -> Result<Self, DeviceError> {
        let steps = request.steps.len();
        if request.steps.iter().any(|step| matches!(step, Step::Given(_))) {
            return Err(DeviceError::new(
                "begin a search",
                "a prefix that does not count is searched on the CPU only",
            ));
        }
        let filter = DeviceFilter::new(device, &request.filter)?;
        let over = match request.normalization {
            Normalization::AllowedSet => request.normalize_over.as_deref(),
            Normalization::FullVocab => None,
        };
        let normalize_over = over.map(|over| DeviceFilter::new(device, over)).transpose()?;
        let memory = Memory::zeroed(device, Places::new(0, width, steps).bytes)?;
        Ok(Self {
            level: usize::from(request.start.level),
            places: Places::new(memory.address(), width, steps),
            request,
            trie,
            filter,
            normalize_over,
            width,
            steps_done: 0,
            most: 1,
            memory,
            current: 0,
        })
    }

    /// Width of the beam.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Steps asked for.
    pub fn steps_done(&self) -> usize {
        self.steps_done
    }

    /// Most beams that can be alive.
    pub fn most(&self) -> usize {
        self.most
    }

    /// Whether nothing is left to generate.
    pub fn is_over(&self) -> bool {
        self.steps_done == self.request.steps.len()
    }

    /// Rows that the next step wants logits of.
    pub(crate) fn rows(&self) -> usize {
        if self.steps_done == 0 { 1 } else { self.width }
    }

    /// The tokens that the next step may continue by lie in here.
    pub(crate) fn window(&self) -> Range<u32> {
        match self.request.steps[self.steps_done] {
            Step::Fixed(token) | Step::Given(token) => token..token + 1,
            Step::Level => self.trie.below(self.level).map_or(0..1, |level| level.tokens.clone()),
        }
    }

    /// Children that the beams of the next step can have at most.
    pub(crate) fn candidates(&self) -> usize {
        match self.request.steps[self.steps_done] {
            Step::Fixed(_) | Step::Given(_) => self.most,
            Step::Level => self.trie.below(self.level).map_or(0, |level| level.most_children(self.most)),
        }
    }

    /// Whether it is normalised over allowed continuations.
    pub(crate) fn normalizes(&self) -> bool {
        self.request.normalization == Normalization::AllowedSet
    }

    /// How the rows of the next branch step are filled in, with page tables at `pages`.
    pub(crate) fn branch_rows(&self, pages: u64, request: &BranchRequest) -> BranchRows {
        let beams = self.places.beams[self.current];
        BranchRows {
            tokens: beams.tokens,
            lineage: beams.lineage,
            count: beams.count,
            branch_pages: pages + 4 * request.branch_pages as u64,
            width: self.width as u32,
            entries: self.steps_done as u32,
            context_length: request.context_len as u32,
            first_row: request.first_row as u32,
            first_lineage: request.first_lineage as u64,
        }
    }

    /// The step that takes the search further; afterwards it counts as taken.
    pub(crate) fn expand(&mut self, logits: Logits) -> ExpandStep {
        let window = self.window();
        let step = self.request.steps[self.steps_done];
        let below = self.trie.below(self.level);
        let ([children, symbols, leaves], kind, fixed_token) = match (step, below) {
            (Step::Level, Some(below)) => (below.addresses(), LEVEL, 0),
            (Step::Level, None) => ([0; 3], LEVEL, 0),
            (Step::Fixed(token) | Step::Given(token), _) => ([0; 3], FIXED, token),
        };
        let (from, to) = (self.places.beams[self.current], self.places.beams[1 - self.current]);
        let done = ExpandStep {
            children,
            symbols,
            leaves,
            filter: self.filter.addresses(),
            normalize_over: self.normalize_over.as_ref().unwrap_or(&self.filter).addresses(),
            logits: logits.kept,
            normalizers: match self.request.normalization {
                Normalization::FullVocab => logits.normalizers,
                Normalization::AllowedSet => 0,
            },
            logits_stride: u64::from(window.end - window.start),
            from,
            to,
            failed: self.places.failed,
            workspace: self.places.workspace,
            first_token: window.start,
            kind,
            fixed_token,
            width: self.width as u32,
            capacity: capacity(self.width) as u32,
            is_first: u32::from(self.steps_done == 0),
            start_node: self.request.start.index,
            steps_done: self.steps_done as u32,
        };
        if let (Step::Level, Some(below)) = (step, below) {
            self.level += 1;
            self.most = self.width.min(below.nodes);
        }
        self.steps_done += 1;
        self.current = 1 - self.current;
        done
    }

    /// Takes searches one step further, all with the same logits and normalisers. It serves to measure
    /// the step alone.
    ///
    /// # Errors
    ///
    /// When the device fails.
    pub fn expand_together(
        device: &Arc<dyn Device>,
        searches: &mut [Self],
        logits: u64,
        normalizers: u64,
    ) -> Result<(), DeviceError> {
        let mut sizes = ExpandSizes::default();
        searches.iter().for_each(|search| add_to(&mut sizes, search));
        let steps: Vec<ExpandStep> =
            searches.iter_mut().map(|search| search.expand(Logits { kept: logits, normalizers })).collect();
        let descriptors = Memory::of(device, &steps)?;
        beamline_compute::cuda::kernels::expand(&**device, descriptors.address(), &sizes)
    }

    /// Waits for the search, and reads what it found, best first; nothing if its logits were not finite.
    ///
    /// # Errors
    ///
    /// When the device fails.
    pub fn found(&self) -> Result<Option<Vec<Hypothesis>>, DeviceError> {
        let device = self.memory.device();
        let beams = self.places.beams[self.current];
        let mut failed = [0_u8; 4];
        device.download(self.places.failed, &mut failed)?;
        if u32::from_ne_bytes(failed) != 0 {
            return Ok(None);
        }
        let end = beams.scores + 4 * self.width as u64;
        let mut bytes = vec![0; (end - beams.count) as usize];
        device.download(beams.count, &mut bytes)?;
        let word = |address: u64, index: usize| -> u32 {
            let at = (address - beams.count) as usize + 4 * index;
            bytes.get(at..at + 4).and_then(|word| word.try_into().ok()).map_or(0, u32::from_ne_bytes)
        };
        let alive = (word(beams.count, 0) as usize).min(self.width);
        let hypothesis = |beam: usize| Hypothesis {
            leaf: Leaf(word(beams.nodes, beam)),
            score: f64::from(f32::from_bits(word(beams.scores, beam))),
        };
        Ok(Some((0..alive).map(hypothesis).collect()))
    }
}
