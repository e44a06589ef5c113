//! The searches of a step on the device: from final states to beams, for every family that decodes.
//!
//! Place in the flow: an executor takes the searches that advance out of their slots, in the order of
//! their rows among the wanted ones, and has them expanded here after its forward pass. Logits are
//! computed for a bounded number of rows at a time. The tokens that beams can continue by are kept, with
//! the normaliser.
//!
//! What this must not know: layers, pages, plans.

use std::ops::Range;
use std::sync::Arc;

use beamline_catalog::Catalog;
use beamline_compute::cuda::device::{Device, DeviceError, Memory, Scratch};
use beamline_compute::cuda::kernels;

use super::beams::{DeviceSearch, Logits, add_to};
use super::catalog::DeviceTrie;
use crate::decode::{NotFinite, SearchRequest};
use crate::step::{Progress, StepError};
use crate::task::Found;

/// Bytes of logits that are computed at a time; more rows go in several products.
pub(crate) const LOGITS_BYTES: usize = 512 << 20;

/// Tries in device memory, and memory for a step of searches.
#[derive(Debug)]
pub(crate) struct Searches {
    device: Arc<dyn Device>,
    /// Tries of the catalogs in use, and of the last one.
    tries: Vec<(Arc<Catalog>, Arc<DeviceTrie>)>,
    /// Descriptors of the expansions.
    steps: Scratch,
    /// Logits of some rows, then what is kept of them.
    logits: Scratch,
    kept: Scratch,
    normalizers: Scratch,
    partial: Scratch,
    /// Zero between any two launches.
    arrived: Option<Memory>,
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

impl Searches {
    /// None yet.
    ///
    /// # Errors
    ///
    /// When the device has no memory.
    pub(crate) fn new(device: &Arc<dyn Device>) -> Result<Self, DeviceError> {
        let scratch = || Scratch::new(device, 1 << 16);
        Ok(Self {
            device: Arc::clone(device),
            tries: Vec::new(),
            steps: scratch()?,
            logits: scratch()?,
            kept: scratch()?,
            normalizers: scratch()?,
            partial: scratch()?,
            arrived: None,
        })
    }

    /// Copies a catalog's trie, if it is not there.
    ///
    /// # Errors
    ///
    /// When it does not fit.
    pub(crate) fn prepare(&mut self, catalog: &Arc<Catalog>) -> Result<Arc<DeviceTrie>, DeviceError> {
        if let Some((_, trie)) = self.tries.iter().find(|(known, _)| Arc::ptr_eq(known, catalog)) {
            return Ok(Arc::clone(trie));
        }
        let trie = Arc::new(DeviceTrie::new(&self.device, catalog.trie())?);
        // What nobody else holds is not asked for any more.
        self.tries.retain(|(known, _)| Arc::strong_count(known) > 1);
        self.tries.push((Arc::clone(catalog), Arc::clone(&trie)));
        Ok(trie)
    }

    /// Begins a search of at most `width` beams.
    ///
    /// # Errors
    ///
    /// When it does not fit, or asks for beams of several widths, which only the CPU has.
    pub(crate) fn begin(
        &mut self,
        request: SearchRequest,
        width: usize,
    ) -> Result<DeviceSearch, DeviceError> {
        if request.widths.is_some() {
            return Err(DeviceError::new(
                "beginning a search",
                "beams of several widths run on the CPU only",
            ));
        }
        let trie = self.prepare(&request.catalog)?;
        DeviceSearch::new(&self.device, request, trie, width)
    }

    /// Takes searches one step further. `logits` computes those of some of the wanted rows, single
    /// precision `[rows, vocab]`.
    ///
    /// # Errors
    ///
    /// When the device fails.
    pub(crate) fn expand(
        &mut self,
        searches: &mut [DeviceSearch],
        vocab: usize,
        mut logits: impl FnMut(Range<usize>, u64) -> Result<(), DeviceError>,
    ) -> Result<(), DeviceError> {
        let mut segments = Vec::with_capacity(searches.len());
        let (mut first, mut kept) = (0, 0);
        for search in searches.iter() {
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
        let kept_base = self.kept.at_least(kept as usize)?;
        let normalizers = self.normalizers.at_least(4 * rows)?;
        let at_a_time = (LOGITS_BYTES / (4 * vocab)).max(1);
        let of_rows = self.logits.at_least(4 * vocab * at_a_time.min(rows))?;
        let partial =
            self.partial.at_least(kernels::log_sum_exp_partial_bytes(at_a_time.min(rows), vocab))?;
        let arrived = match &self.arrived {
            Some(arrived) if arrived.bytes() >= 4 * at_a_time.min(rows) => arrived.address(),
            _ => {
                let bytes = 4 * at_a_time.min(rows).next_power_of_two();
                self.arrived.insert(Memory::zeroed(&self.device, bytes)?).address()
            }
        };
        for start in (0..rows).step_by(at_a_time) {
            let end = rows.min(start + at_a_time);
            logits(start..end, of_rows)?;
            for segment in &segments {
                let own = segment.first.max(start)..(segment.first + segment.rows).min(end);
                if own.is_empty() {
                    continue;
                }
                let offset = (own.start - segment.first) * segment.tokens * 4;
                kernels::log_sum_exp(
                    &*self.device,
                    &kernels::LogSumExp {
                        logits: of_rows + (4 * (own.start - start) * vocab) as u64,
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
        let places: Vec<Logits> = segments
            .iter()
            .map(|segment| Logits {
                kept: kept_base + segment.kept,
                normalizers: normalizers + 4 * segment.first as u64,
            })
            .collect();
        self.advance(searches, &places)
    }

    /// Takes searches a step further whose logits lie where `places` says.
    ///
    /// # Errors
    ///
    /// When the device fails.
    pub(crate) fn advance(
        &mut self,
        searches: &mut [DeviceSearch],
        places: &[Logits],
    ) -> Result<(), DeviceError> {
        let mut sizes = kernels::ExpandSizes::default();
        searches.iter().for_each(|search| add_to(&mut sizes, search));
        let steps: Vec<_> =
            searches.iter_mut().zip(places).map(|(search, place)| search.expand(*place)).collect();
        let bytes: &[u8] = bytemuck::cast_slice(&steps);
        let descriptors = self.steps.at_least(bytes.len())?;
        self.device.upload(bytes, descriptors)?;
        kernels::expand(&*self.device, descriptors, &sizes)
    }
}

/// What a step did for a request whose search went on; a search that is over is given up.
///
/// # Errors
///
/// When the device fails.
pub(crate) fn outcome(search: &mut Option<DeviceSearch>) -> Result<Progress<Found>, DeviceError> {
    let Some(going) = search else { return Ok(Progress::Failed("nothing to decode".into())) };
    if !going.is_over() {
        return Ok(Progress::Expanded { rows: going.most() });
    }
    let steps = going.steps_done();
    let found = going.found()?;
    *search = None;
    Ok(match found {
        Some(hypotheses) => Progress::Finished(Found { hypotheses, steps }),
        None => Progress::Failed(NotFinite.to_string()),
    })
}

/// The search of a request whose beams want a step, if its branch pages hold them.
///
/// # Errors
///
/// When there is none, or too few pages.
pub(crate) fn going(
    search: Option<&DeviceSearch>,
    slot: u32,
    branch_pages: usize,
) -> Result<&DeviceSearch, StepError> {
    let search = search.filter(|search| search.steps_done() > 0 && !search.is_over());
    let search = search.ok_or_else(|| StepError(format!("slot {slot} has no beams")))?;
    let (width, steps) = (search.width(), search.steps_done());
    if branch_pages * beamline_compute::cpu::pages::PAGE_SIZE < steps * width {
        return Err(StepError(format!("{branch_pages} branch pages for {steps} steps of {width}")));
    }
    Ok(search)
}
