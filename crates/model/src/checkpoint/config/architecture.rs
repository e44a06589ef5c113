//! Which architecture config.json names, and what transformers takes for the fields that it leaves out.

use serde_json::{Map, Value};

use super::fields::shown;

/// What `architectures` names.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Architecture {
    /// Qwen3, written `Qwen3ForCausalLM` in config.json.
    Qwen3,
    /// Qwen2, written `Qwen2ForCausalLM` in config.json.
    Qwen2,
    /// Llama, written `LlamaForCausalLM` in config.json.
    Llama,
}

impl Architecture {
    /// The name in config.json.
    pub fn name(self) -> &'static str {
        match self {
            Self::Qwen3 => "Qwen3ForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Llama => "LlamaForCausalLM",
        }
    }
}

/// What transformers takes for fields that are absent.
pub(super) struct Defaults {
    /// As many as heads where there is none.
    pub(super) kv_heads: Option<usize>,
    /// The residual stream divided by the heads where there is none.
    pub(super) head_dim: Option<usize>,
    pub(super) positions: usize,
}

impl Architecture {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Qwen3, Self::Qwen2, Self::Llama];

    /// The name of the model without its output matrix, and `model_type`.
    fn other_names(self) -> (&'static str, &'static str) {
        match self {
            Self::Qwen3 => ("Qwen3Model", "qwen3"),
            Self::Qwen2 => ("Qwen2Model", "qwen2"),
            Self::Llama => ("LlamaModel", "llama"),
        }
    }

    pub(super) fn defaults(self) -> Defaults {
        match self {
            Self::Qwen3 => Defaults { kv_heads: Some(32), head_dim: Some(128), positions: 32_768 },
            Self::Qwen2 => Defaults { kv_heads: Some(32), head_dim: None, positions: 32_768 },
            Self::Llama => Defaults { kv_heads: None, head_dim: None, positions: 2048 },
        }
    }

    /// What `architectures` names. `model_type`, by which transformers goes, must say the same.
    pub(super) fn of(object: &Map<String, Value>) -> Result<Self, String> {
        const KNOWN: &str = "known are Qwen3ForCausalLM, Qwen2ForCausalLM and LlamaForCausalLM";
        let kind = match object.get("model_type") {
            None => None,
            Some(Value::String(kind)) => Some(kind.as_str()),
            Some(other) => return Err(format!("model_type is {}, expected a text", shown(other))),
        };
        let listed = match object.get("architectures") {
            Some(Value::Array(names)) => names.as_slice(),
            None | Some(Value::Null) => {
                let named = Self::ALL.into_iter().find(|one| Some(one.other_names().1) == kind);
                return named.ok_or_else(|| format!("`architectures` is missing; {KNOWN}"));
            }
            Some(other) => return Err(format!("architectures is {}, expected a list", shown(other))),
        };
        let name = match listed {
            [Value::String(name)] => name,
            [] => return Err(format!("`architectures` names none; {KNOWN}")),
            [_] => return Err("`architectures` holds what is no text".into()),
            _ => return Err("`architectures` names more than one; leave the one that is to be served".into()),
        };
        let known = Self::ALL.into_iter().find(|one| name == one.name() || name == one.other_names().0);
        let known = known.ok_or_else(|| format!("architecture {name:?} is not served; {KNOWN}"))?;
        match kind {
            Some(kind) if kind != known.other_names().1 => Err(format!(
                "architectures is {name:?}, but model_type is {kind:?}, by which transformers goes; make them say the same"
            )),
            _ => Ok(known),
        }
    }
}
