//! Fields of config.json that are not read: which of them mean nothing here, and what becomes of the others.
//!
//! The rule, the same for every field:
//!
//! 1. A field that the computation depends on is read strictly ([`super::fields`]).
//! 2. A field that would change the computation of a related model is refused, unless its value leaves
//!    the computation as it is.
//! 3. A field that libraries write and that changes no answer is skipped.
//! 4. Any other field is refused where its name is nearly that of a field of the first kind. Otherwise a
//!    warning names it.

use beamline_wording::suggest;
use serde_json::{Map, Value, json};

use super::fields::shown;
use super::rope::FIELDS as ROPE_FIELDS;
use crate::checkpoint::note::Note;

/// Fields that are read.
const READ: [&str; 23] = [
    "architectures",
    "model_type",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
    "original_max_position_embeddings",
    "rms_norm_eps",
    "rope_theta",
    "rope_scaling",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    "mlp_bias",
    "hidden_act",
    "use_sliding_window",
    "sliding_window",
    "max_window_layers",
    "layer_types",
];

/// Fields that change no answer: of training, of sampling, of labels, and of how libraries run a model.
const HARMLESS: [&str; 103] = [
    "_attn_implementation",
    "_attn_implementation_autoset",
    "_attn_implementation_internal",
    "_commit_hash",
    "_experts_implementation",
    "_experts_implementation_internal",
    "_flash_attn_2_enabled",
    "_from_model_config",
    "_name_or_path",
    "assistant_confidence_threshold",
    "assistant_lookbehind",
    "attention_dropout",
    "attn_implementation",
    "bad_words_ids",
    "base_model_pp_plan",
    "base_model_tp_plan",
    "begin_suppress_tokens",
    "bos_token_id",
    "cache_config",
    "cache_implementation",
    "chunk_size_feed_forward",
    "cross_attention_hidden_size",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "dtype",
    "early_stopping",
    "embd_pdrop",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "eos_token_id",
    "epsilon_cutoff",
    "eta_cutoff",
    "experts_implementation",
    "exponential_decay_length_penalty",
    "finetuning_task",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "gradient_checkpointing",
    "hidden_dropout",
    "hidden_dropout_prob",
    "id2label",
    "ignore_keys_at_rope_validation",
    "initializer_range",
    "is_decoder",
    "keys_to_ignore_at_inference",
    "label2id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "min_length",
    "min_new_tokens",
    "name_or_path",
    "no_repeat_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "num_beam_groups",
    "num_beams",
    "num_labels",
    "num_return_sequences",
    "output_attentions",
    "output_hidden_states",
    "output_scores",
    "pad_token_id",
    "prefix",
    "problem_type",
    "remove_invalid_values",
    "repetition_penalty",
    "resid_pdrop",
    "return_dict",
    "return_dict_in_generate",
    "sep_token_id",
    "suppress_tokens",
    "target_lookbehind",
    "task_specific_params",
    "temperature",
    "tf_legacy_loss",
    "tie_encoder_decoder",
    "tokenizer_class",
    "tokenizer_file",
    "top_k",
    "top_p",
    "torch_dtype",
    "torchscript",
    "transformers.js_config",
    "transformers_version",
    "transformers_weights",
    "typical_p",
    "unk_token_id",
    "unsloth_fixed",
    "unsloth_version",
    "unsloth_training",
    "use_bfloat16",
    "use_cache",
    "use_flash_attention_2",
    "use_flash_attn",
    "use_gradient_checkpointing",
    "use_reentrant",
    "vocab_file",
    "added_tokens",
    "model_max_length",
    "custom_pipelines",
    "special_tokens",
];

/// Values that switch nothing on.
const OFF: [&str; 6] = ["null", "false", "0", "{}", "[]", "\"\""];

/// Fields that change the computation of a related model unless they are off.
const SWITCHES: [&str; 33] = [
    "add_cross_attention",
    "alibi",
    "attention_chunk_size",
    "attn_logit_softcapping",
    "audio_config",
    "clip_qkv",
    "compression_config",
    "final_logit_softcapping",
    "is_encoder_decoder",
    "lm_head_bias",
    "mrope_section",
    "n_routed_experts",
    "no_rope_layer_interval",
    "no_rope_layers",
    "num_experts",
    "num_local_experts",
    "parallel_attn",
    "per_layer_config",
    "pruned_heads",
    "quantization_config",
    "query_pre_attn_scalar",
    "rope_interleaved",
    "rope_local_base_freq",
    "rotary_interleaved",
    "scale_depth",
    "text_config",
    "use_alibi",
    "use_dynamic_ntk",
    "use_logn_attn",
    "use_mrope",
    "use_parallel_residual",
    "use_qk_norm",
    "vision_config",
];

/// Factors that change the computation of a related model unless they are one.
const FACTORS: [&str; 9] = [
    "attention_multiplier",
    "embedding_multiplier",
    "lm_head_multiplier",
    "logit_scale",
    "logits_scaling",
    "partial_rotary_factor",
    "residual_multiplier",
    "rotary_pct",
    "scale_emb",
];

/// What other libraries call a field that is read.
const ALIASES: [(&str, &str); 18] = [
    ("rope_base", "rope_theta"),
    ("rotary_base", "rope_theta"),
    ("rotary_emb_base", "rope_theta"),
    ("rms_norm_epsilon", "rms_norm_eps"),
    ("layer_norm_eps", "rms_norm_eps"),
    ("layer_norm_epsilon", "rms_norm_eps"),
    ("norm_eps", "rms_norm_eps"),
    ("rms_eps", "rms_norm_eps"),
    ("n_positions", "max_position_embeddings"),
    ("max_seq_len", "max_position_embeddings"),
    ("seq_length", "max_position_embeddings"),
    ("n_kv_heads", "num_key_value_heads"),
    ("num_kv_heads", "num_key_value_heads"),
    ("num_query_groups", "num_key_value_heads"),
    ("kv_channels", "head_dim"),
    ("head_size", "head_dim"),
    ("hidden_activation", "hidden_act"),
    ("activation_function", "hidden_act"),
];

/// What a kind of model knows of the fields of its config.json, beside those that all kinds skip or refuse.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Known {
    /// Fields that are read.
    pub(crate) read: &'static [&'static str],
    /// More fields that change no answer.
    pub(crate) harmless: &'static [&'static str],
    /// What other libraries call a field that is read.
    pub(crate) aliases: &'static [(&'static str, &'static str)],
    /// Fields that have their place in `rope_parameters`.
    pub(crate) rope: &'static [&'static str],
}

/// Fields of a decoder's config.json.
pub(super) const DECODER: Known = Known { read: &READ, harmless: &[], aliases: &ALIASES, rope: &ROPE_FIELDS };

/// Looks at every field that is not read. Gives what must be refused.
pub(crate) fn check(object: &Map<String, Value>, known: &Known, notes: &mut Vec<Note>) -> Vec<String> {
    object.iter().filter_map(|(name, value)| check_field(object, known, name, value, notes)).collect()
}

fn check_field(
    object: &Map<String, Value>,
    known: &Known,
    name: &str,
    value: &Value,
    notes: &mut Vec<Note>,
) -> Option<String> {
    if known.read.contains(&name) || known.harmless.contains(&name) || HARMLESS.contains(&name) {
        return None;
    }
    if SWITCHES.contains(&name) {
        let off = OFF.contains(&value.to_string().as_str());
        return (!off).then(|| changes(name, value));
    }
    if FACTORS.contains(&name) {
        let one = value.is_null() || value.as_f64() == Some(1.0);
        return (!one).then(|| changes(name, value));
    }
    let field = |what: &str| Note::Field { file: "config.json", field: name.into(), what: what.into() };
    match name {
        // The slices add up to the same product.
        "pretraining_tp" if *value == json!(1) || value.is_null() => return None,
        "pretraining_tp" => {
            notes.push(field("it splits products and changes no answer but for rounding"));
            return None;
        }
        "auto_map" => {
            notes.push(field("it names code that comes with the checkpoint; that code is not run"));
            return None;
        }
        _ => {}
    }
    let meant = known.aliases.iter().find(|(alias, read)| *alias == name && !object.contains_key(*read));
    let meant = meant.map(|(_, read)| *read).or_else(|| suggest(name, known.read.iter().copied()));
    if let Some(meant) = meant {
        return Some(format!("{name} is not known; did you mean {meant}?"));
    }
    if known.rope.contains(&name) {
        return Some(format!("{name} has no effect here; it belongs in rope_parameters"));
    }
    notes.push(Note::UnknownField { file: "config.json", field: name.to_owned() });
    None
}

fn changes(name: &str, value: &Value) -> String {
    match name {
        "quantization_config" | "compression_config" => {
            format!("{name}: quantised checkpoints are not served; bring f32, bf16 or f16 weights")
        }
        "text_config" | "vision_config" | "audio_config" => {
            format!("{name}: models of more than text are not served; save the language model alone")
        }
        _ => format!(
            "{name} is {}, which would change the computation and is not implemented; remove it if the model was not trained \
             with it",
            shown(value)
        ),
    }
}
