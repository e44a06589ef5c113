//! config.json of family `hstu`: every constant of the forward pass, spelled out.
//!
//! Three incompatible models are called HSTU. Which one a checkpoint is cannot be told from its shapes, and a wrong
//! constant (the divisor of the attention, a clamp, which activations pass SiLU) gives plausible, wrong answers. So
//! nothing has a default: a field that is absent is an error that names it, and so is a field that is not known.
//!
//! ```text
//! model_type     "hstu"
//! hstu_variant   "research" | "dlrm" | "nvidia": what the tensors are called, and which input and output there are
//! stack          the layers: the same fields in all variants
//! input          what becomes of events, actions, times, contextual features and candidates before the layers
//! output         what becomes of the final states: retrieval, token logits or ranking predictions
//! ```
//!
//! Scales may be numbers or say how they follow from a width (`"sqrt_model_dim"`, `"inverse_sqrt_key_dim"`), so that no
//! digits are lost in a decimal.

use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use crate::cpu::mask::Mask;
use crate::cpu::time_buckets::{TIME_BUCKETS, TIME_DIVISOR};
use crate::error::ModelError;

/// Largest value accepted for a size, so that products of sizes cannot overflow.
const MAX_SIZE: usize = 1 << 24;
/// Most rows of a table of ids.
const MAX_ROWS: usize = 1 << 31;
/// Most levels of a semantic ID.
const MAX_LEVELS: usize = 64;

/// The whole configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct HstuConfig {
    /// The layers.
    pub stack: StackConfig,
    /// Variant, with its input and output.
    pub variant: VariantConfig,
}

/// Input and output of a variant.
#[derive(Clone, Debug, PartialEq)]
pub enum VariantConfig {
    /// The research repository: retrieval, or decoding of tokens.
    Research(ResearchInput, ResearchOutput),
    /// The production model, `DlrmHSTU`: ranking.
    Dlrm(DlrmInput, DlrmOutput),
    /// NVIDIA's model: ranking.
    Nvidia(NvidiaInput, NvidiaOutput),
}

impl VariantConfig {
    /// The name in config.json.
    pub fn variant(&self) -> Variant {
        match self {
            Self::Research(..) => Variant::Research,
            Self::Dlrm(..) => Variant::Dlrm,
            Self::Nvidia(..) => Variant::Nvidia,
        }
    }
}

/// Which model, by the names of its tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Variant {
    /// `research/modeling/sequential` of generative-recommenders.
    Research,
    /// `modules` of generative-recommenders.
    Dlrm,
    /// `examples/hstu` of recsys-examples.
    Nvidia,
}

/// Constants of the layers.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StackConfig {
    /// Width of the residual stream, D.
    pub model_dim: usize,
    /// Layers.
    pub layers: usize,
    /// Heads, H.
    pub heads: usize,
    /// Width of a query and key, dqk.
    pub key_dim: usize,
    /// Width of a value and of a head of u, dv.
    pub value_dim: usize,
    /// Norm of the layer's input.
    pub input_norm: LayerNormConfig,
    /// Whether the uvqk projection has a bias.
    pub uvqk_bias: bool,
    /// How the uvqk weight lies in the file; its outputs are u, v, q, k, each head by head.
    pub uvqk_layout: Layout,
    /// What passes SiLU after the projection.
    pub silu: SiluScope,
    /// Factor of the inner product of query and key.
    pub logit_scale: Scale,
    /// Divisor of the attention: a constant of the checkpoint, whatever the length of a history.
    pub attention_divisor: f64,
    /// Relative bias of position and time, or null.
    #[serde(deserialize_with = "nullable")]
    pub relative_bias: Option<RelativeBiasConfig>,
    /// Who sees whom.
    pub mask: MaskConfig,
    /// Norm of the attention's output.
    pub output_norm: OutputNormConfig,
    /// What the output projection reads.
    pub output_parts: OutputParts,
    /// Whether the output projection has a bias.
    pub output_bias: bool,
    /// How the output weight lies in the file.
    pub output_layout: Layout,
    /// Whether the layer's input is added to its output.
    pub residual: bool,
}

/// A layer norm.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LayerNormConfig {
    /// Whether it has weight and bias.
    pub affine: bool,
    /// Epsilon.
    pub eps: f64,
}

/// Norm of the attention's output.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct OutputNormConfig {
    /// Over all heads, or over each.
    pub kind: NormKind,
    /// Whether it has weight and bias; over each head these are one number per head.
    pub affine: bool,
    /// Epsilon.
    pub eps: f64,
}

/// Over what a norm goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NormKind {
    /// All heads together.
    Layer,
    /// Each head.
    Group,
}

/// Order of the dimensions of a weight.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Layout {
    /// `[inputs, outputs]`.
    InOut,
    /// `[outputs, inputs]`.
    OutIn,
}

/// What passes SiLU after the uvqk projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SiluScope {
    /// All four.
    Uvqk,
    /// u only.
    U,
    /// Nothing.
    None,
}

/// What the output projection reads, with u, a the attention's output, and n its norm.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum OutputParts {
    /// `u * n`.
    Gated,
    /// `[u, a, u * n]`: the raw output.
    ConcatRaw,
    /// `[u, n, u * n]`: the normed output.
    ConcatNormed,
}

impl OutputParts {
    /// How many times the width of all values.
    pub fn count(self) -> usize {
        match self {
            Self::Gated => 1,
            Self::ConcatRaw | Self::ConcatNormed => 3,
        }
    }
}

/// A factor.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(untagged)]
pub enum Scale {
    /// This number.
    Number(f64),
    /// From a width.
    Named(NamedScale),
}

/// A factor that follows from a width.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum NamedScale {
    /// The square root of the model's width.
    SqrtModelDim,
    /// One over the square root of a key's width.
    InverseSqrtKeyDim,
}

/// Relative bias.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RelativeBiasConfig {
    /// Positions N; there are 2N - 1 differences.
    pub positions: usize,
    /// Highest time bucket; there is one weight more.
    pub time_buckets: usize,
    /// Divisor of the logarithm. The thresholds of the buckets are those of 0.301.
    pub time_divisor: f64,
}

/// Who sees whom: see [`Mask`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MaskConfig {
    /// Contextual rows that see the whole context; 0 where they are but the beginning of a causal sequence.
    pub contextual_len: usize,
    /// `max_attn_len`; 0 for none.
    pub max_attention_len: usize,
    /// `min_full_attn_seq_len`; 0 for none.
    pub min_full_attention_len: usize,
}

impl From<MaskConfig> for Mask {
    fn from(config: MaskConfig) -> Self {
        Self {
            contextual: config.contextual_len,
            window: config.max_attention_len,
            full_tail: config.min_full_attention_len,
        }
    }
}

/// Which way positions are counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Direction {
    /// From the first row.
    Forward,
    /// Back from the end of the history.
    Backward,
}

/// A position embedding.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PositionConfig {
    /// Which way.
    pub direction: Direction,
    /// Rows of the table.
    pub rows: usize,
    /// Factor of the row before its position is added.
    pub scale: Scale,
}

/// Events of the research variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResearchInput {
    /// Highest item id; the table has one row more.
    pub num_items: usize,
    /// The id whose rows are zero, or null.
    #[serde(deserialize_with = "nullable")]
    pub padding_id: Option<u32>,
    /// Most events of a history.
    pub max_sequence_length: usize,
    /// Positions.
    pub position: PositionConfig,
    /// How the action of an event enters, or null if it does not.
    #[serde(deserialize_with = "nullable")]
    pub actions: Option<ResearchActions>,
}

/// Actions of the research variant.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResearchActions {
    /// Rows of the action table; actions are its row numbers.
    pub count: usize,
    /// Width of the table.
    pub dim: usize,
    /// Whether the action's row is added to the item's, or appended (the item table is then narrower).
    pub combine: Combine,
    /// Action of rows that are generated.
    pub generated: u32,
}

/// How two embeddings become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Combine {
    /// Their sum.
    Add,
    /// One after the other.
    Concat,
}

/// Final states of the research variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ResearchOutput {
    /// What is done to a final state.
    pub normalization: Normalization,
    /// What it is compared with.
    pub head: ResearchHead,
}

/// What is done to a final state.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Normalization {
    /// Division by the length, or by `eps` if that is more.
    L2 {
        /// Least divisor.
        eps: f64,
    },
    /// Layer norm without weights.
    LayerNorm {
        /// Epsilon.
        eps: f64,
    },
    /// Nothing.
    None {},
}

/// What a final state is compared with.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum ResearchHead {
    /// All items, each of unit length: retrieval.
    Items {
        /// Least length an item is divided by.
        eps: f64,
    },
    /// The tokens of a vocabulary, to be decoded one by one.
    Tokens {
        /// Rows of the head; token ids are item ids.
        vocab_size: usize,
        /// Whether the head is the item table; otherwise it is a tensor of its own.
        tied: bool,
        /// Factor of every logit: one over the temperature of training.
        logit_scale: f64,
        /// What the levels of a semantic ID are written as, first level first. An event of the history is as many rows.
        semantic_id_levels: Vec<SemanticIdLevel>,
    },
}

/// Tokens of a level of a semantic ID: code c is token `first_token + c`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SemanticIdLevel {
    /// Token of code 0.
    pub first_token: u32,
    /// Codes.
    pub codes: u32,
}

impl SemanticIdLevel {
    /// The token of a code.
    pub fn token(self, code: u32) -> Option<u32> {
        (code < self.codes).then(|| self.first_token + code)
    }
}

/// A table of embeddings.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableConfig {
    /// Name in the embedding collection.
    pub name: String,
    /// Rows.
    pub rows: usize,
    /// What becomes of ids beyond the rows.
    pub unknown_ids: UnknownIds,
}

/// What becomes of ids beyond the rows of a table.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum UnknownIds {
    /// The request is refused.
    Refuse,
    /// They take the last row.
    Clamp,
}

/// A feature of every event and candidate.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FeatureConfig {
    /// Name.
    pub name: String,
    /// Table its ids are rows of.
    pub table: String,
}

/// A feature of the user.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContextualConfig {
    /// Name.
    pub name: String,
    /// Table its ids are rows of.
    pub table: String,
    /// Rows it takes in front of the history: its most values.
    pub slots: usize,
    /// Its values count as absent in a request of fewer events and candidates; 0 for always.
    pub min_tokens: usize,
}

/// Input of the production variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DlrmInput {
    /// Width of every table, E.
    pub embedding_dim: usize,
    /// Tables.
    pub tables: Vec<TableConfig>,
    /// Features of events and candidates: the first is the item itself, the others are its additional ones.
    pub features: Vec<FeatureConfig>,
    /// Features of the user, in the order of their slots.
    pub contextual: Vec<ContextualConfig>,
    /// Bits of an action, in the order of the action table.
    pub action_weights: Vec<u32>,
    /// Width of an action's embedding.
    pub action_dim: usize,
    /// Inner width of the MLPs.
    pub hidden_dim: usize,
    /// Epsilon of the norms in the MLPs.
    pub norm_eps: f64,
    /// Positions.
    pub position: PositionConfig,
    /// Times.
    pub time: DlrmTime,
    /// Most events of a history.
    pub max_history: usize,
    /// Most candidates of a request.
    pub max_candidates: usize,
}

/// Time embedding of the production variant.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DlrmTime {
    /// Rows of the table.
    pub rows: usize,
    /// Seconds that the age of an event is divided by before the square root.
    pub divisor: f64,
    /// The highest bucket.
    pub clamp: TimeClamp,
}

/// The highest bucket of the time embedding.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TimeClamp {
    /// The last row: what is trained with the reference's GPU kernels.
    Rows,
    /// The model's width less one: what the reference's PyTorch path computes.
    ModelDim,
}

/// Output of the production variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DlrmOutput {
    /// What is done to a candidate's final state.
    pub postprocessor: Postprocessor,
    /// What a candidate itself is turned into.
    pub item_tower: ItemTower,
    /// Inner width of the prediction module.
    pub prediction_hidden_dim: usize,
    /// Epsilon of its norm.
    pub prediction_norm_eps: f64,
    /// Tasks in the order of the outputs.
    pub tasks: Vec<TaskConfig>,
}

/// What is done to a candidate's final state.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Postprocessor {
    /// Time of day and week are appended, then a linear layer and a layer norm.
    TimestampLayerNorm {
        /// Seconds of each period and how many of them make a cycle.
        periods: Vec<(u32, u32)>,
        /// Angle of a cycle: 6.28 in the reference, not two pi.
        cycle: f64,
        /// Epsilon of the norm.
        eps: f64,
    },
    /// Layer norm.
    LayerNorm {
        /// Epsilon.
        eps: f64,
    },
    /// Division by the length.
    L2 {
        /// Least divisor.
        eps: f64,
    },
}

/// The tower of the candidate itself.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ItemTower {
    /// Names of the features it reads, in order.
    pub features: Vec<String>,
    /// Inner width.
    pub hidden_dim: usize,
    /// Epsilon of its norms.
    pub norm_eps: f64,
}

/// What is predicted.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TaskConfig {
    /// Name.
    pub name: String,
    /// Kind.
    pub kind: TaskKind,
}

/// Kind of a task.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum TaskKind {
    /// A probability: the sigmoid of the output.
    Binary,
    /// The output itself.
    Regression,
}

/// Input of NVIDIA's variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NvidiaInput {
    /// Tables, all as wide as the model.
    pub tables: Vec<TableConfig>,
    /// Table of the items.
    pub item_table: String,
    /// Table of the actions, which are rows of their own between the items; null if there are none.
    #[serde(deserialize_with = "nullable")]
    pub action_table: Option<String>,
    /// Features of the user; a value that is absent takes no row.
    pub contextual: Vec<ContextualConfig>,
    /// Positions.
    pub position: PositionConfig,
    /// MLPs between the tables and the layers: not implemented, null.
    #[serde(deserialize_with = "nullable")]
    pub preprocessing_mlp: Option<Value>,
    /// Time embedding: not implemented, false.
    pub time_encoding: bool,
    /// Most events of a history.
    pub max_history: usize,
    /// Most candidates of a request.
    pub max_candidates: usize,
}

/// Output of NVIDIA's variant.
#[derive(Clone, Debug, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NvidiaOutput {
    /// What is done to a candidate's final state.
    pub normalization: Normalization,
    /// Widths of the prediction layers.
    pub head: Vec<usize>,
    /// Whether they have biases.
    pub head_bias: bool,
    /// Between them.
    pub activation: Activation,
    /// What the outputs are.
    pub prediction: Prediction,
    /// Names of the outputs if each is a task; a single name if they are its classes.
    pub tasks: Vec<String>,
}

/// Activation of the prediction layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Activation {
    /// `max(x, 0)`.
    Relu,
    /// `x * Phi(x)`, exact.
    Gelu,
}

/// What the outputs of NVIDIA's head are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Prediction {
    /// A probability each: the sigmoid.
    Sigmoid,
    /// Classes of one task: the softmax.
    Softmax,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Raw {
    model_type: String,
    hstu_variant: Variant,
    stack: StackConfig,
    input: Value,
    output: Value,
}

/// A field that may be null and must be there.
fn nullable<'de, D: Deserializer<'de>, T: Deserialize<'de>>(from: D) -> Result<Option<T>, D::Error> {
    Option::deserialize(from)
}

fn part<T: DeserializeOwned>(name: &str, value: Value) -> Result<T, ModelError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let (path, inner) = (error.path().to_string(), error.inner());
        let path = if path == "." { name.to_owned() } else { format!("{name}.{path}") };
        ModelError::Config(format!("{path}: {inner}"))
    })
}

impl HstuConfig {
    /// Whether a config.json is of this family.
    pub fn is_hstu(json: &str) -> bool {
        serde_json::from_str::<Value>(json).is_ok_and(|value| value["model_type"] == "hstu")
    }

    /// Parses config.json.
    ///
    /// # Errors
    ///
    /// When a constant is missing, unknown, out of range, or contradicts another; the message names it.
    pub fn parse(json: &str) -> Result<Self, ModelError> {
        let value: Value = serde_json::from_str(json).map_err(|e| ModelError::Config(e.to_string()))?;
        let raw: Raw =
            serde_path_to_error::deserialize(value).map_err(|e| ModelError::Config(e.to_string()))?;
        if raw.model_type != "hstu" {
            return Err(ModelError::Config(format!("model_type is {:?}, expected \"hstu\"", raw.model_type)));
        }
        let variant = match raw.hstu_variant {
            Variant::Research => {
                VariantConfig::Research(part("input", raw.input)?, part("output", raw.output)?)
            }
            Variant::Dlrm => VariantConfig::Dlrm(part("input", raw.input)?, part("output", raw.output)?),
            Variant::Nvidia => VariantConfig::Nvidia(part("input", raw.input)?, part("output", raw.output)?),
        };
        let config = Self { stack: raw.stack, variant };
        config.check().map_err(ModelError::Config)?;
        Ok(config)
    }

    fn check(&self) -> Result<(), String> {
        self.stack.check(self.variant.variant())?;
        match &self.variant {
            VariantConfig::Research(input, output) => input.check(&self.stack, output),
            VariantConfig::Dlrm(input, output) => input.check(output),
            VariantConfig::Nvidia(input, output) => input.check(output),
        }
    }
}

fn size(name: &str, value: usize) -> Result<(), String> {
    in_range(name, value, MAX_SIZE)
}

fn in_range(name: &str, value: usize, most: usize) -> Result<(), String> {
    if (1..=most).contains(&value) { Ok(()) } else { Err(format!("{name} is {value}, expected 1 to {most}")) }
}

fn positive(name: &str, value: f64) -> Result<(), String> {
    let single = value as f32;
    if single.is_finite() && single > 0.0 {
        Ok(())
    } else {
        Err(format!("{name} is {value}, expected more than 0"))
    }
}

fn require(holds: bool, otherwise: &str) -> Result<(), String> {
    if holds { Ok(()) } else { Err(otherwise.to_owned()) }
}

impl Scale {
    /// The number.
    pub fn value(self, stack: &StackConfig) -> f32 {
        match self {
            Self::Number(number) => number as f32,
            Self::Named(NamedScale::SqrtModelDim) => (stack.model_dim as f64).sqrt() as f32,
            Self::Named(NamedScale::InverseSqrtKeyDim) => (1.0 / (stack.key_dim as f64).sqrt()) as f32,
        }
    }

    fn check(self, name: &str) -> Result<(), String> {
        match self {
            Self::Number(number) => positive(name, number),
            Self::Named(_) => Ok(()),
        }
    }
}

impl StackConfig {
    /// Width of the attention's output: all values.
    pub fn values(&self) -> usize {
        self.heads * self.value_dim
    }

    /// Width of all keys.
    pub fn keys(&self) -> usize {
        self.heads * self.key_dim
    }

    /// Width of the uvqk projection's output.
    pub fn uvqk(&self) -> usize {
        2 * (self.values() + self.keys())
    }

    /// Checks what must hold of the layers of a variant.
    ///
    /// # Errors
    ///
    /// What does not hold, in words.
    pub fn check(&self, variant: Variant) -> Result<(), String> {
        size("stack.model_dim", self.model_dim)?;
        in_range("stack.layers", self.layers, 4096)?;
        in_range("stack.heads", self.heads, 4096)?;
        in_range("stack.key_dim", self.key_dim, 4096)?;
        in_range("stack.value_dim", self.value_dim, 4096)?;
        positive("stack.input_norm.eps", self.input_norm.eps)?;
        positive("stack.output_norm.eps", self.output_norm.eps)?;
        self.logit_scale.check("stack.logit_scale")?;
        positive("stack.attention_divisor", self.attention_divisor).map_err(|error| {
            format!(
                "{error}: it is a constant of the checkpoint (scaling_seqlen, or the longest sequence of training); \
                 the length of a batch would make an answer depend on what shares it"
            )
        })?;
        let mask = self.mask;
        for (name, value) in [
            ("stack.mask.contextual_len", mask.contextual_len),
            ("stack.mask.max_attention_len", mask.max_attention_len),
            ("stack.mask.min_full_attention_len", mask.min_full_attention_len),
        ] {
            require(value <= MAX_SIZE, &format!("{name} is {value}, more than {MAX_SIZE}"))?;
        }
        if let Some(bias) = self.relative_bias {
            size("stack.relative_bias.positions", bias.positions)?;
            in_range("stack.relative_bias.time_buckets", bias.time_buckets, TIME_BUCKETS - 1)?;
            require(
                bias.time_divisor == TIME_DIVISOR,
                &format!(
                    "stack.relative_bias.time_divisor is {}, only {TIME_DIVISOR} is implemented",
                    bias.time_divisor
                ),
            )?;
            require(Mask::from(mask).is_causal(), "stack.relative_bias needs a causal mask")?;
        }
        match variant {
            Variant::Research => {
                require(
                    (self.uvqk_layout, self.output_layout) == (Layout::InOut, Layout::OutIn),
                    "research checkpoints have stack.uvqk_layout \"in_out\" and stack.output_layout \"out_in\"",
                )?;
                require(
                    !self.input_norm.affine && !self.output_norm.affine && !self.uvqk_bias,
                    "research checkpoints have no tensors for affine norms or a uvqk bias",
                )
            }
            Variant::Dlrm => {
                require(
                    (self.uvqk_layout, self.output_layout) == (Layout::InOut, Layout::InOut),
                    "dlrm checkpoints have stack.uvqk_layout and stack.output_layout \"in_out\"",
                )?;
                require(
                    self.relative_bias.is_none() && !self.output_bias,
                    "dlrm checkpoints have no tensors for a relative bias or an output bias",
                )
            }
            Variant::Nvidia => {
                require(
                    self.uvqk_layout == self.output_layout,
                    "nvidia checkpoints have one layout: both \"in_out\" (fused) or both \"out_in\" (inference)",
                )?;
                require(
                    self.relative_bias.is_none() && !self.output_bias,
                    "nvidia checkpoints have no tensors for a relative bias or an output bias",
                )
            }
        }
    }
}

impl Normalization {
    fn check(self) -> Result<(), String> {
        match self {
            Self::L2 { eps } | Self::LayerNorm { eps } => positive("output.normalization.eps", eps),
            Self::None {} => Ok(()),
        }
    }
}

impl ResearchInput {
    /// Width of the item table.
    pub fn item_dim(&self, stack: &StackConfig) -> usize {
        match self.actions {
            Some(ResearchActions { combine: Combine::Concat, dim, .. }) => stack.model_dim - dim,
            _ => stack.model_dim,
        }
    }

    fn check(&self, stack: &StackConfig, output: &ResearchOutput) -> Result<(), String> {
        in_range("input.num_items", self.num_items, MAX_ROWS)?;
        size("input.max_sequence_length", self.max_sequence_length)?;
        size("input.position.rows", self.position.rows)?;
        self.position.scale.check("input.position.scale")?;
        require(
            self.position.direction == Direction::Forward,
            "input.position.direction \"backward\" is not implemented for research",
        )?;
        let positions = stack.relative_bias.map_or(self.position.rows, |bias| bias.positions);
        require(
            self.max_sequence_length <= self.position.rows.min(positions),
            "input.max_sequence_length exceeds input.position.rows or stack.relative_bias.positions",
        )?;
        if let Some(actions) = self.actions {
            size("input.actions.count", actions.count)?;
            match actions.combine {
                Combine::Add => {
                    require(
                        actions.dim == stack.model_dim,
                        "input.actions.dim must be stack.model_dim to be added",
                    )?;
                }
                Combine::Concat => {
                    in_range("input.actions.dim", actions.dim, stack.model_dim.saturating_sub(1))?;
                }
            }
            require((actions.generated as usize) < actions.count, "input.actions.generated is no action")?;
        }
        output.normalization.check()?;
        match &output.head {
            ResearchHead::Items { eps } => positive("output.head.eps", *eps)?,
            ResearchHead::Tokens { vocab_size, logit_scale, semantic_id_levels, .. } => {
                in_range("output.head.vocab_size", *vocab_size, self.num_items + 1)?;
                positive("output.head.logit_scale", *logit_scale)?;
                self.check_levels(semantic_id_levels, *vocab_size, positions)?;
            }
        }
        require(
            self.item_dim(stack) == stack.model_dim
                || matches!(&output.head, ResearchHead::Tokens { tied: false, .. }),
            "with appended actions the item table is narrower than a final state: only an untied token head fits",
        )
    }
}

impl ResearchInput {
    fn check_levels(
        &self,
        levels: &[SemanticIdLevel],
        vocab_size: usize,
        positions: usize,
    ) -> Result<(), String> {
        in_range("output.head.semantic_id_levels: levels", levels.len(), MAX_LEVELS)?;
        for (index, level) in levels.iter().enumerate() {
            let name = format!("output.head.semantic_id_levels[{index}]");
            require(
                level.codes > 0 && u64::from(level.first_token) + u64::from(level.codes) <= vocab_size as u64,
                &format!(
                    "{name}: tokens {} and on for {} codes are not all in a vocabulary of {vocab_size}",
                    level.first_token, level.codes
                ),
            )?;
            let padding = self.padding_id.and_then(|id| id.checked_sub(level.first_token));
            require(
                padding.is_none_or(|code| code >= level.codes),
                &format!("{name}: one of its tokens is input.padding_id"),
            )?;
        }
        require(
            self.max_sequence_length.is_multiple_of(levels.len()),
            "input.max_sequence_length counts rows: it must be a multiple of the levels of a semantic ID",
        )?;
        // The last token is predicted, and never a row.
        require(
            self.max_sequence_length + levels.len() - 1 <= positions,
            "input.position.rows or stack.relative_bias.positions has no place for the generated tokens: at least \
             input.max_sequence_length and the levels of a semantic ID less one",
        )
    }
}

fn check_tables(tables: &[TableConfig], used: &[&str]) -> Result<(), String> {
    if let Some(name) = used.iter().find(|name| tables.iter().all(|table| table.name != **name)) {
        return Err(format!("input.tables has no table {name:?}"));
    }
    for (index, table) in tables.iter().enumerate() {
        in_range(&format!("input.tables: rows of {}", table.name), table.rows, MAX_ROWS)?;
        let first = tables.iter().position(|other| other.name == table.name);
        require(first == Some(index), &format!("input.tables names {} twice", table.name))?;
        require(used.contains(&table.name.as_str()), &format!("input.tables: nothing uses {}", table.name))?;
    }
    Ok(())
}

fn check_contextual(contextual: &[ContextualConfig]) -> Result<(), String> {
    contextual
        .iter()
        .try_for_each(|feature| in_range(&format!("slots of {}", feature.name), feature.slots, 4096))
}

impl DlrmInput {
    /// Rows in front of every history.
    pub fn slots(&self) -> usize {
        self.contextual.iter().map(|feature| feature.slots).sum()
    }

    fn check(&self, output: &DlrmOutput) -> Result<(), String> {
        size("input.embedding_dim", self.embedding_dim)?;
        size("input.hidden_dim", self.hidden_dim)?;
        size("input.action_dim", self.action_dim)?;
        size("input.max_history", self.max_history)?;
        size("input.max_candidates", self.max_candidates)?;
        size("input.position.rows", self.position.rows)?;
        size("input.time.rows", self.time.rows)?;
        positive("input.time.divisor", self.time.divisor)?;
        positive("input.norm_eps", self.norm_eps)?;
        self.position.scale.check("input.position.scale")?;
        require(
            self.position.direction == Direction::Backward,
            "input.position.direction \"forward\" is not implemented for dlrm",
        )?;
        require(!self.features.is_empty(), "input.features is empty; the first is the item")?;
        require(!self.action_weights.is_empty(), "input.action_weights is empty")?;
        check_contextual(&self.contextual)?;
        let features = self.features.iter().map(|feature| feature.table.as_str());
        let used: Vec<&str> = features.chain(self.contextual.iter().map(|c| c.table.as_str())).collect();
        check_tables(&self.tables, &used)?;

        size("output.item_tower.hidden_dim", output.item_tower.hidden_dim)?;
        positive("output.item_tower.norm_eps", output.item_tower.norm_eps)?;
        size("output.prediction_hidden_dim", output.prediction_hidden_dim)?;
        positive("output.prediction_norm_eps", output.prediction_norm_eps)?;
        require(!output.item_tower.features.is_empty(), "output.item_tower.features is empty")?;
        for name in &output.item_tower.features {
            let known = self.features.iter().any(|feature| &feature.name == name);
            require(known, &format!("output.item_tower.features: {name:?} is not in input.features"))?;
        }
        require(!output.tasks.is_empty(), "output.tasks is empty")?;
        match &output.postprocessor {
            Postprocessor::TimestampLayerNorm { periods, cycle, eps } => {
                positive("output.postprocessor.cycle", *cycle)?;
                positive("output.postprocessor.eps", *eps)?;
                let whole =
                    !periods.is_empty() && periods.iter().all(|&(period, units)| period > 0 && units > 0);
                require(whole, "output.postprocessor.periods is empty or holds a zero")
            }
            Postprocessor::LayerNorm { eps } | Postprocessor::L2 { eps } => {
                positive("output.postprocessor.eps", *eps)
            }
        }
    }
}

impl NvidiaInput {
    fn check(&self, output: &NvidiaOutput) -> Result<(), String> {
        size("input.max_history", self.max_history)?;
        size("input.max_candidates", self.max_candidates)?;
        size("input.position.rows", self.position.rows)?;
        self.position.scale.check("input.position.scale")?;
        require(
            self.position.direction == Direction::Forward,
            "input.position.direction \"backward\" is not implemented for nvidia",
        )?;
        require(self.preprocessing_mlp.is_none(), "input.preprocessing_mlp is not implemented")?;
        require(!self.time_encoding, "input.time_encoding is not implemented")?;
        check_contextual(&self.contextual)?;
        require(
            self.contextual.iter().all(|feature| feature.min_tokens == 0),
            "input.contextual: min_tokens is not implemented for nvidia",
        )?;
        let tables = [Some(&self.item_table), self.action_table.as_ref()].into_iter().flatten();
        let used: Vec<&str> =
            tables.map(String::as_str).chain(self.contextual.iter().map(|c| c.table.as_str())).collect();
        check_tables(&self.tables, &used)?;

        output.normalization.check()?;
        require(!output.head.is_empty(), "output.head is empty")?;
        output.head.iter().try_for_each(|&width| size("output.head", width))?;
        let outputs = output.head.last().copied().unwrap_or_default();
        let named = match output.prediction {
            Prediction::Sigmoid => outputs,
            Prediction::Softmax => 1,
        };
        require(
            output.tasks.len() == named,
            &format!("output.tasks holds {} names, expected {named}", output.tasks.len()),
        )
    }
}
