//! What the tests read from `fixtures/hstu`: configurations, requests and layers.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, reason = "every test uses its own part")]

use std::collections::HashMap;

use beamline_model::checkpoint::tensors::Tensors as Opened;
use beamline_model::families::hstu::config::{StackConfig, Variant};
use beamline_model::families::hstu::inputs::{Candidates, Events, Request};
use candle_core::Tensor;
use serde_json::Value;

use super::hstu::*;

/// What the names of the tensors of `stu` begin with.
pub const STU_LAYERS: &str = "_stu_layers.";

pub fn research_config(folder: &str) -> Value {
    let config = fixture_json(&format!("{folder}/config.json"));
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

/// The layers of a case of `stu`: constants, tensors with the prefix [`STU_LAYERS`], and whether its last rows are targets.
pub fn stu_layers(case: &str, file: &HashMap<String, Tensor>) -> (StackConfig, Opened, bool) {
    let constants = &fixture_json("stu/config.json")["cases"][case];
    let divisor = integers(&file["in.max_seq_len"])[0] as usize;
    let mut config = stu_stack(12, 3, 2, 5, 6, divisor);
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

/// The users of the ranking fixture.
pub fn ranking_requests(file: &HashMap<String, Tensor>) -> Vec<Request> {
    let ids = |name: &str| -> Vec<u32> { integers(&file[name]).into_iter().map(|id| id as u32).collect() };
    let (history, candidates) =
        (integers(&file["in.uih_lengths_per_user"]), integers(&file["in.num_candidates"]));
    let (mut event, mut candidate) = (0, 0);
    let mut values_taken = [0usize; 2];
    (0..3)
        .map(|user| {
            let events = event..event + history[user] as usize;
            let given = candidate..candidate + candidates[user] as usize;
            (event, candidate) = (events.end, given.end);
            let contextual = ["user_id", "country"].into_iter().enumerate().map(|(index, name)| {
                let count = integers(&file[&format!("in.uih_len.{name}")])[user] as usize;
                values_taken[index] += count;
                ids(&format!("in.uih.{name}"))[values_taken[index] - count..values_taken[index]].to_vec()
            });
            Request {
                contextual: contextual.collect(),
                query_time: integers(&file["in.cand.item_query_time"])[given.start],
                events: Events {
                    items: ids("in.uih.video_id")[events.clone()].to_vec(),
                    additional: vec![ids("in.uih.owner_id")[events.clone()].to_vec()],
                    actions: ids("in.uih.action_weight")[events.clone()].to_vec(),
                    times: integers(&file["in.uih.action_ts"])[events].to_vec(),
                },
                candidates: Candidates {
                    items: ids("in.cand.item_video_id")[given.clone()].to_vec(),
                    additional: vec![ids("in.cand.item_owner_id")[given].to_vec()],
                },
            }
        })
        .collect()
}
