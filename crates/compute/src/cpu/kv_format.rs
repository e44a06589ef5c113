//! How keys and values are kept in pages.

use serde::{Deserialize, Serialize};

/// How keys and values are kept in pages. In both formats, queries, products with keys, weights of
/// values and their sums are in single precision.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KvFormat {
    /// Single precision, as they were computed.
    #[default]
    F32,
    /// Rounded to bfloat16, half the memory. The step that computes a row already attends to its rounded
    /// form, so it makes no difference whether the row came from the cache.
    Bf16,
}

impl KvFormat {
    /// All formats, the exact one first.
    pub const ALL: [Self; 2] = [Self::F32, Self::Bf16];

    /// The name in settings and answers.
    pub fn name(self) -> &'static str {
        match self {
            Self::F32 => "f32",
            Self::Bf16 => "bf16",
        }
    }

    /// Bytes of a number.
    pub fn bytes(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::Bf16 => 2,
        }
    }
}

impl std::fmt::Display for KvFormat {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str(self.name())
    }
}

impl std::str::FromStr for KvFormat {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|format| format.name() == name);
        found.ok_or_else(|| format!("{name:?} is not a format of keys and values; there are f32 and bf16"))
    }
}
