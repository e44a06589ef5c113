//! config.json of family `hstu`: every constant of the forward pass, spelled out.
//!
//! Three incompatible models are called HSTU. Shapes do not tell which one a checkpoint is, and a wrong
//! constant gives plausible, wrong answers (the divisor of the attention, a clamp, which activations
//! pass SiLU). So nothing has a default. A field that is absent is an error that names it. So is a field
//! that is unknown, is given twice, or holds a number that no trained model has.
//!
//! ```text
//! model_type     "hstu"
//! hstu_variant   "research" | "dlrm" | "nvidia": names of the tensors, kind of input and output
//! stack          the layers: the same fields in all variants
//! input          events, actions, times, contextual features and candidates before the layers
//! output         final states after the layers: retrieval, token logits or ranking predictions
//! ```
//!
//! Scales may be numbers, or say how they follow from a width (`"sqrt_model_dim"`,
//! `"inverse_sqrt_key_dim"`), so that a decimal loses no digits.

mod checks;
mod dlrm;
mod nvidia;
mod research;
mod stack;

use beamline_wording::plain;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::Value;

use self::checks::{epsilon, positive};
use crate::checkpoint::json;
use crate::error::ModelError;

pub use self::dlrm::{
    DlrmInput, DlrmOutput, DlrmTime, FeatureConfig, ItemTower, Postprocessor, TaskConfig, TaskKind, TimeClamp,
};
pub use self::nvidia::{Activation, NvidiaInput, NvidiaOutput, Prediction};
pub use self::research::{
    Combine, ResearchActions, ResearchHead, ResearchInput, ResearchOutput, SemanticIdLevel,
};
pub use self::stack::{
    LayerNormConfig, Layout, MaskConfig, NormKind, OutputNormConfig, OutputParts, RelativeBiasConfig,
    SiluScope, StackConfig,
};

/// The whole configuration.
#[derive(Clone, Debug, PartialEq)]
pub struct HstuConfig {
    /// Constants of the layers.
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

/// A constant factor: a number, or derived from a width.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(untagged, expecting = "expected a number, \"sqrt_model_dim\" or \"inverse_sqrt_key_dim\"")]
pub enum Scale {
    /// This number itself.
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
    /// Which way positions count.
    pub direction: Direction,
    /// Rows of the table.
    pub rows: usize,
    /// Factor of the row before its position is added.
    pub scale: Scale,
}

/// What is done to a final state.
#[derive(Clone, Copy, Debug, PartialEq, Deserialize)]
#[serde(tag = "kind", rename_all = "snake_case", deny_unknown_fields)]
pub enum Normalization {
    /// Division by the length, or by `eps` if that is more.
    L2 {
        /// Least length to divide by.
        eps: f64,
    },
    /// Layer norm without weights.
    LayerNorm {
        /// Epsilon of the norm.
        eps: f64,
    },
    /// The state stays as it is.
    None {},
}

/// A table of embeddings.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TableConfig {
    /// Name in the embedding collection.
    pub name: String,
    /// Rows of the table.
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

/// A feature of the user.
#[derive(Clone, Debug, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContextualConfig {
    /// Name of the feature.
    pub name: String,
    /// Table its ids are rows of.
    pub table: String,
    /// Rows it takes in front of the history: its most values.
    pub slots: usize,
    /// Its values count as absent in a request of fewer events and candidates; 0 for always.
    pub min_tokens: usize,
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

fn part<T: DeserializeOwned>(name: &str, value: Value) -> Result<T, ModelError> {
    serde_path_to_error::deserialize(value).map_err(|error| {
        let (path, inner) = (error.path().to_string(), error.inner());
        let path = if path == "." { name.to_owned() } else { format!("{name}.{path}") };
        ModelError::Config(format!("{path}: {}", plain(&inner.to_string())))
    })
}

/// What a model is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    /// It finds items among all.
    Retrieve,
    /// It scores the next token.
    Decode,
    /// It scores candidates.
    Rank,
}

impl HstuConfig {
    /// What the model is for.
    pub fn purpose(&self) -> Purpose {
        match &self.variant {
            VariantConfig::Research(_, output) => match output.head {
                ResearchHead::Items { .. } => Purpose::Retrieve,
                ResearchHead::Tokens { .. } => Purpose::Decode,
            },
            VariantConfig::Dlrm(..) | VariantConfig::Nvidia(..) => Purpose::Rank,
        }
    }

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
        let value = json::parse(json).map_err(ModelError::Config)?;
        let raw: Raw =
            serde_path_to_error::deserialize(value).map_err(|e| ModelError::Config(plain(&e.to_string())))?;
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

impl Scale {
    /// The factor as a number.
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

impl Normalization {
    fn check(self) -> Result<(), String> {
        match self {
            Self::L2 { eps } | Self::LayerNorm { eps } => epsilon("output.normalization.eps", eps),
            Self::None {} => Ok(()),
        }
    }
}
