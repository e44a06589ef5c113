//! config.json is read strictly: a field that is wrong, misspelt or given twice is refused by name, and
//! an absent one takes the default of transformers.
#![allow(clippy::unwrap_used, reason = "a test that cannot be set up has failed")]

use beamline_model::checkpoint::config::{Architecture, Config};
use beamline_model::checkpoint::described::Described;
use beamline_model::checkpoint::note::Note;
use serde_json::{Value, json};

fn qwen3() -> Value {
    json!({
        "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "hidden_size": 64, "intermediate_size": 8,
        "num_hidden_layers": 2, "num_attention_heads": 32, "num_key_value_heads": 32, "head_dim": 128, "vocab_size": 32,
        "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu",
        "attention_bias": false, "tie_word_embeddings": false,
    })
}

fn llama() -> Value {
    let mut config = qwen3();
    config["architectures"] = json!(["LlamaForCausalLM"]);
    config["model_type"] = json!("llama");
    config["max_position_embeddings"] = json!(2048);
    config["head_dim"] = json!(2);
    config
}

fn with(mut config: Value, fields: &Value) -> Value {
    for (name, value) in fields.as_object().unwrap() {
        config[name] = value.clone();
    }
    config
}

fn without(mut config: Value, names: &[&str]) -> Value {
    names.iter().for_each(|name| drop(config.as_object_mut().unwrap().remove(*name)));
    config
}

fn parse(config: &Value) -> Result<Config, String> {
    Config::parse(&config.to_string()).map_err(|error| error.to_string())
}

fn notes(config: &Value) -> Vec<String> {
    let mut notes: Vec<Note> = Vec::new();
    Config::read(&config.to_string(), &mut notes).unwrap();
    notes.iter().map(ToString::to_string).collect()
}

fn refused(config: &Value, parts: &[&str]) {
    let error = parse(config).map(|_| format!("{config} is accepted")).unwrap_or_else(|error| error);
    for part in parts {
        assert!(error.contains(part), "{part:?} is not in: {error}");
    }
}

#[test]
fn a_field_of_the_wrong_type_or_range_is_named() {
    let nothing = [json!(null), json!("x"), json!(true), json!([]), json!({})];
    let no_size =
        [json!("64"), json!(-1), json!(0), json!(1.5), json!(64.0), json!(1_u64 << 40), json!(u64::MAX)];
    let no_number = [json!("1000000"), json!(-1.0), json!(0.0), json!(1e308)];
    for name in ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "vocab_size"]
    {
        for value in nothing.iter().chain(&no_size) {
            refused(
                &with(qwen3(), &json!({name: value})),
                &[&format!("{name} is "), "expected a whole number"],
            );
        }
    }
    for value in nothing.iter().chain(&no_size).filter(|value| !value.is_null()) {
        for name in ["num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window"] {
            refused(&with(llama(), &json!({name: value})), &[&format!("{name} is ")]);
        }
    }
    for name in ["rms_norm_eps", "rope_theta"] {
        for value in nothing.iter().chain(&no_number) {
            refused(&with(qwen3(), &json!({name: value})), &[&format!("{name} is "), "expected a number"]);
        }
    }
    refused(&with(qwen3(), &json!({"rms_norm_eps": 1e-60})), &["rms_norm_eps", "single precision"]);
    for name in ["tie_word_embeddings", "attention_bias", "mlp_bias", "use_sliding_window"] {
        for value in [json!(null), json!("false"), json!(0)] {
            refused(
                &with(qwen3(), &json!({name: value})),
                &[&format!("{name} is "), "expected true or false"],
            );
        }
    }
    refused(&with(qwen3(), &json!({"hidden_act": null})), &["hidden_act is null"]);
    refused(&with(qwen3(), &json!({"layer_types": "full_attention"})), &["layer_types is "]);
    refused(&with(qwen3(), &json!({"layer_types": ["full_attention"]})), &["layer_types holds 1 names"]);
    refused(&with(qwen3(), &json!({"rope_scaling": 4.0})), &["rope_scaling is 4.0, expected an object"]);
    refused(&with(qwen3(), &json!({"head_dim": null})), &["head_dim is null"]);
    refused(&json!([]), &["not a JSON object"]);
}

#[test]
fn fields_of_a_rope_block_are_read_as_strictly() {
    let block = |fields: Value| json!({"rope_parameters": fields});
    for (fields, parts) in [
        (json!({"rope_theta": "1000000"}), &["rope_parameters.rope_theta is \"1000000\""][..]),
        (json!({"rope_theta": null}), &["rope_theta is null"]),
        (json!({"rope_theta": 20000.0}), &["rope_theta is 20000, but 10000 outside"]),
        (json!({"rope_type": 3}), &["rope_type is 3"]),
        (json!({"rope_type": null}), &["rope_type is null"]),
        (
            json!({"rope_type": "yarn", "type": "linear", "factor": 2.0}),
            &["rope_type is \"yarn\"", "type is \"linear\""],
        ),
        (json!({"rope_type": "linear", "factor": "4"}), &["factor is \"4\""]),
        (json!({"rope_type": "linear", "factor": null}), &["factor is null"]),
        (json!({"rope_type": "linear", "factor": 0}), &["factor is 0"]),
        (json!({"rope_type": "linear"}), &["factor is missing"]),
        (json!({"factor": 4.0}), &["factor means nothing for rope_type \"default\""]),
        (
            json!({"rope_type": "yarn", "factr": 4.0, "original_max_position_embeddings": 64}),
            &["factr is not known; did you mean `factor`?", "factor is missing"],
        ),
        (json!({"rope_type": "yarn", "factor": 4.0, "truncate": "no"}), &["truncate is \"no\""]),
        (json!({"rope_type": "yarn", "factor": 4.0, "beta_fast": -1}), &["beta_fast is -1"]),
        (json!({"rope_type": "yarn", "factor": 4.0, "attention_factor": 0.0}), &["attention_factor is 0.0"]),
        (json!({"rope_type": "yarn", "factor": 4.0, "mscale": "1"}), &["mscale is \"1\""]),
        (
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": null}),
            &["original_max_position_embeddings is null"],
        ),
        (
            json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}),
            &["high_freq_factor is 4, expected more than low_freq_factor"],
        ),
        (
            json!({"rope_type": "llama3", "factor": 8.0}),
            &["low_freq_factor is missing", "high_freq_factor is missing"],
        ),
        (json!({"partial_rotary_factor": 0.5}), &["partial_rotary_factor is 0.5"]),
        (json!({"full_attention": {"rope_theta": 1e4}}), &["per layer type"]),
        (json!({"rope_typ": "default"}), &["rope_typ is not known; did you mean `rope_type`?"]),
        (json!({"mrope_section": [1, 2]}), &["mrope_section is not known"]),
    ] {
        refused(&with(qwen3(), &block(fields)), parts);
    }
    refused(
        &with(
            qwen3(),
            &json!({
                "original_max_position_embeddings": 4096,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
            }),
        ),
        &["original_max_position_embeddings is 64, but 4096 outside"],
    );
}

#[test]
fn two_rope_blocks_must_say_the_same() {
    let yarn = json!({"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64});
    let default = json!({"rope_type": "default", "rope_theta": 10000.0});
    refused(
        &with(qwen3(), &json!({"rope_parameters": default, "rope_scaling": yarn})),
        &["rope_parameters and rope_scaling"],
    );
    let both = with(qwen3(), &json!({"rope_parameters": yarn, "rope_scaling": yarn}));
    assert_eq!(parse(&both).unwrap(), parse(&with(qwen3(), &json!({"rope_scaling": yarn}))).unwrap());
    // Of the base, too: transformers takes that of `rope_scaling`, or the one outside.
    let theta = json!({"rope_parameters": {"rope_theta": 1e6}, "rope_scaling": {"type": "default"}});
    refused(&without(with(qwen3(), &theta), &["rope_theta"]), &["rope_parameters and rope_scaling"]);
    for empty in [json!(null), json!({})] {
        let config = with(qwen3(), &json!({"rope_parameters": default, "rope_scaling": empty}));
        assert_eq!(parse(&config).unwrap(), parse(&qwen3()).unwrap());
    }
}

#[test]
fn nothing_may_be_said_twice() {
    let text = qwen3().to_string();
    let twice = text.replacen('{', r#"{"rope_theta": 5e5, "#, 1);
    let error = Config::parse(&twice).unwrap_err().to_string();
    assert!(error.contains("\"rope_theta\" is given twice"), "{error}");
    refused(&with(qwen3(), &json!({"model_type": "mistral"})), &["Qwen3ForCausalLM", "mistral"]);
    refused(&with(qwen3(), &json!({"architectures": ["Qwen3ForCausalLM", "X"]})), &["more than one"]);
}

#[test]
fn absent_fields_take_the_defaults_of_transformers() {
    let terse = without(
        qwen3(),
        &[
            "head_dim",
            "num_key_value_heads",
            "max_position_embeddings",
            "rms_norm_eps",
            "rope_theta",
            "hidden_act",
        ],
    );
    let terse = without(terse, &["attention_bias", "tie_word_embeddings", "model_type"]);
    assert_eq!(parse(&terse).unwrap(), parse(&qwen3()).unwrap());
    let told = notes(&terse).join("\n");
    for part in
        ["head_dim: is absent, so it is 128", "num_key_value_heads", "32768", "0.000001", "rope_theta"]
    {
        assert!(told.contains(part), "{part} is not in:\n{told}");
    }
    assert_eq!(notes(&qwen3()), Vec::<String>::new());

    let terse =
        without(llama(), &["head_dim", "num_key_value_heads", "max_position_embeddings", "rms_norm_eps"]);
    assert_eq!(parse(&terse).unwrap(), parse(&llama()).unwrap());
    let null = with(llama(), &json!({"head_dim": null, "num_key_value_heads": null, "rope_scaling": null}));
    assert_eq!(parse(&null).unwrap(), parse(&llama()).unwrap());
    // Null says "as many as heads"; absence says 32.
    let few = with(qwen3(), &json!({"num_attention_heads": 4, "num_key_value_heads": null}));
    assert_eq!(parse(&few).unwrap().kv_heads, 4);
    refused(&without(few, &["num_key_value_heads"]), &["4 attention heads cannot share 32", "is missing"]);
    // All that is missing is told at once.
    refused(
        &without(qwen3(), &["hidden_size", "vocab_size", "num_hidden_layers"]),
        &["hidden_size is missing", "vocab_size is missing", "num_hidden_layers is missing"],
    );
    for name in ["Qwen3Model", "Qwen3ForCausalLM"] {
        let config = with(qwen3(), &json!({"architectures": [name]}));
        assert_eq!(parse(&config).unwrap().architecture, Architecture::Qwen3);
    }
    assert_eq!(parse(&without(qwen3(), &["architectures"])).unwrap(), parse(&qwen3()).unwrap());
}

#[test]
fn dynamic_scaling_is_plain_within_the_positions() {
    let dynamic = with(qwen3(), &json!({"rope_scaling": {"type": "dynamic", "factor": 2.0}}));
    assert_eq!(parse(&dynamic).unwrap(), parse(&qwen3()).unwrap());
    assert!(notes(&dynamic).join("").contains("dynamic scales nothing within max_position_embeddings"));
}

#[test]
fn unknown_fields_are_refused_or_told() {
    for (field, value, parts) in [
        ("rope_thetha", json!(1e6), &["rope_thetha is not known; did you mean rope_theta?"][..]),
        ("num_hidden_layer", json!(2), &["did you mean num_hidden_layers?"]),
        ("attention-bias", json!(true), &["did you mean attention_bias?"]),
        ("ropeScaling", json!({}), &["ropeScaling is not known"]),
        ("factor", json!(4.0), &["factor", "belongs in rope_parameters"]),
        ("logits_scaling", json!(8.0), &["logits_scaling is 8.0", "change the computation"]),
        ("final_logit_softcapping", json!(30.0), &["final_logit_softcapping is 30.0"]),
        ("partial_rotary_factor", json!(0.5), &["partial_rotary_factor is 0.5"]),
        ("num_experts", json!(8), &["num_experts is 8"]),
        ("is_encoder_decoder", json!(true), &["is_encoder_decoder is true"]),
        ("quantization_config", json!({"bits": 4}), &["quantised"]),
        ("vision_config", json!({"depth": 4}), &["more than text"]),
        ("per_layer_config", json!({"0": {"head_dim": 4}}), &["per_layer_config"]),
    ] {
        refused(&with(qwen3(), &json!({field: value})), parts);
    }
    let epsilon = with(without(qwen3(), &["rms_norm_eps"]), &json!({"rms_norm_epsilon": 1e-5}));
    refused(&epsilon, &["rms_norm_epsilon is not known; did you mean rms_norm_eps?"]);
    let harmless = json!({
        "bos_token_id": null, "eos_token_id": [1, 2], "dtype": "bfloat16", "torch_dtype": "float32", "use_cache": true,
        "transformers_version": "4.52.4", "initializer_range": 0.02, "attention_dropout": 0.0, "pretraining_tp": 1,
        "max_window_layers": 28, "sliding_window": 4096, "use_sliding_window": false, "quantization_config": null,
        "partial_rotary_factor": 1.0, "num_experts": 0, "is_encoder_decoder": false, "_name_or_path": "x", "top_k": 50,
        "layer_types": ["full_attention", "full_attention"], "logit_scale": 1,
    });
    let config = with(qwen3(), &harmless);
    assert_eq!(parse(&config).unwrap(), parse(&qwen3()).unwrap());
    assert_eq!(notes(&config), Vec::<String>::new());
    let told =
        notes(&with(qwen3(), &json!({"reward_head": 1, "auto_map": {}, "pretraining_tp": 2}))).join("\n");
    for part in ["reward_head is not known", "auto_map", "pretraining_tp"] {
        assert!(told.contains(part), "{told}");
    }
}

#[test]
fn windows_that_slide_are_refused_and_others_are_not() {
    let slides = json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 1});
    refused(&with(qwen3(), &slides), &["sliding-window"]);
    refused(
        &with(qwen3(), &json!({"layer_types": ["full_attention", "sliding_attention"]})),
        &["sliding-window"],
    );
    refused(&with(llama(), &json!({"use_sliding_window": true})), &["sliding-window"]);
    for full in [
        json!({"use_sliding_window": true, "sliding_window": 8, "max_window_layers": 2}),
        json!({"use_sliding_window": true, "sliding_window": null}),
        json!({"use_sliding_window": false, "max_window_layers": 0}),
        json!({"use_sliding_window": false, "sliding_window": 8}),
        json!({"use_sliding_window": true, "sliding_window": 8, "layer_types": ["full_attention", "full_attention"]}),
    ] {
        parse(&with(qwen3(), &full)).unwrap();
    }
}

#[test]
fn sizes_whose_products_cannot_be_counted_are_refused() {
    let huge = json!({
        "num_hidden_layers": 1 << 24, "num_attention_heads": 1 << 24, "num_key_value_heads": 1 << 24, "head_dim": 4096,
    });
    refused(&with(qwen3(), &huge), &["num_hidden_layers is 16777216", "num_attention_heads is 16777216"]);
    let large = json!({
        "num_hidden_layers": 4096, "num_attention_heads": 65536, "num_key_value_heads": 65536, "head_dim": 16384,
    });
    refused(&with(qwen3(), &large), &["bytes of keys and values"]);
}
