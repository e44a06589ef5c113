//! An HSTU model in device memory: rows in, final states through the layers, and what makes answers of them.
//!
//! Place in the flow: the executor pushes the rows of a plan into a [`Step`] and runs it. The words are
//! those of [`families::hstu`](crate::families::hstu), whose host parts (checks, tables, ranking heads)
//! are used unchanged.
//!
//! ```text
//! retrieval   final state | finish | product with the items of a catalog      -> scores, single precision
//! tokens      final state | finish | product with the head                    -> logits, single precision
//! ranking     final states are read back, and the heads run on the host
//! ```
//!
//! What this must not know: plans, slots, searches in progress.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::Arc;

use beamline_compute::batch::ContextRows;
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::linear::WeightFormat;
use beamline_compute::cpu::vector::l2_normalize;
use beamline_compute::cuda::device::{Device, DeviceError, Mark, Memory, Product, Written};
use beamline_compute::cuda::kernels::hstu::{self as kernels, Finish};
use beamline_compute::cuda::kernels::{branch_rows, multiply};
use beamline_compute::cuda::pages::DevicePages;
use beamline_compute::cuda::rows::BranchChunk;
use beamline_compute::cuda::weights::matrix;
use candle_core::Tensor;
use half::bf16;

use super::embedding::DeviceEmbedder;
use super::stack::DeviceStack;
use super::step::{Step, StepMemory};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::described::Described;
use crate::error::ModelError;
use crate::executor::cuda::{FillBeams, Finished};
use crate::families::hstu::config::{HstuConfig, Normalization, Purpose, ResearchHead, VariantConfig};
use crate::families::hstu::embed::Embedder;
use crate::families::hstu::inputs::{InputError, Prepared};
use crate::families::hstu::ranking::Ranking;
use crate::families::hstu::{context_of, expected_tensors, token_head};
use crate::rows::{CandidateRows, ContextPart};
use crate::step::StepError;
use crate::task::Head as TaskHead;

/// Values of an item table that are made at a time.
const CONVERTED: usize = 1 << 22;

/// A model in device memory.
#[derive(Debug)]
pub struct DeviceHstu {
    device: Arc<dyn Device>,
    /// What is left to the host runs here.
    cpu: Arc<Cpu>,
    config: HstuConfig,
    embedder: DeviceEmbedder,
    stack: DeviceStack,
    head: Head,
}

/// What makes answers of final states.
#[derive(Debug)]
enum Head {
    /// bf16 `[items, model_dim]`, each of unit length.
    Items(Finish, Memory),
    /// bf16 `[vocab, model_dim]`.
    Tokens(Finish, Memory, usize),
    /// On the host.
    Ranking(Box<Ranking>),
}

fn finish_of(normalization: Normalization) -> Finish {
    match normalization {
        Normalization::None {} => Finish::Nothing,
        Normalization::L2 { eps } => Finish::L2(eps as f32),
        Normalization::LayerNorm { eps } => Finish::LayerNorm(eps as f32),
    }
}

/// Copies items, each divided by its length, or by `least` if that is more, in bf16.
fn unit_rows(device: &Arc<dyn Device>, cpu: &Cpu, rows: &Tensor, least: f64) -> Result<Memory, ModelError> {
    let (items, width) = rows.dims2()?;
    let memory = Memory::zeroed(device, 2 * items * width)?;
    let at_a_time = (CONVERTED / width).max(1);
    for first in (0..items).step_by(at_a_time) {
        let part = rows.narrow(0, first, at_a_time.min(items - first))?;
        let mut part: Vec<f32> = part.flatten_all()?.to_vec1()?;
        part.chunks_exact_mut(width).for_each(|row| l2_normalize(cpu.isa(), row, least as f32));
        let converted: Vec<bf16> = part.iter().map(|&x| bf16::from_f32(x)).collect();
        device.upload(bytemuck::cast_slice(&converted), memory.address() + (2 * first * width) as u64)?;
    }
    Ok(memory)
}

impl DeviceHstu {
    /// Checks every tensor of the checkpoint and copies the weights.
    ///
    /// # Errors
    ///
    /// When tensors are missing, unknown, of the wrong shape or type, hold values that are not finite,
    /// or do not fit; or when the configuration asks for what the kernels lack.
    pub fn load(
        device: &Arc<dyn Device>,
        checkpoint: &Checkpoint<HstuConfig>,
        cpu: &Arc<Cpu>,
    ) -> Result<Self, ModelError> {
        let (config, tensors) = (checkpoint.config().clone(), checkpoint.tensors());
        let variant = config.variant.variant();
        // Refused before anything large is read.
        DeviceStack::check(&config.stack)?;
        config.expected(tensors).check(tensors)?;
        let embedder = DeviceEmbedder::load(device, &config, tensors)?;
        let stack = DeviceStack::load(device, &config.stack, variant, variant.layer_prefix(), tensors)?;
        let head = match (&config.variant, Ranking::load(&config, tensors, WeightFormat::Bf16)?) {
            (_, Some(ranking)) => Head::Ranking(Box::new(ranking)),
            (VariantConfig::Research(_, output), None) => {
                let finish = finish_of(output.normalization);
                match output.head {
                    ResearchHead::Items { eps } => {
                        let rows = tensors.load(Embedder::items_name())?;
                        Head::Items(finish, unit_rows(device, cpu, &rows, eps)?)
                    }
                    ResearchHead::Tokens { vocab_size, tied, logit_scale, .. } => {
                        let head = token_head(tensors, vocab_size, tied, logit_scale)?;
                        Head::Tokens(finish, matrix(device, &[head])?, vocab_size)
                    }
                }
            }
            (VariantConfig::Dlrm(..) | VariantConfig::Nvidia(..), None) => {
                unreachable!("these variants rank")
            }
        };
        Ok(Self { device: Arc::clone(device), cpu: Arc::clone(cpu), config, embedder, stack, head })
    }

    /// Bytes that the weights take at most: on the device, and on the host.
    pub fn bytes(config: &HstuConfig) -> [usize; 2] {
        let (stack, variant) = (&config.stack, config.variant.variant());
        let of = |(name, shape): (&String, &Vec<usize>), wide: usize| {
            let values = shape.iter().fold(1_usize, |values, size| values.saturating_mul(*size));
            // Matrices are bf16, vectors single precision, as tables are.
            let bytes = if name.starts_with(variant.layer_prefix()) && shape.len() > 1 { 2 } else { wide };
            values.saturating_mul(bytes)
        };
        let sum = |tensors: &BTreeMap<String, Vec<usize>>, wide: usize| {
            tensors.iter().map(|tensor| of(tensor, wide)).fold(0_usize, usize::saturating_add)
        };
        let all = expected_tensors(config);
        match config.purpose() {
            // What is compared with final states lies beside the tables, in bf16.
            Purpose::Retrieve | Purpose::Decode => [sum(&all, 6), 0],
            Purpose::Rank => {
                let layers = stack.expected_tensors(variant, variant.layer_prefix());
                let beside = all.into_iter().filter(|(name, _)| !layers.contains_key(name)).collect();
                [sum(&layers, 4), sum(&beside, 4)]
            }
        }
    }

    /// Device that holds the weights.
    pub fn device(&self) -> &Arc<dyn Device> {
        &self.device
    }

    /// Configuration of the checkpoint.
    pub fn config(&self) -> &HstuConfig {
        &self.config
    }

    /// Layers on the device.
    pub fn stack(&self) -> &DeviceStack {
        &self.stack
    }

    /// Tokens of the vocabulary; nothing where the model decodes none.
    pub fn vocab_size(&self) -> Option<usize> {
        match &self.head {
            Head::Tokens(_, _, vocab) => Some(*vocab),
            Head::Items(..) | Head::Ranking(_) => None,
        }
    }

    /// What it makes of final states.
    pub fn head(&self) -> TaskHead {
        match &self.head {
            Head::Items(..) => TaskHead::Items,
            Head::Tokens(..) => TaskHead::Tokens,
            Head::Ranking(_) => TaskHead::Predictions,
        }
    }

    /// Adds rows of a request's context to a step.
    ///
    /// # Errors
    ///
    /// When the mask shows rows what is not computed yet.
    pub fn push_context(
        &self,
        step: &mut Step,
        request: &Prepared,
        rows: ContextPart<'_>,
    ) -> Result<(), InputError> {
        let positions = rows.positions;
        self.config.check_chunk(request, &positions)?;
        self.embedder.context(&self.cpu, request, positions.clone(), &mut step.embedded);
        let chunk = ContextRows {
            owner: rows.owner,
            tokens: request.ids(positions.clone()),
            first_position: positions.start,
            cached: rows.cached,
            pages: rows.pages,
            wanted: rows.wanted,
        };
        let mask = self.config.stack.mask.into();
        step.layout.push_context(self.stack.shape(), mask, &chunk, context_of(request));
        Ok(())
    }

    /// Adds candidates of a request whose context is in pages or in the same step. Returns whether the
    /// model ranks.
    pub fn push_candidates(&self, step: &mut Step, request: &Prepared, rows: CandidateRows<'_>) -> bool {
        if !self.embedder.candidates(&self.cpu, request, rows.candidates.clone(), &mut step.embedded) {
            return false;
        }
        let chunk = BranchChunk {
            owner: rows.owner,
            width: rows.candidates.len(),
            ancestors: 1,
            context_len: request.context_len(),
            context_pages: rows.context_pages,
            branch_pages: rows.branch_pages,
        };
        step.layout.push_candidates(self.stack.shape(), &chunk, context_of(request));
        true
    }

    /// Adds generated tokens of a request, which are filled in on the device.
    ///
    /// # Errors
    ///
    /// When they lie beyond the model's positions.
    pub fn push_beams(
        &self,
        step: &mut Step,
        request: &Prepared,
        rows: &BranchChunk<'_>,
    ) -> Result<(), InputError> {
        self.config.generated_position(request, rows.ancestors)?;
        self.embedder.generated(rows.width, &mut step.embedded);
        step.layout.push_beams(self.stack.shape(), rows, context_of(request));
        Ok(())
    }

    /// Runs a finished step: fills in rows of beams, writes keys and values of all rows. `beams` says
    /// how rows of beams are filled in, given the address of the page tables. Returns the address of the
    /// final states of the wanted rows: single precision `[wanted, model_dim]`. `arrivals` is empty, or
    /// names for each layer what its attention must wait for.
    ///
    /// # Errors
    ///
    /// When the device fails, or `beams` does.
    pub(in crate::cuda) fn forward(
        &self,
        step: &Step,
        pages: &DevicePages,
        arrivals: &[Mark],
        memory: &mut StepMemory,
        beams: &FillBeams<'_>,
    ) -> Result<u64, StepError> {
        let (arrays, actions) = memory.send(&*self.device, step, beams)?;
        branch_rows(&*self.device, &arrays.rows, &step.layout.rows)?;
        let (count, width) = (step.layout.rows.count(), self.config.stack.model_dim);
        let hidden = memory.hidden(count * width)?;
        self.embedder.put(&*self.device, &step.embedded, &arrays.rows, actions, count, hidden)?;
        Ok(self.stack.forward(&step.layout, &arrays, hidden, pages, arrivals, &mut memory.workspace)?)
    }

    /// Runs a step without beams and reads the final states of its wanted rows, `[wanted, model_dim]`.
    ///
    /// # Errors
    ///
    /// When the device fails.
    pub fn states(
        &self,
        step: &Step,
        pages: &DevicePages,
        memory: &mut StepMemory,
    ) -> Result<Vec<f32>, StepError> {
        let states = self.forward(step, pages, &[], memory, &|_| Ok(Vec::new()))?;
        let rows = step.layout.rows.wanted.len();
        let mut read = vec![0.0_f32; rows * self.config.stack.model_dim];
        self.device.download(states, bytemuck::cast_slice_mut(&mut read))?;
        Ok(read)
    }

    /// Makes final states ready to be compared with items or tokens.
    ///
    /// # Errors
    ///
    /// When the device fails.
    pub(in crate::cuda) fn finish(
        &self,
        states: u64,
        rows: usize,
        memory: &mut StepMemory,
    ) -> Result<Finished, DeviceError> {
        let width = self.config.stack.model_dim;
        let finish = match &self.head {
            Head::Items(finish, _) | Head::Tokens(finish, ..) => *finish,
            Head::Ranking(_) => Finish::Nothing,
        };
        let finished = Finished {
            states: memory.finished.at_least(2 * rows * width)?,
            bounds: memory.bounds.at_least(4 * rows)?,
        };
        kernels::finish(&*self.device, states, finished.states, finished.bounds, [rows, width], finish)?;
        Ok(finished)
    }

    /// Logits of tokens for some of the rows, or scores of items: single precision `[rows, columns]`.
    ///
    /// # Errors
    ///
    /// When the device fails.
    pub(in crate::cuda) fn scores(
        &self,
        finished: Finished,
        rows: Range<usize>,
        columns: Range<usize>,
        out: u64,
    ) -> Result<(), DeviceError> {
        let width = self.config.stack.model_dim;
        let (Head::Items(_, table) | Head::Tokens(_, table, _)) = &self.head else { return Ok(()) };
        if 2 * width * columns.end > table.bytes() {
            return Err(DeviceError::new(format!("scoring {columns:?}"), "there are not so many"));
        }
        let product = Product {
            x: finished.states + (2 * rows.start * width) as u64,
            weight: table.address() + (2 * columns.start * width) as u64,
            out,
            rows: rows.len(),
            inputs: width,
            outputs: columns.len(),
            written: Written::F32,
        };
        multiply(&*self.device, product)
    }

    /// Predictions of candidates, `[candidates, names]`, from their final states. `None` for a model
    /// that does not rank.
    pub fn predict(&self, states: &[f32], request: &Prepared, candidates: Range<usize>) -> Option<Vec<f32>> {
        let Head::Ranking(ranking) = &self.head else { return None };
        ranking.predict(&self.cpu, self.embedder.host()?, states, request, candidates)
    }
}
