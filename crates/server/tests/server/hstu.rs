//! HSTU over HTTP: retrieval and ranking against the fixtures, the cache across visits, and what is refused.

use std::collections::HashMap;
use std::path::Path;

use candle_core::Tensor;
use serde_json::{Value, json};
use tempfile::TempDir;

use crate::harness::Server;
use crate::hstu_models::{
    ResearchSizes, checkpoint, dlrm, fixture, fixture_json, integers, random_tensors, research, state, values,
};

const RETRIEVED: f64 = 2e-5;
const RANKED: f64 = 3e-5;

/// Writes a catalog whose items are the rows of a table.
fn catalog(directory: &Path, rows: impl Iterator<Item = usize>) {
    let line = |row| json!({"item_id": format!("i{row}"), "sid": [row], "tags": [if row % 2 == 0 { "even" } else { "odd" }]});
    let lines: Vec<String> = rows.map(|row| line(row).to_string()).collect();
    std::fs::write(directory.join("catalog.jsonl"), lines.join("\n")).unwrap();
}

fn sizes(folder: &str) -> ResearchSizes {
    let config = fixture_json(&format!("{folder}/config.json"));
    let of = |name: &str| config[name].as_u64().unwrap() as usize;
    ResearchSizes {
        items: of("num_items"),
        most: of("max_sequence_len"),
        positions: of("max_sequence_len") + of("gr_output_length") + 1,
        width: of("embedding_dim"),
        layers: of("num_blocks"),
        heads: of("num_heads"),
        key: of("attention_dim"),
        value: of("linear_dim"),
    }
}

fn research_checkpoint() -> (TempDir, HashMap<String, Tensor>) {
    let (file, sizes) = (fixture("research/fp32.safetensors"), sizes("research"));
    let directory = checkpoint(&research(&sizes), &state(&file, ""));
    catalog(directory.path(), 1..=sizes.items);
    (directory, file)
}

fn dlrm_checkpoint() -> (TempDir, HashMap<String, Tensor>) {
    let file = fixture("stu/dlrm_hstu_fp32.safetensors");
    let directory = checkpoint(&dlrm("model_dim"), &state(&file, ""));
    catalog(directory.path(), 0..50);
    (directory, file)
}

fn events(ids: &[i64], times: &[i64]) -> Vec<Value> {
    ids.iter().zip(times).map(|(id, time)| json!({"item_id": format!("i{id}"), "timestamp": time})).collect()
}

#[test]
fn retrieval_is_the_reference() {
    let (directory, file) = research_checkpoint();
    let server = Server::start_at(directory.path(), &[]);
    let models = server.get("/v1/models").ok();
    assert_eq!(models["models"][0]["family"], "hstu");
    assert_eq!(models["models"][0]["tasks"], json!(["recommend"]));
    for (user, length) in integers(&file["in.past_lengths"]).into_iter().enumerate() {
        let row = |name: &str| integers(&file[name].get(user).unwrap());
        let (n, ids, times) = (length as usize, row("in.past_ids"), row("in.timestamps"));
        let mut request = json!({
            "history": events(&ids[..n], &times[..n]), "query_time": times[n], "num_items": 10,
            "filters": {"exclude_seen": true},
        });
        let answer = server.recommend(&request).ok();
        let found: Vec<String> = answer["items"]
            .as_array()
            .unwrap()
            .iter()
            .map(|item| item["item_id"].as_str().unwrap().into())
            .collect();
        let expected: Vec<String> = row("out.topk_ids_filtered").iter().map(|id| format!("i{id}")).collect();
        assert_eq!(found, expected);
        let scores = values(&file["out.topk_scores_filtered"].get(user).unwrap());
        for (item, expected) in answer["items"].as_array().unwrap().iter().zip(scores) {
            assert!((item["score"].as_f64().unwrap() - expected).abs() < RETRIEVED);
        }
        assert_eq!(answer["normalization"], Value::Null);
        // A filter is part of the search: as many items as before, all of them allowed.
        request["filters"]["require_tags"] = json!(["even"]);
        let even = server.recommend(&request).ok();
        let rows = even["items"].as_array().unwrap().iter().map(|item| item["sid"][0].as_u64().unwrap());
        assert_eq!(rows.filter(|row| row % 2 == 0).count(), 10);
        request["filters"] = json!({"allow_items": []});
        assert_eq!(server.recommend(&request).ok()["reason"], "filters_leave_nothing");
    }
}

#[test]
fn a_returning_user_is_answered_from_cached_pages_with_the_same_bits() {
    let sizes = ResearchSizes {
        items: 300,
        most: 200,
        positions: 211,
        width: 16,
        layers: 2,
        heads: 2,
        key: 8,
        value: 8,
    };
    let config = research(&sizes);
    let directory = checkpoint(&config, &random_tensors(&config, 5));
    catalog(directory.path(), 1..=300);
    let server = Server::start_at(directory.path(), &[]);
    let ids: Vec<i64> = (0..150).map(|at| at * 7 % 300 + 1).collect();
    let times: Vec<i64> = (0..150).map(|at| 1_700_000_000 + at * at * 60).collect();
    let visit = |n: usize, tenant: &str| {
        let request = json!({
            "user_id": "u", "history": events(&ids[..n], &times[..n]), "query_time": times[n] - 1, "num_items": 20, "tenant": tenant,
        });
        let answer = server.recommend(&request).ok();
        (answer["items"].clone(), answer["usage"]["cached_tokens"].as_u64().unwrap())
    };
    assert_eq!(visit(100, "a").1, 0);
    // Row 99 looked at the time of the query; the rows before it did not.
    let (warm, cached) = visit(105, "a");
    assert_eq!(cached, 96);
    let (cold, none) = visit(105, "b");
    assert_eq!((&warm, none), (&cold, 0));
    // The event that follows row 95 is part of what its page is found by.
    let mut other = times.clone();
    other[96] += 1;
    let request =
        json!({"history": events(&ids[..105], &other[..105]), "query_time": times[105] - 1, "tenant": "a"});
    assert_eq!(server.recommend(&request).ok()["usage"]["cached_tokens"], 64);
    let warmed = server
        .post(
            "/v1/warm",
            &json!({"history": events(&ids[..140], &times[..140]), "query_time": 1_800_000_000}),
        )
        .ok();
    assert_eq!(warmed["usage"]["context_tokens"], 140);
    assert_eq!(visit(141, "c").1, 0, "another tenant");
}

/// A request to rank of one user of the fixture, and what is expected.
fn ranking(file: &HashMap<String, Tensor>, user: usize) -> (Value, Vec<Vec<f64>>) {
    let ints = |name: &str| integers(&file[name]);
    let (lengths, counts) = (ints("in.uih_lengths_per_user"), ints("in.num_candidates"));
    let before = |lengths: &[i64]| lengths[..user].iter().sum::<i64>() as usize;
    let events = before(&lengths)..before(&lengths) + lengths[user] as usize;
    let given = before(&counts)..before(&counts) + counts[user] as usize;
    let history: Vec<Value> = events
        .map(|at| {
            json!({
                "item_id": format!("i{}", ints("in.uih.video_id")[at]), "action": ints("in.uih.action_weight")[at].to_string(),
                "timestamp": ints("in.uih.action_ts")[at], "features": {"owner_id": ints("in.uih.owner_id")[at]},
            })
        })
        .collect();
    let candidates: Vec<Value> = given
        .clone()
        .map(|at| {
            json!({
                "item_id": format!("i{}", ints("in.cand.item_video_id")[at]),
                "features": {"owner_id": ints("in.cand.item_owner_id")[at]},
            })
        })
        .collect();
    let mut features = serde_json::Map::new();
    for name in ["user_id", "country"] {
        let lengths = ints(&format!("in.uih_len.{name}"));
        let start = before(&lengths);
        features.insert(
            name.into(),
            json!(ints(&format!("in.uih.{name}"))[start..start + lengths[user] as usize]),
        );
    }
    let all = values(&file["out.preds"]);
    let total = all.len() / 3;
    let expected = given.clone().map(|at| (0..3).map(|task| all[task * total + at]).collect()).collect();
    let query_time = ints("in.cand.item_query_time")[given.start];
    (
        json!({"history": history, "candidates": candidates, "features": features, "query_time": query_time}),
        expected,
    )
}

#[test]
fn ranking_is_the_reference() {
    let (directory, file) = dlrm_checkpoint();
    let server = Server::start_at(directory.path(), &[]);
    assert_eq!(server.get("/v1/models").ok()["models"][0]["tasks"], json!(["rank"]));
    for user in 0..3 {
        let (mut request, expected) = ranking(&file, user);
        let answer = server.post("/v1/rank", &request).ok();
        for (candidate, expected) in answer["candidates"].as_array().unwrap().iter().zip(&expected) {
            for (task, expected) in ["click", "like", "watch"].into_iter().zip(expected) {
                let found = candidate["predictions"][task].as_f64().unwrap();
                assert!((found - expected).abs() < RANKED, "{task}: {found} against {expected}");
            }
            assert_eq!((&candidate["score"], &candidate["rank"]), (&Value::Null, &Value::Null));
        }
        // With weights there is a score, and the best comes first; what is predicted stays the same.
        request["task_weights"] = json!({"click": 2.0, "watch": -0.5});
        let ordered = server.post("/v1/rank", &request).ok();
        let scores: Vec<f64> =
            ordered["candidates"].as_array().unwrap().iter().map(|c| c["score"].as_f64().unwrap()).collect();
        assert!(scores.windows(2).all(|pair| pair[0] >= pair[1]), "{scores:?}");
        for candidate in ordered["candidates"].as_array().unwrap() {
            let same = answer["candidates"]
                .as_array()
                .unwrap()
                .iter()
                .find(|c| c["item_id"] == candidate["item_id"]);
            assert_eq!(same.unwrap()["predictions"], candidate["predictions"]);
        }
    }
    let (mut request, _) = ranking(&file, 0);
    request["candidates"].as_array_mut().unwrap().push(json!({"item_id": "nothing"}));
    assert_eq!(server.post("/v1/rank", &request).ok()["unknown_candidates"], json!(["nothing"]));
}

#[test]
fn candidates_in_several_micro_batches_are_predicted_as_alone() {
    let mut config = dlrm("rows");
    config["input"]["tables"][0]["rows"] = json!(700);
    config["input"]["max_candidates"] = json!(1000);
    let directory = checkpoint(&config, &random_tensors(&config, 3));
    catalog(directory.path(), 0..700);
    let server = Server::start_at(directory.path(), &[]);
    let event = |at: usize| json!({"item_id": format!("i{at}"), "action": "1", "timestamp": 1_700_000_000 + at, "features": {"owner_id": at % 20}});
    let candidate = |at: usize| json!({"item_id": format!("i{at}"), "features": {"owner_id": at % 20}});
    let rank = |candidates: Vec<Value>| {
        let request = json!({
            "history": (0..40).map(event).collect::<Vec<_>>(), "query_time": 1_700_000_100,
            "features": {"user_id": [1], "country": [2]}, "candidates": candidates,
        });
        server.post("/v1/rank", &request).ok()
    };
    let all = rank((0..700).map(candidate).collect());
    assert_eq!(all["usage"]["steps"], 4, "the history, and three micro-batches");
    assert_eq!(all["candidates"].as_array().unwrap().len(), 700);
    for at in [0, 255, 256, 699] {
        assert_eq!(rank(vec![candidate(at), candidate(7)])["candidates"][0], all["candidates"][at]);
    }
}

#[test]
fn a_model_with_contextual_rows_answers_under_load_as_alone() {
    let mut config = dlrm("rows");
    config["stack"]["mask"]["contextual_len"] = json!(3);
    config["input"]["max_history"] = json!(5000);
    let directory = checkpoint(&config, &random_tensors(&config, 3));
    catalog(directory.path(), 0..50);
    let server = Server::start_at(directory.path(), &["--kv-memory", "64MiB"]);
    let rank = |user: usize, events: usize| {
        let event = |at: usize| {
            let item = (at * 7 + user) % 49;
            json!({"item_id": format!("i{item}"), "action": "1", "timestamp": 1_700_000_000 + at, "features": {"owner_id": item % 20}})
        };
        let candidates: Vec<Value> =
            (0..5).map(|at| json!({"item_id": format!("i{at}"), "features": {"owner_id": at}})).collect();
        server.post(
            "/v1/rank",
            &json!({
                "history": (0..events).map(event).collect::<Vec<_>>(), "query_time": 1_700_009_000, "timeout_ms": 60_000,
                "features": {"user_id": [user], "country": [2]}, "candidates": candidates,
            }),
        )
    };
    let alone: Vec<Value> = (0..8).map(|user| rank(user, 1500).ok()["candidates"].clone()).collect();
    std::thread::scope(|scope| {
        let threads: Vec<_> = (0..8)
            .map(|user| {
                let rank = &rank;
                scope.spawn(move || rank(user, 1500).ok()["candidates"].clone())
            })
            .collect();
        for (thread, alone) in threads.into_iter().zip(&alone) {
            assert_eq!(thread.join().unwrap(), *alone);
        }
    });
    // More than a step takes: refused by name, with what to do, and nobody else is harmed.
    let error = rank(0, 4200).fails(422, "context_too_long");
    assert!(error["message"].as_str().unwrap().contains("--max-step-tokens"), "{error}");
    assert_eq!(rank(0, 1500).ok()["candidates"], alone[0]);
}

#[test]
fn a_decoder_ranks_by_exact_log_probability() {
    let server = Server::start("qwen3-untied", &["--max-beam-width", "64"]);
    for normalization in ["full_vocab", "allowed_set"] {
        rank_and_search_agree(&server, normalization);
    }
}

fn rank_and_search_agree(server: &Server, normalization: &str) {
    let everything =
        json!({"history": [], "num_items": 64, "beam_width": 64, "normalization": normalization});
    let slate = server.recommend(&everything).ok();
    let items = slate["items"].as_array().unwrap();
    // More of them than fit into one beam, and in another order.
    let list =
        std::fs::read_to_string(crate::harness::fixture("qwen3-untied").join("catalog.jsonl")).unwrap();
    let ids = list.lines().map(|line| serde_json::from_str::<Value>(line).unwrap()["item_id"].clone());
    let candidates: Vec<Value> = ids.map(|id| json!({"item_id": id})).collect();
    assert!(candidates.len() > 64);
    let request = json!({"history": [], "candidates": candidates, "normalization": normalization});
    let ranked = server.post("/v1/rank", &request).ok();
    let found = ranked["candidates"].as_array().unwrap();
    assert_eq!(found.len(), candidates.len());
    for item in items {
        let same = found.iter().find(|candidate| candidate["item_id"] == item["item_id"]).unwrap();
        assert_eq!(same["score"], item["score"]);
        assert_eq!(same["predictions"]["log_probability"], item["score"]);
    }
    let scores: Vec<f64> = found.iter().map(|candidate| candidate["score"].as_f64().unwrap()).collect();
    assert!(scores.windows(2).all(|pair| pair[0] >= pair[1]));
}

#[test]
fn wrong_inputs_are_named() {
    let (directory, file) = research_checkpoint();
    let server = Server::start_at(directory.path(), &[]);
    let recommend = |body: Value| server.recommend(&body);
    let event = |id: u32, time: i64| json!({"item_id": format!("i{id}"), "timestamp": time});
    let good = json!({"history": [event(1, 10), event(2, 20)], "query_time": 30});
    recommend(good.clone()).ok();
    let with = |field: &str, value: Value| {
        let mut body = good.clone();
        body[field] = value;
        body
    };
    let error = recommend(with("history", json!([event(1, 20), event(2, 10)]))).fails(422, "invalid_value");
    assert!(
        error["message"].as_str().unwrap().contains("runs backwards: event 1 is at 10, event 0"),
        "{error}"
    );
    let error = recommend(with("query_time", Value::Null)).fails(422, "invalid_value");
    assert_eq!(error["param"], "query_time");
    let error = recommend(with("history", json!([{"item_id": "i1"}]))).fails(422, "invalid_value");
    assert_eq!(error["param"], "history.timestamp");
    recommend(with("history", json!([]))).fails(422, "empty_history");
    recommend(with("history", json!([{"item_id": "stranger", "timestamp": 1}]))).fails(422, "no_known_items");
    recommend(with("query_time", json!(i64::MAX))).fails(422, "invalid_value");
    recommend(with("features", json!({"country": [1]}))).fails(422, "invalid_value");
    recommend(json!({"token_ids": [1, 2]})).fails(400, "invalid_request");
    let rank = json!({"history": [event(1, 10)], "query_time": 30, "candidates": [{"item_id": "i3"}]});
    let error = server.post("/v1/rank", &rank).fails(422, "task_not_supported");
    assert!(error["message"].as_str().unwrap().contains("POST /v1/recommend"), "{error}");
    // An item beyond the model's table is refused with the catalog.
    let lines = r#"{"item_id": "far", "sid": [4000]}"#;
    let headers = [("content-type", "application/x-ndjson")];
    server.call("PUT", "/v1/models/default/catalog", Some(lines), &headers).fails(422, "catalog_refused");
    drop((server, file));

    let (directory, file) = dlrm_checkpoint();
    let server = Server::start_at(directory.path(), &[]);
    let (good, _) = ranking(&file, 0);
    let fails = |change: &dyn Fn(&mut Value), kind: &str, param: &str| {
        let mut body = good.clone();
        change(&mut body);
        let error = server.post("/v1/rank", &body).fails(422, kind);
        assert_eq!(error["param"], param, "{error}");
    };
    fails(&|b| b["history"][1]["action"] = Value::Null, "invalid_value", "history.action");
    fails(&|b| b["history"][1]["action"] = json!("click"), "invalid_value", "history.action");
    fails(&|b| b["history"][1]["features"] = Value::Null, "invalid_value", "history.features");
    fails(&|b| b["candidates"][0]["features"] = json!({"colour": 1}), "invalid_value", "candidates.features");
    fails(&|b| b["candidates"] = json!([]), "invalid_value", "candidates");
    fails(&|b| b["candidates"] = json!([{"item_id": "x"}]), "no_known_candidates", "candidates");
    fails(&|b| b["task_weights"] = json!({"share": 1.0}), "invalid_value", "task_weights");
    fails(
        &|b| b["candidates"] = (0..4097).map(|at| json!({"item_id": at.to_string()})).collect(),
        "limit_exceeded",
        "candidates",
    );
    fails(
        &|b| {
            let given = (0..50).map(|at| json!({"item_id": format!("i{at}"), "features": {"owner_id": 1}}));
            let twice: Vec<Value> = given.clone().chain(given).collect();
            b["candidates"] = twice.into();
        },
        "invalid_value",
        "candidates",
    );
    server.recommend(&json!({"history": [], "query_time": 1})).fails(422, "task_not_supported");
}

#[test]
fn a_configuration_that_leaves_a_constant_to_be_guessed_is_refused() {
    let sizes = sizes("research");
    let (file, mut config) = (fixture("research/fp32.safetensors"), research(&sizes));
    config["stack"].as_object_mut().unwrap().remove("attention_divisor");
    let directory = checkpoint(&config, &state(&file, ""));
    catalog(directory.path(), 1..=sizes.items);
    let output = crate::harness::beamline()
        .args(["serve", "--listen", "127.0.0.1:0", "--checkpoint"])
        .arg(directory.path())
        .output()
        .unwrap();
    assert!(!output.status.success());
    let said =
        String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout);
    assert!(said.contains("attention_divisor"), "{said}");
}

/// Requests of a kind: path, body, and the part of the answer that must always be the same.
type Ask = (&'static str, Value, &'static str);

#[test]
fn retrieval_ranking_and_decoding_share_a_server_and_leave_nothing_behind() {
    let root = crate::root::Root::new();
    let large = ResearchSizes {
        items: 300,
        most: 200,
        positions: 211,
        width: 16,
        layers: 2,
        heads: 2,
        key: 8,
        value: 8,
    };
    let retrieval = research(&large);
    let made = |name: &str, config: &Value, rows: std::ops::Range<usize>| {
        let directory = root.path().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        crate::hstu_models::write(&directory, config, &random_tensors(config, 9));
        catalog(&directory, rows);
    };
    made("get", &retrieval, 1..301);
    made("rank", &dlrm("rows"), 0..50);
    let server = root.serve(&["--threads", "2", "--max-running", "4"]);
    for name in ["get", "rank"] {
        server.post(&format!("/v1/models/{name}/load"), &json!({})).ok();
    }

    let mut asks: Vec<Ask> =
        crate::root::bodies().into_iter().take(6).map(|body| ("/v1/recommend", body, "items")).collect();
    for user in 0..6_i64 {
        let (ids, times): (Vec<i64>, Vec<i64>) =
            (0..40 + 25 * user).map(|at| ((at * 11 + user) % 300 + 1, 1_700_000_000 + 97 * at)).unzip();
        let body = json!({"model": "get", "history": events(&ids, &times), "query_time": 1_800_000_000, "user_id": user.to_string()});
        asks.push(("/v1/recommend", body, "items"));
        let event = |at: i64| json!({"item_id": format!("i{}", at % 50), "action": "3", "timestamp": 1_700_000_000 + at, "features": {"owner_id": 1}});
        let candidates: Vec<Value> = (0..50)
            .map(|at| json!({"item_id": format!("i{at}"), "features": {"owner_id": at % 20}}))
            .collect();
        let body = json!({
            "model": "rank", "history": (0..20 + user).map(event).collect::<Vec<_>>(), "query_time": 1_700_000_900,
            "features": {"user_id": [user], "country": []}, "candidates": candidates,
        });
        asks.push(("/v1/rank", body, "candidates"));
    }
    let alone: Vec<Value> =
        asks.iter().map(|(path, body, part)| server.post(path, body).ok()[*part].clone()).collect();
    std::thread::scope(|scope| {
        for client in 0..4 {
            let (server, asks, alone) = (&server, &asks, &alone);
            scope.spawn(move || {
                let mut random = crate::harness::Random(client);
                for _ in 0..150 {
                    let which = random.below(asks.len());
                    let (path, body, part) = &asks[which];
                    let mut body = body.clone();
                    match random.below(8) {
                        // A client that hangs up.
                        0 => {
                            let text = body.to_string();
                            let head = format!(
                                "POST {path} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {}",
                                text.len()
                            );
                            drop(server.send_raw(&head, &text));
                        }
                        // One that has no time.
                        1 => {
                            body["timeout_ms"] = json!(1);
                            let answer = server.post(path, &body);
                            match answer.status {
                                200 => assert_eq!(answer.json()[*part], alone[which]),
                                // Others are before it, so it is known at once that it would be late.
                                429 => drop(answer.fails(429, "overloaded")),
                                _ => drop(answer.fails(504, "deadline_exceeded")),
                            }
                        }
                        _ => assert_eq!(server.post(path, &body).ok()[*part], alone[which]),
                    }
                }
            });
        }
    });
    server.wait_for("the end of all requests", |server| {
        server.metric("beamline_requests_running", "") == 0.0
            && server.metric("beamline_pages", "referenced") == 0.0
    });
    assert!(server.metric("beamline_requests_total", "rank") > 0.0);
    server.still_serves();
}
