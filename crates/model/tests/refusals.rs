//! Checkpoints that must be refused, each with an error that says what is wrong.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "common/made.rs"]
mod made;

use std::collections::BTreeMap;
use std::path::Path;

use beamline_model::checkpoint::Checkpoint;
use beamline_model::convention::Convention;
use beamline_model::convention::format::Format;
use beamline_model::convention::presets;
use beamline_model::cpu::linear::WeightFormat;
use beamline_model::families::qwen::{Qwen, expected_tensors};
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

fn config() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "vocab_size": 20, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
    })
}

struct Made {
    directory: TempDir,
    tensors: BTreeMap<String, Vec<f32>>,
    shapes: BTreeMap<String, Vec<usize>>,
}

fn made() -> Made {
    let directory = tempfile::tempdir().unwrap();
    let tensors = made::write(directory.path(), &config(), 7);
    let parsed = beamline_model::checkpoint::config::Config::parse(&config().to_string()).unwrap();
    Made { directory, tensors, shapes: expected_tensors(&parsed) }
}

fn load(directory: &Path) -> Result<(), String> {
    let checkpoint = Checkpoint::open(directory).map_err(|error| error.to_string())?;
    Qwen::load(&checkpoint, 64, WeightFormat::F32).map(|_| ()).map_err(|error| error.to_string())
}

fn weights(made: &Made) -> std::path::PathBuf {
    made.directory.path().join("model.safetensors")
}

#[test]
fn a_whole_checkpoint_loads() {
    load(made().directory.path()).unwrap();
}

#[test]
fn tensors_that_do_not_fit_are_listed() {
    let mut made = made();
    made.tensors.remove("model.norm.weight");
    made.tensors.insert("model.layers.0.extra.weight".into(), vec![0.0; 4]);
    made.shapes.insert("model.layers.0.extra.weight".into(), vec![4]);
    made.shapes.insert("lm_head.weight".into(), vec![8, 20]);
    made::write_tensors(made.directory.path(), &made.tensors, &made.shapes);
    let error = load(made.directory.path()).unwrap_err();
    for part in [
        "missing model.norm.weight",
        "unknown model.layers.0.extra.weight",
        "lm_head.weight has shape [8, 20], expected [20, 8]",
    ] {
        assert!(error.contains(part), "{error}");
    }
}

#[test]
fn weights_that_are_not_finite_are_named() {
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut made = made();
        made.tensors.get_mut("model.layers.0.mlp.up_proj.weight").unwrap()[9] = bad;
        made::write_tensors(made.directory.path(), &made.tensors, &made.shapes);
        let error = load(made.directory.path()).unwrap_err();
        assert!(
            error.contains(
                "model.layers.0.mlp.up_proj.weight holds NaN or infinity: 1 of its values are not finite, the first at index 9"
            ),
            "{error}"
        );
    }
}

#[test]
fn damaged_files_are_refused() {
    let made = made();
    let path = weights(&made);
    let whole = std::fs::read(&path).unwrap();
    let header = |json: &str, data: usize| -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.extend(std::iter::repeat_n(0, data));
        bytes
    };
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty file", Vec::new(), "too short"),
        ("half a length", vec![1, 2, 3], "too short"),
        ("truncated data", whole[..whole.len() - 5].to_vec(), "it is truncated"),
        ("truncated header", whole[..40].to_vec(), "truncated"),
        ("trailing bytes", [whole.clone(), vec![0; 9]].concat(), "more than it should"),
        (
            "header length past the end",
            [(whole.len() as u64).to_le_bytes().to_vec(), whole[8..].to_vec()].concat(),
            "truncated",
        ),
        ("enormous header length", [u64::MAX.to_le_bytes().to_vec(), whole[8..].to_vec()].concat(), "limit"),
        ("header is not JSON", header("{not json", 0), "model.safetensors"),
        (
            "range outside of the data",
            header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,800]}}"#, 8),
            "model.safetensors",
        ),
        (
            "range backwards",
            header(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8),
            "model.safetensors",
        ),
        (
            "shape and range disagree",
            header(r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}"#, 8),
            "model.safetensors",
        ),
        (
            "overlap",
            header(
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#,
                12,
            ),
            "model.safetensors",
        ),
        // The product wraps to a small number in 64 bits.
        (
            "overflowing shape",
            header(
                r#"{"a":{"dtype":"F32","shape":[4194305,4194305,211106198978564],"data_offsets":[0,16]}}"#,
                16,
            ),
            "model.safetensors",
        ),
    ];
    for (what, bytes, expected) in cases {
        std::fs::write(&path, bytes).unwrap();
        let error = load(made.directory.path()).expect_err(what);
        assert!(error.contains(expected), "{what}: {error}");
    }
    std::fs::remove_file(&path).unwrap();
    assert!(load(made.directory.path()).unwrap_err().contains("cannot read"));
}

#[test]
fn an_index_names_files_beside_it_and_nothing_else() {
    let made = made();
    let index = made.directory.path().join("model.safetensors.index.json");
    let check = |map: Value, expected: &str| {
        std::fs::write(&index, json!({ "weight_map": map }).to_string()).unwrap();
        let error = load(made.directory.path()).unwrap_err();
        assert!(error.contains(expected), "{error}");
    };
    check(json!({}), "0 shards");
    check(json!({"a": "../model.safetensors"}), "is not the name of a safetensors file");
    check(json!({"a": "/etc/model.safetensors"}), "is not the name of a safetensors file");
    check(json!({"a": "model.bin"}), "is not the name of a safetensors file");
    check(json!({"a": "model-00007-of-00007.safetensors"}), "cannot read");
    check(json!({"absent": "model.safetensors"}), "absent is in no shard");
    std::fs::write(&index, "[").unwrap();
    assert!(load(made.directory.path()).unwrap_err().contains("index.json"));
}

#[test]
fn a_config_that_cannot_be_served_is_refused() {
    for (field, value, expected) in [
        ("architectures", json!(["MambaForCausalLM"]), "MambaForCausalLM"),
        ("architectures", json!([]), "architectures"),
        ("hidden_size", json!(0), "hidden_size is 0"),
        ("vocab_size", json!(1u64 << 40), "vocab_size"),
        ("head_dim", json!(5), "odd"),
        ("num_hidden_layers", json!("six"), "string"),
        ("rms_norm_eps", json!(null), "rms_norm_eps"),
    ] {
        let made = made();
        let mut config = config();
        config[field] = value;
        std::fs::write(made.directory.path().join("config.json"), config.to_string()).unwrap();
        let error = load(made.directory.path()).unwrap_err();
        assert!(error.contains("config.json") && error.contains(expected), "{error}");
    }
}

/// A word-level tokenizer of the given added tokens.
fn write_tokenizer(directory: &Path, tokens: &[String]) {
    let added: Vec<Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false})
        })
        .collect();
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": tokens[0]},
    });
    std::fs::write(directory.join("tokenizer.json"), tokenizer.to_string()).unwrap();
}

fn format(fields: Value) -> Value {
    let mut base =
        json!({"levels": 2, "level_token_patterns": ["<a_{}>", "<b_{}>"], "level_code_counts": [3, 3]});
    base.as_object_mut().unwrap().append(fields.clone().as_object_mut().unwrap());
    base
}

#[test]
fn conventions_that_do_not_fit_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let tokens: Vec<String> =
        ["<unk>", "<a_0>", "<a_1>", "<a_2>", "<b_0>", "<b_2>", "<|x|>"].map(String::from).into();
    write_tokenizer(directory.path(), &tokens);
    let bind = |fields: Value| -> Result<Convention, String> {
        let format = Format::parse(&format(fields).to_string()).map_err(|error| error.to_string())?;
        Convention::bind(format, directory.path(), 20).map_err(|error| error.to_string())
    };
    bind(json!({"codes_with_tokens": "used"})).unwrap();
    for (fields, expected) in [
        (json!({}), "tokenizer.json lacks 1 of the 3 tokens <b_{}> of level 1, for example <b_1>"),
        (
            json!({"codes_with_tokens": "used", "level_token_patterns": ["<a_{}>", "<z_{}>"]}),
            "lacks 3 of the 3 tokens <z_{}>",
        ),
        (json!({"codes_with_tokens": "used", "generation_begin": "<|y|> <|z|>"}), "is not a single token"),
        (
            json!({"codes_with_tokens": "used", "tail_tokens": [{"text": "<|x|>", "id": 3}]}),
            "has id 6 in tokenizer.json, not 3",
        ),
        (json!({"codes_with_tokens": "used", "vocab_size": 21}), "config.json says 20"),
        (json!({"codes_with_tokens": "used", "tokenizer_size": 8}), "the tokenizer has 7"),
        (json!({"item_seperator": ", "}), "item_seperator"),
        (json!({"levels": 3}), "3 levels, but 2 token patterns"),
        (json!({"generated_steps": 4}), "generated_steps"),
        (json!({"model": "encoder-decoder"}), "encoder-decoder"),
        (json!({"level_token_patterns": ["<a>", "<b_{}>"]}), "exactly one {}"),
        (json!({"preset": "tiger"}), "unknown preset"),
        (json!({"level_code_counts": [3, 0]}), "codes in a level"),
    ] {
        let error = bind(fields).expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }
    std::fs::write(directory.path().join("tokenizer.json"), "{}").unwrap();
    assert!(bind(json!({"codes_with_tokens": "used"})).unwrap_err().contains("tokenizer.json"));
}

#[test]
fn a_zero_byte_anywhere_in_a_tokenizer_is_survived() {
    let directory = tempfile::tempdir().unwrap();
    let tokens: Vec<String> =
        ["<unk>", "<a_0>", "<a_1>", "<a_2>", "<b_0>", "<b_1>", "<b_2>"].map(String::from).into();
    write_tokenizer(directory.path(), &tokens);
    let path = directory.path().join("tokenizer.json");
    let whole = std::fs::read(&path).unwrap();
    let format = Format::parse(&format(json!({})).to_string()).unwrap();
    for at in 0..whole.len() {
        let mut damaged = whole.clone();
        damaged[at] = 0;
        std::fs::write(&path, damaged).unwrap();
        Convention::bind(format.clone(), directory.path(), 20).expect_err("a zero byte is not JSON");
    }
}

#[test]
fn every_preset_binds_and_composes() {
    for name in presets::names() {
        let directory = tempfile::tempdir().unwrap();
        let format = Format::preset(name).unwrap();
        let mut tokens: Vec<String> = ["<unk>", "\n"].map(String::from).into();
        for marker in
            [&format.item_begin_token, &format.item_end_token, &format.generation_begin].into_iter().flatten()
        {
            tokens.push(marker.text().to_owned());
        }
        tokens.extend(
            format.lead_tokens.iter().chain(&format.tail_tokens).map(|marker| marker.text().to_owned()),
        );
        let mut unique = Vec::new();
        for token in tokens {
            if !unique.contains(&token) {
                unique.push(token);
            }
        }
        for (pattern, count) in format.level_token_patterns.iter().zip(&format.level_code_counts) {
            unique.extend((0..*count).map(|code| pattern.replace("{}", &code.to_string())));
        }
        write_tokenizer(directory.path(), &unique);
        let convention = Convention::bind(format.clone(), directory.path(), unique.len()).unwrap();
        assert_eq!(convention.steps().len(), format.steps(), "{name}");
        assert!(convention.composes(), "{name}");
    }
    // An override replaces a field of the preset and keeps the others.
    let changed = Format::parse(r#"{"preset": "minionerec", "prompt_prefix": "So far: "}"#).unwrap();
    assert_eq!(changed.prompt_prefix, "So far: ");
    assert_eq!(changed.tail_tokens, Format::preset("minionerec").unwrap().tail_tokens);
}

proptest! {
    /// Whatever the bytes, opening a checkpoint answers; it never panics, hangs or takes the machine's memory.
    #[test]
    fn damage_anywhere_is_survived(at in 0usize..4000, xor in 1u8..=255, cut in 0usize..6000) {
        let made = made();
        let path = weights(&made);
        let mut bytes = std::fs::read(&path).unwrap();
        let at = at % bytes.len();
        bytes[at] ^= xor;
        if cut < bytes.len() {
            bytes.truncate(bytes.len() - cut % 64);
        }
        std::fs::write(&path, bytes).unwrap();
        let _ = load(made.directory.path());
        let mut config = std::fs::read(made.directory.path().join("config.json")).unwrap();
        let at = at % config.len();
        config[at] ^= xor;
        std::fs::write(made.directory.path().join("config.json"), config).unwrap();
        let _ = load(made.directory.path());
    }

    /// The same for conventions and tokenizers.
    #[test]
    fn damage_to_text_is_survived(at in 0usize..4000, byte in any::<u8>(), file in 0usize..2) {
        let directory = tempfile::tempdir().unwrap();
        let tokens: Vec<String> = ["<unk>", "<a_0>", "<a_1>", "<a_2>", "<b_0>", "<b_1>", "<b_2>", "<|x|>"].map(String::from).into();
        write_tokenizer(directory.path(), &tokens);
        let mut convention = format(json!({"tail_tokens": ["<|x|>"], "item_separator": ", "})).to_string().into_bytes();
        let path = directory.path().join("tokenizer.json");
        let mut tokenizer = std::fs::read(&path).unwrap();
        let damaged = if file == 0 { &mut convention } else { &mut tokenizer };
        let at = at % damaged.len();
        damaged[at] = byte;
        std::fs::write(&path, tokenizer).unwrap();
        if let Ok(format) = Format::parse(&String::from_utf8_lossy(&convention)) {
            let _ = Convention::bind(format, directory.path(), 20);
        }
    }
}
