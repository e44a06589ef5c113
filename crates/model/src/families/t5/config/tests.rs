//! Which config.json is read, and what it is refused for.

use crate::loaded::FamilyConfig;
use serde_json::{Value, json};

use super::*;

fn object() -> Value {
    json!({
        "architectures": ["T5ForConditionalGeneration"], "model_type": "t5", "d_model": 32, "d_kv": 12, "d_ff": 64,
        "num_heads": 4, "num_layers": 2, "vocab_size": 246, "layer_norm_epsilon": 1e-3, "feed_forward_proj": "relu",
        "relative_attention_num_buckets": 32, "relative_attention_max_distance": 128, "is_encoder_decoder": true,
        "torch_dtype": "float32", "dropout_rate": 0.1, "n_positions": 512, "decoder_start_token_id": 0,
    })
}

/// A small model.
pub(in crate::families::t5) fn config() -> T5Config {
    T5Config::parse(&object().to_string()).unwrap()
}

fn with(changes: &Value) -> Result<T5Config, String> {
    let mut object = object();
    for (name, value) in changes.as_object().unwrap() {
        object[name] = value.clone();
    }
    T5Config::parse(&object.to_string()).map_err(|error| error.to_string())
}

#[test]
fn absent_fields_take_the_defaults_of_transformers() {
    let config = config();
    assert_eq!((config.decoder_layers, config.tied_head, config.scales_output), (2, true, true));
    assert_eq!((config.activation, config.gated), (Activation::Relu, false));
    assert_eq!((config.decoder_start, config.padding), (Some(0), None));
    let mut short = object();
    let fields = short.as_object_mut().unwrap();
    for name in ["d_kv", "layer_norm_epsilon", "relative_attention_num_buckets", "feed_forward_proj"] {
        fields.remove(name);
    }
    let mut notes = Vec::new();
    let config = T5Config::parse_with(&short.to_string(), &mut notes).unwrap();
    assert_eq!((config.d_kv, config.layer_norm_epsilon, config.buckets), (64, 1e-6, 32));
    assert_eq!((config.activation, notes.len()), (Activation::Relu, 4));
}

#[test]
fn activations_are_read_in_all_spellings() {
    for (name, activation, gated) in [
        ("relu", Activation::Relu, false),
        ("gelu", Activation::Gelu, false),
        ("gelu_new", Activation::GeluTanh, false),
        ("gated-gelu", Activation::GeluTanh, true),
        ("gated-gelu_new", Activation::GeluTanh, true),
        ("gated-relu", Activation::Relu, true),
        ("gated-silu", Activation::Silu, true),
        ("silu", Activation::Silu, false),
    ] {
        let config = with(&json!({"feed_forward_proj": name, "is_gated_act": gated})).unwrap();
        assert_eq!((config.activation, config.gated), (activation, gated), "{name}");
    }
    let config = with(&json!({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu_new"})).unwrap();
    assert!(config.gated);
}

#[test]
fn what_would_change_the_computation_is_refused_by_name() {
    for (changes, named) in [
        (json!({"d_model": 0}), "d_model is 0"),
        (json!({"num_heads": "4"}), "num_heads"),
        (json!({"vocab_size": 1.5}), "vocab_size"),
        (json!({"feed_forward_proj": "tanh"}), "feed_forward_proj \"tanh\""),
        (json!({"dense_act_fn": "gelu"}), "dense_act_fn"),
        (json!({"feed_forward_proj": "gated-gelu", "dense_act_fn": "gelu"}), "dense_act_fn"),
        (json!({"is_gated_act": true}), "is_gated_act"),
        (json!({"is_encoder_decoder": false}), "is_encoder_decoder"),
        (json!({"tie_encoder_decoder": true}), "tie_encoder_decoder"),
        (json!({"relative_attention_max_distance": 16}), "relative_attention_max_distance"),
        (json!({"relative_attention_num_buckets": 2}), "relative_attention_num_buckets"),
        (json!({"layer_norm_epsilon": 1e-60}), "layer_norm_epsilon"),
        (json!({"decoder_start_token_id": 246}), "decoder_start_token_id"),
        (json!({"hidden_size": 64}), "hidden_size"),
        (json!({"relative_attention_max_distanse": 64}), "relative_attention_max_distance"),
        (json!({"quantization_config": {"bits": 4}}), "quantization_config"),
        (json!({"architectures": ["MT5ForConditionalGeneration"]}), "MT5ForConditionalGeneration"),
        (json!({"model_type": "mt5"}), "model_type"),
    ] {
        let error = with(&changes).unwrap_err();
        assert!(error.contains(named), "{changes}: {error}");
    }
    let error = with(&json!({"d_model": 0, "d_ff": 0, "is_gated_act": true})).unwrap_err();
    assert!(["d_model", "d_ff", "is_gated_act"].iter().all(|name| error.contains(name)), "{error}");
}

#[test]
fn a_config_is_told_by_its_architecture() {
    let reads = |text: &str| T5Config::reads(&serde_json::from_str(text).unwrap());
    assert!(reads(&object().to_string()));
    assert!(reads("{\"model_type\": \"t5\"}"));
    assert!(!reads("{\"architectures\": [\"Qwen3ForCausalLM\"]}") && !reads("null"));
}
