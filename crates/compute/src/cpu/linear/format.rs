//! How weights are kept in memory.

use serde::{Deserialize, Serialize};

/// How weights are kept in memory. In all formats, activations, keys and values, norms and scores are in
/// single precision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WeightFormat {
    /// Single precision: what the checkpoint says, exactly.
    #[default]
    F32,
    /// bfloat16, 2 bytes a weight; activations are rounded to bfloat16 before each product, sums are in
    /// single precision. Weights stored as bfloat16 lose nothing.
    Bf16,
    /// 8-bit integers with a scale for each 32 inputs of an output, 1.125 bytes a weight. Activations
    /// are quantised the same way before each product (dynamic quantisation). It is the fastest format
    /// and the least exact.
    #[serde(rename = "q8_0")]
    Q8_0,
}

impl WeightFormat {
    /// All formats, the exact one first.
    pub const ALL: [Self; 3] = [Self::F32, Self::Bf16, Self::Q8_0];

    /// Bytes of `weights` weights, at most: the last block of a row may not be full.
    pub fn bytes_of(self, weights: usize) -> usize {
        match self {
            Self::F32 => weights.saturating_mul(4),
            Self::Bf16 => weights.saturating_mul(2),
            // A byte, and an eighth of one for the scale.
            Self::Q8_0 => weights.saturating_add(weights / 4),
        }
    }

    /// The name in settings, metrics and answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
            Self::Q8_0 => "q8_0",
        }
    }
}

impl std::fmt::Display for WeightFormat {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name())
    }
}

impl std::str::FromStr for WeightFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| format!("{name:?} is not a weight format; there are f32, bf16 and q8_0"))
    }
}
