//! Inputs to begin with that are made here; more lie in `fuzz/corpus` and in the fixtures.

use crate::corpus;
use crate::targets::Target;

/// A catalog with tags and a collision, in codes.
pub const CATALOG: &str = r#"{"item_id": "a", "sid": [0, 1, 2], "tags": ["red", "new"]}
{"item_id": "b", "sid": [0, 1, 3], "tags": ["red"]}
{"item_id": "c", "sid": [0, 1, 3], "tags": []}
{"item_id": "d", "sid": [4, 0, 0], "tags": ["blue", "new"], "title": "D"}
{"item_id": "e", "sid": [4, 1, 0]}
"#;

/// config.json of the smallest decoder.
pub const CONFIG: &str = r#"{"architectures": ["Qwen3ForCausalLM"], "hidden_size": 4, "intermediate_size": 4,
"num_hidden_layers": 1, "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 8,
"max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "tie_word_embeddings": true,
"hidden_act": "silu"}"#;

/// A weights file of one tensor of four ones.
pub const WEIGHTS: &[u8] =
    b"\x48\0\0\0\0\0\0\0{\"model.norm.weight\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[0,16]}} \0\0\x80\x3f\0\0\x80\x3f\0\0\x80\x3f\0\0\x80\x3f";

/// All inputs that a target begins with.
pub fn seeds(target: &Target) -> std::io::Result<Vec<Vec<u8>>> {
    let mut found = corpus::files(&corpus::folder(target.name))?;
    let made: &[&[u8]] = match target.name {
        "catalog" => &[CATALOG.as_bytes()],
        "config" => &[CONFIG.as_bytes()],
        "safetensors" => &[WEIGHTS],
        _ => &[],
    };
    found.extend(made.iter().map(|seed| seed.to_vec()));
    let file = match target.name {
        "config" => "config.json",
        "convention" => "convention.json",
        "index" => "model.safetensors.index.json",
        _ => return Ok(found),
    };
    for case in std::fs::read_dir(corpus::root().join("fixtures/hf"))? {
        found.extend(std::fs::read(case?.path().join(file)).ok());
    }
    Ok(found)
}
