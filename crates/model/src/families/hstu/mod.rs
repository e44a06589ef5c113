//! Family `hstu`: HSTU in its three published variants, and with a token head.
//!
//! ```text
//! config     every constant, from config.json; nothing is guessed
//! inputs     what a request brings, checked; the words its context is addressed by
//! embed      ids, actions, times -> rows
//! batch      rows of a step, with their blocks, pages and times
//! layer_tensors  names and shapes of the tensors of a layer
//! stack      the layers: one implementation, told apart by constants
//! retrieval  final states -> best items, or logits of tokens
//! sieve      which items cannot be among the best, told from a smaller copy
//! ranking    final states of candidates -> predictions by task
//! step       how an executor fills and runs a batch
//! family     facts, memory and loading, for the rest of the system
//! verify     the engine beside the reference in candle-nn
//! mlp        what the ranking variants have around the layers
//! ```
//!
//! The way of a request: [`Hstu::prepare`] checks it. [`Hstu::push_context`] adds rows of its context to
//! a step, all at once or a part at a time; [`Hstu::push_candidates`] or [`Hstu::push_tokens`] adds
//! branch rows. [`Hstu::forward`] runs the step and leaves the wanted final states. [`Hstu::task`] names
//! what makes answers of them.
//!
//! # Branch rows
//!
//! A *candidate* sees the whole context and itself, never another candidate, and has no position of its
//! own. So candidates may be scored a few at a time, in any order: each prediction is the same bit for
//! bit.
//!
//! A *generated token* (token head) stands where the sequence would go on. With n context rows, the
//! token generated at step d = 0, 1, .. of a beam is row n + d:
//!
//! ```text
//! input      (item[token], with the action `input.actions.generated`) * scale + position[n + d]
//! its time   the time of the query, as a key and as "the time of the next event"
//! sees       every context row, the tokens of its own beam before it, and itself
//! bias       to context row j: position weight[N-1 + j - (n+d)] + time weight[bucket(query time - t_j)]
//!            to the token of step e <= d: position weight[N-1 + e - d] + time weight[bucket(0)]
//! logits     logit_scale * normalization(state) . head[token]
//! ```
//!
//! The full forward pass over `context | tokens` computes the same when the tokens carry the time of the
//! query, which is how a training sequence looks at its target.
//!
//! # Reuse
//!
//! [`Hstu::reuse`] follows from the constants, not from the name of the variant: whether positions count
//! from the end, whether a mask depends on the length, whether a bias takes the time of the next event.

pub mod batch;
mod best;
pub mod config;
pub(crate) mod embed;
mod family;
pub mod inputs;
pub(crate) mod layer_tensors;
mod mlp;
pub mod ranking;
mod reads;
pub mod retrieval;
mod sieve;
pub mod stack;
mod step;
pub mod symbols;
mod verify;

use std::collections::BTreeMap;
use std::ops::Range;

use beamline_compute::batch::{BranchRows, ContextRows};
use beamline_compute::cpu::Cpu;
use beamline_compute::cpu::kv_format::KvFormat;
use beamline_compute::cpu::linear::{Linear, WeightFormat};
use beamline_compute::cpu::mask::Mask;
use beamline_compute::cpu::pages::{PageShape, PageStore};
use beamline_kv_cache::ReuseClass;
use candle_core::Tensor;

use self::batch::{ContextOf, HstuBatch};
use self::config::{Direction, HstuConfig, ResearchHead, StackConfig, VariantConfig};
use self::embed::{Dlrm, Embedder};
use self::inputs::{InputError, Prepared, Request};
use self::ranking::Ranking;
use self::retrieval::{ItemTable, Retrieval, TokenHead};
use self::stack::{Stack, Workspace};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::described::{Described, Expected};
use crate::checkpoint::note::Note;
use crate::checkpoint::tensors::Tensors;
use crate::error::ModelError;
use crate::rows::{BeamRows, CandidateRows, ContextPart};
use crate::step::ContextShape;

pub use self::verify::{engine_outputs, verify};

const TOKEN_HEAD: &str = "_token_head.weight";
/// A buffer of research checkpoints that the configuration implies.
const ATTENTION_MASK: &str = "_attn_mask";

/// A loaded model.
#[derive(Debug)]
pub struct Hstu {
    config: HstuConfig,
    embedder: Embedder,
    stack: Stack,
    task: Task,
}

/// What a model is for.
#[derive(Debug)]
pub enum Task {
    /// It finds items among all.
    Retrieval(Retrieval),
    /// It scores the next token.
    Tokens(TokenHead),
    /// It scores candidates.
    Ranking(Ranking),
}

/// Names and shapes of the tensors that a checkpoint of this configuration must have.
pub fn expected_tensors(config: &HstuConfig) -> BTreeMap<String, Vec<usize>> {
    let (stack, variant) = (&config.stack, config.variant.variant());
    let mut expected = stack.expected_tensors(variant, variant.layer_prefix());
    Embedder::expect(config, &mut expected);
    match &config.variant {
        VariantConfig::Research(_, output) => {
            if let ResearchHead::Tokens { vocab_size, tied: false, .. } = &output.head {
                expected.insert(TOKEN_HEAD.into(), vec![*vocab_size, stack.model_dim]);
            }
        }
        VariantConfig::Dlrm(input, output) => ranking::expect_dlrm(input, output, stack, &mut expected),
        VariantConfig::Nvidia(_, output) => ranking::expect_nvidia(output, stack.model_dim, &mut expected),
    }
    expected
}

/// Names of tensors that a checkpoint may have: buffers that repeat the configuration. Those of dlrm are
/// compared with it where they are used.
pub fn optional_tensors(config: &HstuConfig) -> Vec<&'static str> {
    match config.variant.variant() {
        config::Variant::Research => vec![ATTENTION_MASK],
        config::Variant::Dlrm => [Dlrm::ACTION_WEIGHTS].into_iter().chain(ranking::DLRM_BUFFERS).collect(),
        config::Variant::Nvidia => Vec::new(),
    }
}

/// What scores tokens, `[vocab_size, model_dim]`, the factor of the logits in it.
pub(crate) fn token_head(
    tensors: &Tensors,
    vocab_size: usize,
    tied: bool,
    logit_scale: f64,
) -> Result<Tensor, ModelError> {
    let name = if tied { Embedder::items_name() } else { TOKEN_HEAD };
    let head = tensors.load(name)?.narrow(0, 0, vocab_size)?.contiguous()?;
    Ok((head * logit_scale)?)
}

impl Hstu {
    /// Opens the directory of a checkpoint of this family.
    ///
    /// # Errors
    ///
    /// As [`Checkpoint::open_as`] and [`HstuConfig::parse`].
    pub fn open(directory: &std::path::Path) -> Result<Checkpoint<HstuConfig>, ModelError> {
        Checkpoint::open_as(directory)
    }

    /// Checks every tensor of the checkpoint and packs the weights. Embedding tables stay in single
    /// precision in every format; the items to retrieve from are packed in it.
    ///
    /// # Errors
    ///
    /// When tensors are missing, unknown, of the wrong shape or type, or hold values that are not finite.
    pub fn load(
        checkpoint: &Checkpoint<HstuConfig>,
        cpu: &Cpu,
        format: WeightFormat,
    ) -> Result<Self, ModelError> {
        let (config, tensors) = (checkpoint.config().clone(), checkpoint.tensors());
        let (variant, width) = (config.variant.variant(), config.stack.model_dim);
        config.expected(tensors).check(tensors)?;
        let embedder = Embedder::load(&config, tensors, format)?;
        let stack = Stack::load(&config.stack, variant, variant.layer_prefix(), tensors, format)?;
        let task = match &config.variant {
            VariantConfig::Research(input, output) => {
                let normalization = output.normalization;
                match output.head {
                    ResearchHead::Items { eps } => {
                        let rows: Vec<f32> =
                            tensors.load(Embedder::items_name())?.flatten_all()?.to_vec1()?;
                        let items = ItemTable::new(cpu, &rows, width, eps, input.first_item(), format)?;
                        Task::Retrieval(Retrieval { normalization, items })
                    }
                    ResearchHead::Tokens { vocab_size, tied, logit_scale, .. } => {
                        let head = token_head(tensors, vocab_size, tied, logit_scale)?;
                        let head = Linear::pack(&[head], None, format)?;
                        Task::Tokens(TokenHead { normalization, head })
                    }
                }
            }
            VariantConfig::Dlrm(..) | VariantConfig::Nvidia(..) => {
                match Ranking::load(&config, tensors, format)? {
                    Some(ranking) => Task::Ranking(ranking),
                    None => unreachable!("these variants rank"),
                }
            }
        };
        Ok(Self { config, embedder, stack, task })
    }

    /// Configuration of the checkpoint.
    pub fn config(&self) -> &HstuConfig {
        &self.config
    }

    /// Layers of the model.
    pub fn stack(&self) -> &Stack {
        &self.stack
    }

    /// What the model is for, and what makes answers of final states.
    pub fn task(&self) -> &Task {
        &self.task
    }

    /// The format of the weights.
    pub fn format(&self) -> WeightFormat {
        self.stack.format()
    }

    /// Bytes of weights as they are served.
    pub fn weight_bytes(&self) -> usize {
        let task = match &self.task {
            Task::Retrieval(retrieval) => retrieval.items.bytes(),
            Task::Tokens(tokens) => tokens.head.bytes(),
            Task::Ranking(ranking) => ranking.bytes(),
        };
        self.embedder.bytes() + self.stack.weight_bytes() + task
    }

    /// Which positions of a context serve another request.
    pub fn reuse(&self) -> ReuseClass {
        self.config.reuse()
    }

    /// Allocates pages for this model.
    ///
    /// # Errors
    ///
    /// When the memory cannot be had.
    pub fn page_store(&self, format: KvFormat, pages: usize) -> Result<PageStore, ModelError> {
        self.stack.page_store(format, pages)
    }

    /// Checks a request.
    ///
    /// # Errors
    ///
    /// What is wrong with it.
    pub fn prepare(&self, request: Request) -> Result<Prepared, InputError> {
        self.config.prepare(request)
    }

    /// Adds rows of a request's context to a step.
    ///
    /// # Errors
    ///
    /// When the mask shows rows what is not computed yet.
    pub fn push_context(
        &self,
        cpu: &Cpu,
        batch: &mut HstuBatch,
        request: &Prepared,
        rows: ContextPart<'_>,
    ) -> Result<(), InputError> {
        let positions = rows.positions.clone();
        self.config.check_chunk(request, &positions)?;
        self.embedder.context(cpu, request, positions.clone(), &mut batch.embedded);
        let layout = ContextRows {
            owner: rows.owner,
            tokens: request.ids(positions.clone()),
            first_position: positions.start,
            cached: rows.cached,
            pages: rows.pages,
            wanted: rows.wanted,
        };
        batch.push_context(layout, context_of(request));
        Ok(())
    }

    /// Adds candidates of a request whose context is in pages, or in the same step.
    pub fn push_candidates(
        &self,
        cpu: &Cpu,
        batch: &mut HstuBatch,
        request: &Prepared,
        rows: CandidateRows<'_>,
    ) {
        self.embedder.candidates(cpu, request, rows.candidates.clone(), &mut batch.embedded);
        let own: Vec<u32> = (0..rows.candidates.len() as u32).collect();
        let layout = BranchRows {
            owner: rows.owner,
            tokens: &request.request.candidates.items[rows.candidates],
            context_len: request.context_len(),
            ancestors: 1,
            lineage: &own,
            context_pages: rows.context_pages,
            branch_pages: rows.branch_pages,
        };
        batch.push_branches(layout, context_of(request));
    }

    /// Adds generated tokens of a request: see the module's documentation for what they are.
    ///
    /// # Errors
    ///
    /// When they lie beyond the model's positions.
    pub fn push_tokens(
        &self,
        batch: &mut HstuBatch,
        request: &Prepared,
        rows: BeamRows<'_>,
    ) -> Result<(), InputError> {
        let position = self.config.generated_position(request, rows.ancestors)?;
        self.embedder.tokens(rows.tokens, position, &mut batch.embedded);
        batch.push_branches(rows.at(request.context_len()), context_of(request));
        Ok(())
    }

    /// Runs a step: see [`Stack::forward`].
    pub fn forward(
        &self,
        cpu: &Cpu,
        batch: &HstuBatch,
        pages: &mut PageStore,
        workspace: &mut Workspace,
        observe: &mut dyn FnMut(usize, &[f32]),
    ) {
        self.stack.forward(cpu, batch, pages, workspace, observe);
    }

    /// Predictions of candidates, `[candidates, names]`, from their final states. `None` for a model
    /// that does not rank.
    pub fn predict(
        &self,
        cpu: &Cpu,
        states: &[f32],
        request: &Prepared,
        candidates: Range<usize>,
    ) -> Option<Vec<f32>> {
        let Task::Ranking(ranking) = &self.task else { return None };
        ranking.predict(cpu, &self.embedder, states, request, candidates)
    }
}

/// The context of a request, as the layers see it.
pub(crate) fn context_of(request: &Prepared) -> ContextOf<'_> {
    ContextOf { len: request.context_len(), times: request.times() }
}

impl Described for HstuConfig {
    fn read(json: &str, _notes: &mut Vec<Note>) -> Result<Self, ModelError> {
        Self::parse(json)
    }

    fn layers(&self) -> usize {
        self.stack.layers
    }

    fn expected(&self, _tensors: &Tensors) -> Expected {
        let optional = optional_tensors(self).into_iter().map(str::to_owned).collect();
        Expected { shapes: expected_tensors(self), optional }
    }
}

impl HstuConfig {
    /// Which positions of a context serve another request.
    pub fn reuse(&self) -> ReuseClass {
        let backward = match &self.variant {
            VariantConfig::Research(input, _) => input.position.direction,
            VariantConfig::Dlrm(input, _) => input.position.direction,
            VariantConfig::Nvidia(input, _) => input.position.direction,
        } == Direction::Backward;
        if backward { ReuseClass::WithinRequest } else { self.stack.reuse() }
    }

    /// Whether a context may be computed in parts. Contextual rows see the rows after them, so theirs
    /// may not.
    pub fn context_shape(&self) -> ContextShape {
        if self.stack.mask.contextual_len > 0 { ContextShape::Whole } else { ContextShape::Causal }
    }
}

impl StackConfig {
    /// What a page holds.
    pub fn page_shape(&self, format: KvFormat) -> PageShape {
        let Self { layers, heads, key_dim, value_dim, .. } = *self;
        PageShape { format, layers, heads, key_dim, value_dim }
    }

    /// What the layers alone allow.
    pub fn reuse(&self) -> ReuseClass {
        if Mask::from(self.mask).depends_on_length() {
            ReuseClass::WithinRequest
        } else if self.relative_bias.is_some() {
            // Row i takes the time of event i + 1; after the last, that is the time of the query.
            ReuseClass::CrossRequestMinusLast
        } else {
            ReuseClass::CrossRequest
        }
    }
}
