//! All fields of a T5's config.json, one after the other.
//!
//! A field that is absent takes the default of transformers (`T5Config`), and a note says so. Sizes that
//! define the model have no default.

use beamline_compute::cpu::activation::Activation;
use beamline_compute::cpu::pages::PAGE_SIZE;

use super::T5Config;
use crate::checkpoint::config::{Bounds, Fields, Known, MAX_SIZE, default_note};
use crate::checkpoint::note::Note;

/// Most layers, heads and values of a head.
const MAX_LAYERS: usize = 4096;
const MAX_HEADS: usize = 4096;
const MAX_HEAD_DIM: usize = 1 << 14;
/// Most buckets of relative positions.
const MAX_BUCKETS: usize = 1 << 12;
/// Most bytes of keys and values of a page: beyond this it is a mistake, whatever the machine.
const MAX_PAGE_BYTES: u128 = 1 << 40;
const EPSILON: Bounds = Bounds { above: 0.0, most: 1.0 };

/// Defaults of transformers.
const DEFAULT_D_KV: usize = 64;
const DEFAULT_BUCKETS: usize = 32;
const DEFAULT_DISTANCE: usize = 128;
const DEFAULT_EPSILON: f64 = 1e-6;

/// What is known of the fields of a T5.
pub(super) const KNOWN: Known = Known {
    read: &[
        "architectures",
        "model_type",
        "d_model",
        "d_kv",
        "d_ff",
        "num_heads",
        "num_layers",
        "num_decoder_layers",
        "relative_attention_num_buckets",
        "relative_attention_max_distance",
        "layer_norm_epsilon",
        "vocab_size",
        "feed_forward_proj",
        "dense_act_fn",
        "is_gated_act",
        "tie_word_embeddings",
        "tie_encoder_decoder",
        "scale_decoder_outputs",
        "decoder_start_token_id",
        "pad_token_id",
        "is_encoder_decoder",
    ],
    // `n_positions` cut the texts of training; nothing is computed from it.
    harmless: &["classifier_dropout", "dropout_rate", "initializer_factor", "n_positions", "output_past"],
    aliases: &[
        ("hidden_size", "d_model"),
        ("head_dim", "d_kv"),
        ("num_attention_heads", "num_heads"),
        ("num_hidden_layers", "num_layers"),
        ("intermediate_size", "d_ff"),
        ("layer_norm_eps", "layer_norm_epsilon"),
        ("rms_norm_eps", "layer_norm_epsilon"),
        ("hidden_act", "feed_forward_proj"),
    ],
    rope: &[],
};

impl T5Config {
    /// Reads all fields. Without a result there is a problem.
    pub(super) fn read_fields(fields: &mut Fields<'_>, notes: &mut Vec<Note>) -> Option<Self> {
        let d_model = fields.required_size("d_model", MAX_SIZE);
        let d_kv = or_default(fields, "d_kv", MAX_HEAD_DIM, DEFAULT_D_KV, notes);
        let d_ff = fields.required_size("d_ff", MAX_SIZE);
        let num_heads = fields.required_size("num_heads", MAX_HEADS);
        let encoder_layers = fields.required_size("num_layers", MAX_LAYERS);
        let decoder_layers = fields.nullable_size("num_decoder_layers", MAX_LAYERS).unwrap_or(encoder_layers);
        let (buckets, max_distance) = read_buckets(fields, notes);
        let vocab_size = fields.required_size("vocab_size", MAX_SIZE);
        let epsilon = fields.number("layer_norm_epsilon", EPSILON).unwrap_or_else(|| {
            note_default(fields, "layer_norm_epsilon", DEFAULT_EPSILON, notes);
            DEFAULT_EPSILON
        });
        if epsilon as f32 == 0.0 {
            fields.problem(format!("layer_norm_epsilon is {epsilon}, which is zero in single precision"));
        }
        check_switches(fields);
        check_synonyms(fields);
        check_page(fields, [decoder_layers, num_heads, d_kv]);
        let tied_head = fields.flag_or("tie_word_embeddings", true);
        let scales_output = fields.flag_or("scale_decoder_outputs", tied_head);
        let decoder_start = read_token(fields, "decoder_start_token_id", vocab_size);
        let padding = read_token(fields, "pad_token_id", vocab_size);
        let (activation, gated) = read_activation(fields, notes)?;
        Some(Self {
            d_model,
            d_kv,
            d_ff,
            num_heads,
            encoder_layers,
            decoder_layers,
            buckets,
            max_distance,
            layer_norm_epsilon: epsilon as f32,
            vocab_size,
            activation,
            gated,
            tied_head,
            scales_output,
            decoder_start,
            padding,
        })
    }
}

fn note_default(fields: &Fields<'_>, name: &str, default: impl std::fmt::Display, notes: &mut Vec<Note>) {
    if !fields.has(name) {
        notes.push(default_note(name, default));
    }
}

fn or_default(
    fields: &mut Fields<'_>,
    name: &str,
    most: usize,
    default: usize,
    notes: &mut Vec<Note>,
) -> usize {
    fields.size(name, most).unwrap_or_else(|| {
        note_default(fields, name, default, notes);
        default
    })
}

/// Buckets and distance must be such that the logarithm of the buckets has a meaning: see
/// [`bias`](beamline_compute::cpu::relative::bias).
fn read_buckets(fields: &mut Fields<'_>, notes: &mut Vec<Note>) -> (usize, usize) {
    const BUCKETS: &str = "relative_attention_num_buckets";
    const DISTANCE: &str = "relative_attention_max_distance";
    let buckets = or_default(fields, BUCKETS, MAX_BUCKETS, DEFAULT_BUCKETS, notes);
    let distance = or_default(fields, DISTANCE, MAX_SIZE, DEFAULT_DISTANCE, notes);
    if buckets < 4 {
        fields.problem(format!("{BUCKETS} is {buckets}, expected at least 4: both directions need two"));
    } else if distance <= buckets / 2 {
        fields.problem(format!(
            "{DISTANCE} is {distance}, expected more than {}: half of {BUCKETS} are single positions",
            buckets / 2
        ));
    }
    (buckets, distance)
}

/// `feed_forward_proj` says both. What else says one of them must agree.
fn read_activation(fields: &mut Fields<'_>, notes: &mut Vec<Note>) -> Option<(Activation, bool)> {
    const PROJECTION: &str = "feed_forward_proj";
    let given = fields.text(PROJECTION);
    let function = fields.text("dense_act_fn");
    let gate = fields.has("is_gated_act").then(|| fields.flag("is_gated_act"));
    let (name, gated) = match given {
        // transformers takes one for the other here.
        Some("gated-gelu") => ("gelu_new", true),
        Some(name) => name.strip_prefix("gated-").map_or((name, false), |name| (name, true)),
        None if fields.has(PROJECTION) => return None,
        None => {
            let (name, gated) = (function.unwrap_or("relu"), gate.unwrap_or(false));
            note_default(
                fields,
                PROJECTION,
                if gated { format!("gated-{name}") } else { name.into() },
                notes,
            );
            (name, gated)
        }
    };
    if let Some(function) = function.filter(|function| Activation::of(function) != Activation::of(name)) {
        fields.problem(format!(
            "dense_act_fn is {function:?}, but {PROJECTION} says {name:?}; make them say the same"
        ));
    }
    if gate.is_some_and(|gate| gate != gated) {
        fields.problem(format!(
            "is_gated_act is {}, but {PROJECTION} says {gated}; make them say the same",
            !gated
        ));
    }
    let activation = Activation::of(name);
    if activation.is_none() {
        fields.problem(format!(
            "{PROJECTION} {:?} is not implemented, only relu, gelu, gelu_new and silu, plain or gated",
            given.unwrap_or(name)
        ));
    }
    Some((activation?, gated))
}

/// Switches that must stand as T5 has them.
fn check_switches(fields: &mut Fields<'_>) {
    if !fields.flag_or("is_encoder_decoder", true) {
        fields.problem("is_encoder_decoder is false, but T5ForConditionalGeneration has both");
    }
    if fields.flag("tie_encoder_decoder") {
        fields.problem("tie_encoder_decoder is true, which is not implemented; save both stacks");
    }
}

/// transformers takes these names for the others, so both must say the same.
fn check_synonyms(fields: &mut Fields<'_>) {
    for (synonym, name) in KNOWN.aliases.iter().take(4) {
        if let (Some(one), Some(other)) = (fields.get(synonym), fields.get(name))
            && one != other
        {
            fields.problem(format!("{synonym} is {one}, but {name} is {other}; make them say the same"));
        }
    }
}

/// A token of the vocabulary, where the field is there and not null.
fn read_token(fields: &mut Fields<'_>, name: &str, vocab_size: usize) -> Option<u32> {
    let token = fields.count(name)?;
    if token >= vocab_size {
        fields.problem(format!("{name} is {token}, but vocab_size is {vocab_size}"));
    }
    u32::try_from(token).ok()
}

/// Keys and values of a page must have a size that can be counted, and heads a width.
fn check_page(fields: &mut Fields<'_>, [layers, heads, d_kv]: [usize; 3]) {
    let bytes: u128 = [layers, heads, d_kv, PAGE_SIZE, 2 * 4].map(|size| size as u128).iter().product();
    if bytes > MAX_PAGE_BYTES || heads * d_kv > MAX_SIZE {
        fields.problem(format!(
            "num_decoder_layers, num_heads and d_kv make {bytes} bytes of keys and values for {PAGE_SIZE} tokens; \
             correct them"
        ));
    }
}
