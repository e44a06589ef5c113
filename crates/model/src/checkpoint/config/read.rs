//! All fields of a decoder's config.json, one after the other.

use beamline_compute::cpu::pages::PAGE_SIZE;

use super::architecture::{Architecture, Defaults};
use super::fields::{Bounds, Fields};
use super::{Config, MAX_SIZE, rope};
use crate::checkpoint::note::Note;

/// Upper limits for layers, heads and values of a head. The largest published models have 128 layers,
/// 128 heads and 256 values.
const MAX_LAYERS: usize = 4096;
const MAX_HEADS: usize = 1 << 16;
const MAX_HEAD_DIM: usize = 1 << 14;
/// Most bytes of keys and values of a page: beyond this it is a mistake, whatever the machine.
const MAX_PAGE_BYTES: u128 = 1 << 40;
const NORM_EPS: Bounds = Bounds { above: 0.0, most: 1.0 };
/// Epsilon of the norms where none is given, as in transformers.
const DEFAULT_NORM_EPS: f64 = 1e-6;

impl Config {
    /// Reads all fields. Without a result there is a problem.
    pub(super) fn read_fields(
        architecture: Architecture,
        fields: &mut Fields<'_>,
        notes: &mut Vec<Note>,
    ) -> Option<Self> {
        let defaults = architecture.defaults();
        let hidden_size = fields.required_size("hidden_size", MAX_SIZE);
        let intermediate_size = fields.required_size("intermediate_size", MAX_SIZE);
        let layers = fields.required_size("num_hidden_layers", MAX_LAYERS);
        let heads = fields.required_size("num_attention_heads", MAX_HEADS);
        let vocab_size = fields.required_size("vocab_size", MAX_SIZE);
        let max_positions = fields.size("max_position_embeddings", MAX_SIZE);
        let max_positions = max_positions
            .unwrap_or_else(|| take_default("max_position_embeddings", defaults.positions, fields, notes));
        let kv_heads = read_kv_heads(fields, heads, &defaults, notes);
        let head_dim = read_head_dim(fields, hidden_size, heads, &defaults, notes)?;
        let eps = fields.number("rms_norm_eps", NORM_EPS);
        let eps = eps.unwrap_or_else(|| take_default("rms_norm_eps", DEFAULT_NORM_EPS, fields, notes));
        if eps as f32 == 0.0 {
            fields.problem(format!("rms_norm_eps is {eps}, which is zero in single precision"));
        }
        check_activation(fields);
        check_sliding(architecture, fields, layers);
        let rope = rope::read(fields, max_positions, notes);
        let biases = read_biases(architecture, fields, notes);
        let tied_head = fields.flag("tie_word_embeddings");
        check_page(fields, layers, kv_heads, head_dim);
        Some(Self {
            architecture,
            hidden_size,
            intermediate_size,
            layers,
            heads,
            kv_heads,
            head_dim,
            vocab_size,
            max_positions,
            rms_norm_eps: eps as f32,
            rope: rope?,
            tied_head,
            qkv_bias: biases.qkv,
            output_bias: biases.output,
            mlp_bias: biases.mlp,
            qk_norm: architecture == Architecture::Qwen3,
        })
    }
}

/// Which products have a bias.
struct Biases {
    qkv: bool,
    output: bool,
    mlp: bool,
}

/// The default of a field that is absent, with a note. Of one that is wrong, which was told, nothing comes.
fn take_default<T: std::fmt::Display>(
    name: &str,
    default: T,
    fields: &Fields<'_>,
    notes: &mut Vec<Note>,
) -> T {
    if !fields.has(name) {
        notes.push(default_note(name, &default));
    }
    default
}

pub(crate) fn default_note(name: &str, default: impl std::fmt::Display) -> Note {
    let what = format!("is absent, so it is {default}, as in transformers");
    Note::Field { file: "config.json", field: name.to_owned(), what }
}

fn read_kv_heads(fields: &mut Fields<'_>, heads: usize, defaults: &Defaults, notes: &mut Vec<Note>) -> usize {
    const NAME: &str = "num_key_value_heads";
    let kv_heads = match (fields.nullable_size(NAME, MAX_HEADS), defaults.kv_heads) {
        (Some(given), _) => given,
        // Null says: as many as heads.
        (None, Some(default)) if !fields.has(NAME) => take_default(NAME, default, fields, notes),
        _ => heads,
    };
    if !heads.is_multiple_of(kv_heads) {
        let absent = if fields.has(NAME) { "" } else { " (the default: num_key_value_heads is missing)" };
        fields.problem(format!("{heads} attention heads cannot share {kv_heads} key-value heads{absent}"));
    }
    kv_heads
}

fn read_head_dim(
    fields: &mut Fields<'_>,
    hidden_size: usize,
    heads: usize,
    defaults: &Defaults,
    notes: &mut Vec<Note>,
) -> Option<usize> {
    const NAME: &str = "head_dim";
    let head_dim = match defaults.head_dim {
        Some(default) => {
            let given = fields.size(NAME, MAX_HEAD_DIM);
            given.unwrap_or_else(|| take_default(NAME, default, fields, notes))
        }
        None => match fields.nullable_size(NAME, MAX_HEAD_DIM) {
            Some(given) => given,
            None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
            None => {
                fields.problem(format!("hidden_size {hidden_size} is not a multiple of {heads} heads"));
                return None;
            }
        },
    };
    if !head_dim.is_multiple_of(2) {
        fields.problem(format!("head_dim {head_dim} is odd, rotary embedding needs pairs"));
    }
    Some(head_dim)
}

fn check_activation(fields: &mut Fields<'_>) {
    // Two names of one function.
    if let Some(name) = fields.text("hidden_act").filter(|name| !["silu", "swish"].contains(name)) {
        fields.problem(format!("hidden_act {name:?} is not implemented, only \"silu\""));
    }
}

/// Every layer must see the whole context. `layer_types` gives each layer's window. Without it, a
/// switch, a width and the first sliding layer do.
fn check_sliding(architecture: Architecture, fields: &mut Fields<'_>, layers: usize) {
    let switch = fields.flag("use_sliding_window");
    let window = fields.nullable_size("sliding_window", MAX_SIZE);
    let first = fields.count("max_window_layers");
    let types = fields.texts("layer_types");
    if let Some(types) = &types
        && types.len() != layers
    {
        fields.problem(format!("layer_types holds {} names, num_hidden_layers is {layers}", types.len()));
    }
    let slides = match types {
        Some(types) => types.iter().any(|kind| *kind != "full_attention"),
        None if architecture == Architecture::Llama => switch,
        None => switch && (window.is_some() || !fields.has("sliding_window")) && first.unwrap_or(28) < layers,
    };
    if slides {
        fields.problem("sliding-window attention is not implemented (use_sliding_window, layer_types)");
    }
}

fn read_biases(architecture: Architecture, fields: &mut Fields<'_>, notes: &mut Vec<Note>) -> Biases {
    let (attention, mlp) = (fields.flag("attention_bias"), fields.flag("mlp_bias"));
    if mlp && architecture != Architecture::Llama {
        fields.problem(format!("mlp_bias is true, but {} has no such biases", architecture.name()));
    }
    if architecture == Architecture::Qwen2 && fields.has("attention_bias") {
        notes.push(Note::Field {
            file: "config.json",
            field: "attention_bias".into(),
            what: "is not read: Qwen2 has biases on q, k and v, and none on the output".into(),
        });
    }
    Biases {
        qkv: architecture == Architecture::Qwen2 || attention,
        output: architecture != Architecture::Qwen2 && attention,
        mlp: architecture == Architecture::Llama && mlp,
    }
}

/// Keys and values of a page must have a size that can be counted.
fn check_page(fields: &mut Fields<'_>, layers: usize, kv_heads: usize, head_dim: usize) {
    let values = [layers, kv_heads, head_dim, PAGE_SIZE, 2 * 4].map(|size| size as u128);
    let bytes: u128 = values.iter().product();
    if bytes > MAX_PAGE_BYTES {
        fields.problem(format!(
            "num_hidden_layers, num_key_value_heads and head_dim make {bytes} bytes of keys and values for {PAGE_SIZE} tokens; \
             correct them"
        ));
    }
}
