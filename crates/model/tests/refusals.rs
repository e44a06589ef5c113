//! Checkpoints that must be refused, each with an error that says what is wrong.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

#[path = "common/made.rs"]
mod made;

use std::collections::BTreeMap;
use std::path::Path;

use beamline_compute::cpu::linear::WeightFormat;
use beamline_model::checkpoint::Checkpoint;
use beamline_model::convention::Convention;
use beamline_model::convention::format::Format;
use beamline_model::convention::presets;
use beamline_model::convention::text::PromptError;
use beamline_model::families::decoder::{Decoder, expected_tensors};
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
    Decoder::load(&checkpoint, 64, WeightFormat::F32).map(|_| ()).map_err(|error| error.to_string())
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

/// Opens a checkpoint, changes its weight file in place, and loads it.
fn load_after(made: &Made, change: impl FnOnce(&Path)) -> Result<(), String> {
    let checkpoint = Checkpoint::open(made.directory.path()).unwrap();
    change(&weights(made));
    Decoder::load(&checkpoint, 64, WeightFormat::F32).map(|_| ()).map_err(|error| error.to_string())
}

#[test]
fn a_file_that_changes_while_it_is_loaded_is_named() {
    let truncated = load_after(&made(), |path| {
        std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(2000).unwrap();
    });
    let error = truncated.unwrap_err();
    assert!(error.contains("model.safetensors changed while it was loaded: it is shorter"), "{error}");
    let error = load_after(&made(), |path| {
        let mut bytes = std::fs::read(path).unwrap();
        // A bit of the last value.
        *bytes.last_mut().unwrap() ^= 1;
        std::fs::write(path, bytes).unwrap();
    })
    .unwrap_err();
    assert!(error.contains("model.norm.weight holds other values than when it was opened"), "{error}");
    // Another file under the name is not the one that was opened.
    load_after(&made(), |path| {
        let beside = path.with_extension("new");
        std::fs::write(&beside, [b'x'; 4000]).unwrap();
        std::fs::rename(beside, path).unwrap();
    })
    .unwrap();
}

#[test]
fn the_digest_is_that_of_the_files() {
    let made = made();
    let digest = |directory: &Path| Checkpoint::open(directory).unwrap().digest().to_owned();
    let first = digest(made.directory.path());
    assert_eq!(digest(made.directory.path()), first);
    let path = weights(&made);
    let mut bytes = std::fs::read(&path).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    std::fs::write(&path, bytes).unwrap();
    let second = digest(made.directory.path());
    std::fs::write(made.directory.path().join("tokenizer.json"), "{}").unwrap();
    let third = digest(made.directory.path());
    assert!(first != second && second != third && first.len() == 64);
}

#[test]
fn tensors_of_zeros_only_are_named() {
    for (name, refused) in [
        ("model.norm.weight", true),
        ("model.embed_tokens.weight", true),
        ("model.layers.0.self_attn.q_proj.weight", true),
        // What blocks begin with that are added to a model.
        ("model.layers.0.self_attn.o_proj.weight", false),
    ] {
        let mut made = made();
        made.tensors.get_mut(name).unwrap().fill(0.0);
        made::write_tensors(made.directory.path(), &made.tensors, &made.shapes);
        let loaded = load(made.directory.path());
        assert_eq!(loaded.is_err(), refused, "{name}");
        if let Err(error) = loaded {
            assert!(error.contains("nothing but zeros") && error.contains(name), "{error}");
        }
    }
    // The second half of the file, as a copy leaves it that was interrupted.
    let made = made();
    let mut bytes = std::fs::read(weights(&made)).unwrap();
    let half = bytes.len() / 2;
    bytes[half..].fill(0);
    std::fs::write(weights(&made), bytes).unwrap();
    assert!(load(made.directory.path()).unwrap_err().contains("nothing but zeros"));
}

#[test]
fn rows_of_zeros_are_noted_when_they_are_many() {
    let name = "model.layers.0.self_attn.q_proj.weight";
    let notes = |zero_rows: std::ops::Range<usize>| {
        let mut made = made();
        let width = made.shapes[name][1];
        made.tensors.get_mut(name).unwrap()[zero_rows.start * width..zero_rows.end * width].fill(0.0);
        made::write_tensors(made.directory.path(), &made.tensors, &made.shapes);
        let notes: Vec<String> = Checkpoint::open(made.directory.path())
            .unwrap()
            .notes()
            .iter()
            .map(ToString::to_string)
            .collect();
        (made.shapes[name][0], notes)
    };
    let (rows, none) = notes(1..2);
    assert!(none.is_empty(), "a padding row is nothing to speak of: {none:?}");
    let (_, some) = notes(rows / 2..rows);
    let expected = format!("{} of the {rows} rows of {name}", rows - rows / 2);
    assert!(some.len() == 1 && some[0].contains(&expected), "{some:?}");
}

/// The checkpoint with another config.json, more tensors, and other names.
fn changed(
    fields: Value,
    more: &[(&str, Vec<usize>, Vec<f32>)],
    name: impl Fn(&str) -> Option<String>,
) -> Made {
    let mut made = made();
    let mut config = config();
    config.as_object_mut().unwrap().append(fields.clone().as_object_mut().unwrap());
    std::fs::write(made.directory.path().join("config.json"), config.to_string()).unwrap();
    for (name, shape, values) in more {
        made.tensors.insert((*name).into(), values.clone());
        made.shapes.insert((*name).into(), shape.clone());
    }
    let renamed = |old: &String| name(old);
    made.tensors = made.tensors.iter().filter_map(|(old, x)| Some((renamed(old)?, x.clone()))).collect();
    made.shapes = made.shapes.iter().filter_map(|(old, x)| Some((renamed(old)?, x.clone()))).collect();
    made::write_tensors(made.directory.path(), &made.tensors, &made.shapes);
    made
}

#[test]
fn a_tied_head_must_be_the_embedding() {
    let embedding = made().tensors["model.embed_tokens.weight"].clone();
    let tied = |head: Option<Vec<f32>>| {
        let keep = head.is_some();
        let more: Vec<_> = head.into_iter().map(|head| ("lm_head.weight", vec![20, 8], head)).collect();
        let made = changed(json!({"tie_word_embeddings": true}), &more, |name| {
            (keep || name != "lm_head.weight").then(|| name.to_owned())
        });
        load(made.directory.path())
    };
    tied(None).unwrap();
    tied(Some(embedding.clone())).unwrap();
    let mut drifted = embedding;
    drifted[7] += 0.01;
    let error = tied(Some(drifted)).unwrap_err();
    assert!(
        error.contains("tie_word_embeddings is true, but lm_head.weight is not the embedding"),
        "{error}"
    );
    let made = changed(json!({}), &[], |name| (name != "lm_head.weight").then(|| name.to_owned()));
    assert!(load(made.directory.path()).unwrap_err().contains("missing lm_head.weight"));
}

#[test]
fn stored_frequencies_are_ignored_where_they_fit() {
    let name = "model.layers.0.self_attn.rotary_emb.inv_freq";
    let same = |name: &str| Some(name.to_owned());
    let made = changed(json!({}), &[(name, vec![2], vec![1.0, 0.01])], same);
    load(made.directory.path()).unwrap();
    let made = changed(json!({}), &[(name, vec![2], vec![1.0, 0.001])], same);
    let error = load(made.directory.path()).unwrap_err();
    assert!(error.contains(name) && error.contains("rope_theta"), "{error}");
}

#[test]
fn names_of_a_model_without_its_head_are_known_and_those_of_a_wrapper_are_told() {
    let bare = |name: &str| name.strip_prefix("model.").map(str::to_owned);
    let made = changed(
        json!({"architectures": ["Qwen3Model"], "model_type": "qwen3", "tie_word_embeddings": true}),
        &[],
        bare,
    );
    load(made.directory.path()).unwrap();
    for (prefix, cure) in [
        ("base_model.model.", "merge"),
        ("module.", "save the model inside"),
        ("language_model.", "a part of another"),
    ] {
        let made = changed(json!({}), &[], |name| Some(format!("{prefix}{name}")));
        let error = load(made.directory.path()).unwrap_err();
        assert!(error.contains(&format!("begin with {prefix}")) && error.contains(cure), "{error}");
    }
}

#[test]
fn a_second_set_of_weights_is_refused_or_told() {
    let made = made();
    let path = weights(&made);
    std::fs::copy(&path, path.with_file_name("model-00001-of-00001.safetensors")).unwrap();
    std::fs::write(path.with_file_name("pytorch_model.bin"), "pickle").unwrap();
    let notes: Vec<String> =
        Checkpoint::open(made.directory.path()).unwrap().notes().iter().map(ToString::to_string).collect();
    assert!(notes.iter().any(|note| note.starts_with("pytorch_model.bin is not read")), "{notes:?}");
    let map: BTreeMap<&String, &str> =
        made.tensors.keys().map(|name| (name, "model-00001-of-00001.safetensors")).collect();
    let index = path.with_file_name("model.safetensors.index.json");
    std::fs::write(&index, json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string()).unwrap();
    let error = load(made.directory.path()).unwrap_err();
    assert!(error.contains("two sets of weights") && error.contains("index.json"), "{error}");
    std::fs::remove_file(&path).unwrap();
    let checkpoint = Checkpoint::open(made.directory.path()).unwrap();
    assert!(checkpoint.notes().iter().any(|note| note.to_string().contains("metadata.total_size")));
}

#[test]
fn more_layers_than_tensors_are_refused_before_their_names_are_made() {
    let made = made();
    let mut config = config();
    config["num_hidden_layers"] = json!(4096);
    std::fs::write(made.directory.path().join("config.json"), config.to_string()).unwrap();
    let error = load(made.directory.path()).unwrap_err();
    assert!(error.contains("4096 layers, the files hold"), "{error}");
}

#[test]
fn a_name_cannot_forge_a_line_or_move_a_cursor() {
    let name = "a\r\nERROR forged \u{1b}[31m";
    let mut made = made();
    made.tensors.insert(name.into(), vec![1.0]);
    made.shapes.insert(name.into(), vec![1]);
    made::write_tensors(made.directory.path(), &made.tensors, &made.shapes);
    let error = load(made.directory.path()).unwrap_err();
    assert!(error.contains("ERROR forged") && !error.contains(char::is_control), "{error}");
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
        (
            "pointer of Git LFS",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0".to_vec(),
            "git lfs pull",
        ),
        (
            "a name twice",
            header(
                r#"{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}"#,
                4,
            ),
            "given twice",
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
    std::fs::rename(weights(&made), weights(&made).with_file_name("one.safetensors")).unwrap();
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
    check(json!({"absent": "one.safetensors"}), "absent is in no shard");
    check(json!({"absent": 3}), "absent is 3, expected the name of a file");
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
        ("num_hidden_layers", json!("six"), "whole number"),
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
    std::fs::write(directory.join("tokenizer.json"), tokenizer(tokens).to_string()).unwrap();
}

fn tokenizer(tokens: &[String]) -> Value {
    let added: Vec<Value> = tokens
        .iter()
        .enumerate()
        .map(|(id, content)| {
            json!({"id": id, "content": content, "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": false})
        })
        .collect();
    let vocab: serde_json::Map<String, Value> =
        tokens.iter().enumerate().map(|(id, token)| (token.clone(), json!(id))).collect();
    json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added, "normalizer": null,
        "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null, "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": tokens[0]},
    })
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
        (json!({"item_seperator": ", "}), "did you mean `item_separator`?"),
        (json!({"levels": "2"}), "expected a whole number"),
        (json!({"item_separator": null}), "item_separator"),
        (json!({"generation_begin": {"text": "<|x|>", "id": 6, "idd": 6}}), "expected the text of a token"),
        (json!({"catalog_sid_form": "numbers"}), "catalog_sid_form"),
        (json!({"decoder_start_token": "<|x|>"}), "decoder_start_token"),
        (json!({"levels": 3}), "3 levels, but 2 token patterns"),
        (json!({"generated_steps": 4}), "generated_steps"),
        (json!({"model": "mixture"}), "encoder-decoder"),
        (json!({"level_token_patterns": ["<a>", "<b_{}>"]}), "exactly one {}"),
        (json!({"preset": "lion"}), "unknown preset"),
        (json!({"preset": "minionrec"}), "did you mean `minionerec`?"),
        (json!({"level_code_counts": [3, 0]}), "codes in a level"),
    ] {
        let error = bind(fields).expect_err(expected);
        assert!(error.contains(expected), "{error}");
    }
    std::fs::write(directory.path().join("tokenizer.json"), "{}").unwrap();
    assert!(bind(json!({"codes_with_tokens": "used"})).unwrap_err().contains("tokenizer.json"));
}

/// Tokens of two levels of three codes, and two more.
fn two_levels() -> Vec<String> {
    ["<unk>", "<a_0>", "<a_1>", "<a_2>", "<b_0>", "<b_1>", "<b_2>", "<|x|>", "so"].map(String::from).into()
}

/// Binds a convention of two levels to a tokenizer that was changed.
fn bind(fields: Value, tokens: &[String], change: impl FnOnce(&mut Value)) -> Result<Convention, String> {
    let mut json = tokenizer(tokens);
    change(&mut json);
    let format = Format::parse(&format(fields).to_string()).unwrap();
    Convention::bind_to(format, &json.to_string(), 9).map_err(|error| error.to_string())
}

fn told(convention: &Convention) -> String {
    convention.notes().iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// Whether every history of two items has the tokens of its text.
fn check_all_histories(convention: &Convention) {
    let items: Vec<[u32; 2]> = (1..4).flat_map(|a| (4..7).map(move |b| [a, b])).collect();
    for one in &items {
        for two in &items {
            let history = [one.as_slice(), two.as_slice()];
            let text = convention.render(history.into_iter());
            assert_eq!(
                convention.prompt(history.into_iter()).unwrap(),
                convention.tokenize(&text).unwrap(),
                "{text}"
            );
        }
    }
}

#[test]
fn codes_that_are_found_in_another_way_are_tokenised_with_their_text() {
    let whole = bind(json!({}), &two_levels(), |_| {}).unwrap();
    assert!(whole.composes() && told(&whole).is_empty());
    check_all_histories(&whole);
    assert_eq!(whole.tokens_per_item(), 2);
    // Two codes that were added later with the default of a library, under a normalizer that marks the
    // beginnings of texts.
    let later = bind(json!({}), &two_levels(), |json| {
        json["model"]["vocab"] = json!({"<unk>": 0});
        json["normalizer"] = json!({"type": "Prepend", "prepend": "_"});
        json["added_tokens"][2]["normalized"] = json!(true);
        json["added_tokens"][5]["normalized"] = json!(true);
    })
    .unwrap();
    assert!(!later.composes() && told(&later).contains("tokenised as a whole text"), "{}", told(&later));
    check_all_histories(&later);
    let both = later.prompt([[2, 5].as_slice()].into_iter()).unwrap();
    assert_ne!(both, [2, 5]);
    // A token that takes in the end of one code and the beginning of the next.
    let mut tokens = two_levels();
    tokens[8] = "<a_1><b_2>".into();
    let longer = bind(json!({}), &tokens, |_| {}).unwrap();
    assert!(!longer.composes() && told(&longer).contains("may reach into a code"), "{}", told(&longer));
    check_all_histories(&longer);
    // Words of the vocabulary that are not added tokens.
    let words = bind(json!({}), &two_levels(), |json| json["added_tokens"] = json!([])).unwrap();
    assert!(!words.composes());
    check_all_histories(&words);
}

#[test]
fn a_large_table_is_checked_as_a_whole() {
    let patterns = ["<s_a_{}>", "<s_b_{}>", "<s_c_{}>"];
    let mut tokens = vec!["<unk>".to_owned()];
    tokens.extend(
        patterns.iter().flat_map(|pattern| (0..8192).map(|code| pattern.replace("{}", &code.to_string()))),
    );
    let fields =
        json!({"levels": 3, "level_token_patterns": patterns, "level_code_counts": [8192, 8192, 8192]});
    let format = Format::parse(&fields.to_string()).unwrap();
    let mut json = tokenizer(&tokens);
    let convention = Convention::bind_to(format.clone(), &json.to_string(), tokens.len()).unwrap();
    assert!(convention.composes());
    // Two codes among all of them, and not two of one item of any sample.
    json["model"]["vocab"] = json!({"<unk>": 0});
    json["normalizer"] = json!({"type": "Prepend", "prepend": "_"});
    json["added_tokens"][1234]["normalized"] = json!(true);
    json["added_tokens"][12_345]["normalized"] = json!(true);
    let convention = Convention::bind_to(format, &json.to_string(), tokens.len()).unwrap();
    assert!(!convention.composes());
}

#[test]
fn two_codes_of_one_token_are_named() {
    let error = bind(json!({}), &two_levels(), |json| {
        json["model"]["vocab"]["<a_2>"] = json!(2);
        json["added_tokens"][3]["id"] = json!(2);
    })
    .unwrap_err();
    assert!(error.contains("are one token, 2"), "{error}");
}

#[test]
fn prompts_hold_no_token_that_the_model_lacks() {
    let mut tokens = two_levels();
    tokens.push("<new>".into());
    let error = bind(json!({"prompt_prefix": "so <new> "}), &tokens, |_| {}).unwrap_err();
    assert!(error.contains("\"<new>\", which is token 9") && error.contains("has 9 tokens"), "{error}");
    // A tokenizer that is larger than the embedding serves as long as nobody writes the rest.
    let convention = bind(json!({"prompt_prefix": "so "}), &tokens, |_| {}).unwrap();
    assert!(
        told(&convention).contains("the tokenizer has 10 tokens, the embedding 9"),
        "{}",
        told(&convention)
    );
    let error = convention.tokens_of("so <a_0><new>", 100).unwrap_err();
    assert_eq!(error, PromptError::BeyondVocabulary { text: "<new>".into(), id: 9, rows: 9 });
}

#[test]
fn words_that_nobody_knows_are_told() {
    let convention = bind(json!({"prompt_prefix": "I have bought "}), &two_levels(), |_| {}).unwrap();
    assert!(told(&convention).contains("3 of the 3 tokens around a history"), "{}", told(&convention));
    assert_eq!(convention.tokens_of("a baby blanket", 100), Err(PromptError::OnlyUnknown));
    assert_eq!(convention.tokens_of("so a blanket", 100).unwrap(), [8, 0, 0]);
    assert_eq!(convention.tokens_of("", 100).unwrap(), Vec::<u32>::new());
}

#[test]
fn a_text_that_no_context_holds_is_not_tokenised() {
    let convention = bind(json!({}), &two_levels(), |_| {}).unwrap();
    let long = "so ".repeat(10_000);
    assert!(matches!(
        convention.tokens_of(&long, 100),
        Err(PromptError::TooLong { bytes: 30_000, limit: 100, .. })
    ));
    assert_eq!(convention.tokens_of(&long, 10_000).unwrap().len(), 10_000);
}

#[test]
fn a_tokenizer_that_multiplies_text_is_refused() {
    let error = bind(json!({}), &two_levels(), |json| {
        let insert = json!({"type": "Replace", "pattern": {"String": ""}, "content": "x".repeat(1000)});
        json["normalizer"] = json!({"type": "Sequence", "normalizers": vec![insert; 4]});
    })
    .unwrap_err();
    assert!(error.contains("tokenizer.json: its normalizers make a text up to"), "{error}");
    let twice = tokenizer(&two_levels()).to_string().replacen("\"<a_0>\":1", "\"<a_0>\":1,\"<a_0>\":2", 1);
    let format = Format::parse(&format(json!({})).to_string()).unwrap();
    let error = Convention::bind_to(format, &twice, 9).unwrap_err().to_string();
    assert!(error.contains("\"<a_0>\" is given twice"), "{error}");
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
        let markers = [
            &format.item_begin_token,
            &format.item_end_token,
            &format.generation_begin,
            &format.decoder_start_token,
        ];
        tokens.extend(markers.into_iter().flatten().map(|marker| marker.text().to_owned()));
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
    /// Opening a checkpoint answers, whatever the bytes; it never panics, hangs or takes the machine's
    /// memory.
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
