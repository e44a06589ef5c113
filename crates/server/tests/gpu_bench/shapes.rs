//! Shapes of models, from their published configurations.

use beamline_model::checkpoint::config::Config;
use serde_json::json;

/// Codes of a level.
pub(crate) const CODES: u32 = 8192;
/// Levels of a semantic ID.
pub(crate) const LEVELS: usize = 3;
/// Tokens of the text model, before those of semantic IDs.
const TEXT: u32 = 151_936;

/// First token of semantic IDs.
pub(crate) fn first_token(config: &Config) -> u32 {
    config.vocab_size as u32 - LEVELS as u32 * codes(config)
}

/// Codes of a level in this shape.
pub(crate) fn codes(config: &Config) -> u32 {
    if config.vocab_size < TEXT as usize { 16 } else { CODES }
}

/// A shape by name: Qwen3-0.6B, Qwen3-1.7B (OneRec-1.7B's), Qwen3-8B (OneRec-8B's), each with three
/// levels of 8192 codes. Or that of any config.json, whose last tokens are taken for those of semantic
/// IDs.
pub(crate) fn config(name: &str) -> Config {
    Config::parse(&config_json(name)).unwrap()
}

/// Text of its config.json.
pub(crate) fn config_json(name: &str) -> String {
    if std::path::Path::new(name).extension().is_some_and(|extension| extension == "json") {
        return std::fs::read_to_string(name).unwrap();
    }
    let (hidden, layers, heads, kv_heads, dim, inner, vocab, tied) = match name {
        "qwen3-0.6b" => (1024, 28, 16, 8, 128, 3072, TEXT + LEVELS as u32 * CODES, true),
        "qwen3-1.7b" => (2048, 28, 16, 8, 128, 6144, TEXT + LEVELS as u32 * CODES, true),
        "qwen3-8b" => (4096, 36, 32, 8, 128, 12288, TEXT + LEVELS as u32 * CODES, false),
        "tiny" => (64, 2, 4, 2, 16, 96, 100, true),
        other => panic!("no shape {other:?}: qwen3-0.6b, qwen3-1.7b, qwen3-8b, tiny, or a config.json"),
    };
    let config = json!({
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": hidden, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim, "intermediate_size": inner,
        "vocab_size": vocab, "tie_word_embeddings": tied, "max_position_embeddings": 40960, "rms_norm_eps": 1e-6,
        "rope_theta": 1e6, "hidden_act": "silu", "attention_bias": false,
    });
    config.to_string()
}
