//! What the tests read from fixtures of HSTU: configurations, requests and layers, all sizes from the
//! files themselves.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "every test uses its own part")]
#![allow(clippy::approx_constant, reason = "the reference has 2 * 3.14")]

use std::collections::{BTreeSet, HashMap};

use beamline_model::checkpoint::tensors::Tensors as Opened;
use beamline_model::families::hstu::config::{StackConfig, Variant};
use beamline_model::families::hstu::inputs::{Candidates, Events, Request};
use candle_core::Tensor;
use serde_json::{Value, json};

use super::hstu::*;

/// What the names of the tensors of `stu` begin with.
pub const STU_LAYERS: &str = "_stu_layers.";

pub fn research_config(folder: &str) -> Value {
    research_of(&fixture_json(&format!("{folder}/config.json")))
}

/// The configuration of a checkpoint from the fixture's.
pub fn research_of(config: &Value) -> Value {
    let of = |name: &str| config[name].as_u64().unwrap() as usize;
    research(&ResearchSizes {
        items: of("num_items"),
        most: of("max_sequence_len"),
        positions: of("max_sequence_len") + of("gr_output_length") + 1,
        width: of("embedding_dim"),
        layers: of("num_blocks"),
        heads: of("num_heads"),
        key: of("attention_dim"),
        value: of("linear_dim"),
    })
}

/// The requests of a stage: `in.past_ids`, or `in.a.past_ids`.
pub fn requests(inputs: &HashMap<String, Tensor>, stage: &str) -> Vec<Request> {
    let of = |name: &str| inputs[&format!("in.{stage}{name}")].clone();
    let (ids, times) = (of("past_ids"), of("timestamps"));
    let lengths = integers(&of("past_lengths"));
    let request = |(user, &length): (usize, &i64)| {
        let row = |tensor: &Tensor| integers(&tensor.get(user).unwrap());
        let (n, ids, times) = (length as usize, row(&ids), row(&times));
        let items: Vec<u32> = ids[..n].iter().map(|&id| id as u32).collect();
        history(&items, &[], &times[..n], times[n])
    };
    lengths.iter().enumerate().map(request).collect()
}

/// The layers of a case of the repository's `stu`; see [`layers_of`].
pub fn stu_layers(case: &str, file: &HashMap<String, Tensor>) -> (StackConfig, Opened, bool) {
    layers_of(&fixture_json("stu/config.json"), case, file)
}

/// The layers of a case: constants, tensors with the prefix [`STU_LAYERS`], and whether its last rows
/// are targets.
pub fn layers_of(config: &Value, case: &str, file: &HashMap<String, Tensor>) -> (StackConfig, Opened, bool) {
    let (base, constants) = (&config["base"], &config["cases"][case]);
    let of = |name: &str| base[name].as_u64().unwrap() as usize;
    let divisor = integers(&file["in.max_seq_len"])[0] as usize;
    let mut config = stu_stack(
        of("embedding_dim"),
        of("num_layers"),
        of("num_heads"),
        of("attention_dim"),
        of("hidden_dim"),
        divisor,
    );
    config["mask"]["contextual_len"] = constants["contextual_seq_len"].clone();
    config["mask"]["max_attention_len"] = constants["max_attn_len"].as_u64().unwrap_or(0).into();
    if constants["use_group_norm"] == true {
        config["output_norm"]["kind"] = "group".into();
    }
    let config: StackConfig = serde_json::from_value(config).unwrap();
    config.check(Variant::Dlrm).unwrap();
    let directory = checkpoint(&Value::Null, &state(file, ""));
    let tensors = Opened::open(directory.path()).unwrap();
    tensors.check(&config.expected_tensors(Variant::Dlrm, STU_LAYERS), &[]).unwrap();
    (config, tensors, constants["target_aware"] == true)
}

/// The configuration of a ranking checkpoint: names from the fixture's configuration, sizes from its tensors.
pub fn ranking_config(config: &Value, file: &HashMap<String, Tensor>, clamp: &str) -> Value {
    let of = |name: &str| config[name].as_u64().unwrap() as usize;
    let dims = |name: &str| file[&format!("state.{name}")].dims().to_vec();
    let rows = |table: &str| dims(&format!("_embedding_collection.embeddings.{table}.weight"))[0];
    let eps = |name: &str| config["ln_eps"][name].as_f64().unwrap();
    const INPUT: &str = "_hstu_transducer._input_preprocessor";
    const POSITIONS: &str = "_hstu_transducer._positional_encoder";
    const OUTPUT: &str = "_hstu_transducer._output_postprocessor";
    let names = |list: &str| -> Vec<String> {
        let pairs = config[list].as_array().unwrap().iter();
        pairs.map(|pair| pair[0].as_str().unwrap().to_owned()).collect()
    };
    let post = config["post_feature"][0].as_str().unwrap().to_owned();
    let features: Vec<String> = std::iter::once(post).chain(names("additional_features")).collect();
    let contextual = config["contextual_features"].as_array().unwrap().iter().map(|pair| {
        let name = pair[0].as_str().unwrap();
        let min = config["contextual_min_tokens"][name].as_u64().unwrap_or(0);
        json!({"name": name, "table": name, "slots": pair[1], "min_tokens": min})
    });
    let contextual: Vec<Value> = contextual.collect();
    let tables: BTreeSet<String> = features.iter().cloned().chain(names("contextual_features")).collect();
    let tables: Vec<Value> = tables
        .into_iter()
        .map(|name| json!({"name": name, "rows": rows(&name), "unknown_ids": "refuse"}))
        .collect();
    let integer = |name: &str| integers(&file[name]);
    let list = |name: &str| values(&file[&format!("state.{OUTPUT}.{name}")]);
    let periods: Vec<Value> = list("_period_units")
        .into_iter()
        .zip(list("_units_per_period"))
        .map(|(unit, count)| json!([unit as u64, count as u64]))
        .collect();
    let tasks = config["tasks"].as_array().unwrap().iter();
    let tasks: Vec<Value> = tasks.map(|task| json!({"name": task["name"], "kind": task["type"]})).collect();
    let most = |name: &str| integer(name).into_iter().max().unwrap_or(0) + 100;
    let mut stack = stu_stack(
        of("model_dim"),
        of("num_layers"),
        of("num_heads"),
        of("attention_dim"),
        of("hidden_dim"),
        integer("out.preprocessor.max_seq_len")[0] as usize,
    );
    stack["mask"]["contextual_len"] = config["attention_context_len"].clone();
    json!({
        "model_type": "hstu",
        "hstu_variant": "dlrm",
        "stack": stack,
        "input": {
            "embedding_dim": of("embedding_dim"),
            "tables": tables,
            "features": features.iter().map(|name| json!({"name": name, "table": name})).collect::<Vec<_>>(),
            "contextual": contextual,
            "action_weights": config["action_weights"],
            "action_dim": dims(&format!("{INPUT}._action_encoder._action_embedding_table"))[1],
            "hidden_dim": dims(&format!("{INPUT}._content_embedding_mlp.0.weight"))[0],
            "norm_eps": eps("elsewhere"),
            "position": {
                "direction": "backward",
                "rows": dims(&format!("{POSITIONS}._position_embeddings_weight"))[0],
                "scale": "sqrt_model_dim"
            },
            "time": {
                "rows": dims(&format!("{POSITIONS}._timestamp_embeddings_weight"))[0],
                "divisor": 60.0,
                "clamp": clamp
            },
            "max_history": most("in.uih_lengths_per_user"), "max_candidates": most("in.num_candidates")
        },
        "output": {
            "postprocessor": {
                "kind": "timestamp_layer_norm", "periods": periods, "cycle": 6.28, "eps": eps("elsewhere")
            },
            "item_tower": {
                "features": features,
                "hidden_dim": dims("_item_embedding_mlp.0.weight")[0],
                "norm_eps": eps("elsewhere")
            },
            "prediction_hidden_dim": dims("_multitask_module._prediction_module.0.weight")[0],
            "prediction_norm_eps": eps("elsewhere"),
            "tasks": tasks
        }
    })
}

/// The users of the repository's ranking fixture.
pub fn ranking_requests(file: &HashMap<String, Tensor>) -> Vec<Request> {
    requests_of(&fixture_json("stu/dlrm_config.json"), file)
}

/// The users of a ranking fixture: histories, contextual values and candidates.
pub fn requests_of(config: &Value, file: &HashMap<String, Tensor>) -> Vec<Request> {
    let ids = |name: &str| -> Vec<u32> { integers(&file[name]).into_iter().map(|id| id as u32).collect() };
    let name = |value: &Value| value.as_str().unwrap().to_owned();
    // A feature has one name in histories and another among candidates.
    let uih = |pair: &Value| format!("in.uih.{}", name(&pair[0]));
    let cand = |pair: &Value| format!("in.cand.{}", name(&pair[1]));
    let (post, additional) = (&config["post_feature"], config["additional_features"].as_array().unwrap());
    let contextual = config["contextual_features"].as_array().unwrap();
    let (history, candidates) =
        (integers(&file["in.uih_lengths_per_user"]), integers(&file["in.num_candidates"]));
    let (mut event, mut candidate) = (0, 0);
    let mut values_taken = vec![0_usize; contextual.len()];
    (0..history.len())
        .map(|user| {
            let events = event..event + history[user] as usize;
            let given = candidate..candidate + candidates[user] as usize;
            (event, candidate) = (events.end, given.end);
            let contextual = contextual.iter().zip(&mut values_taken).map(|(pair, taken)| {
                let name = name(&pair[0]);
                let count = integers(&file[&format!("in.uih_len.{name}")])[user] as usize;
                *taken += count;
                ids(&format!("in.uih.{name}"))[*taken - count..*taken].to_vec()
            });
            Request {
                contextual: contextual.collect(),
                query_time: integers(&file[&cand(&config["time_feature"])])[given.start],
                events: Events {
                    items: ids(&uih(post))[events.clone()].to_vec(),
                    additional: additional
                        .iter()
                        .map(|pair| ids(&uih(pair))[events.clone()].to_vec())
                        .collect(),
                    actions: ids(&format!("in.uih.{}", name(&config["action_feature"])))[events.clone()]
                        .to_vec(),
                    times: integers(&file[&uih(&config["time_feature"])])[events].to_vec(),
                },
                candidates: Candidates {
                    items: ids(&cand(post))[given.clone()].to_vec(),
                    additional: additional
                        .iter()
                        .map(|pair| ids(&cand(pair))[given.clone()].to_vec())
                        .collect(),
                },
            }
        })
        .collect()
}
