//! What a client asks for and gets.

use std::collections::HashMap;

use serde_json::{Value, json};

use crate::harness::{Server, fixture, history, ids, items};

const CASE: &str = "qwen3-untied";

fn sids(name: &str) -> HashMap<String, Value> {
    let text = std::fs::read_to_string(fixture(name).join("catalog.jsonl")).unwrap();
    let record = |line: &str| {
        let record: Value = serde_json::from_str(line).unwrap();
        (record["item_id"].as_str().unwrap().to_owned(), record["sid"].clone())
    };
    text.lines().map(record).collect()
}

#[test]
fn an_answer_has_everything_that_is_promised() {
    let server = Server::start(CASE, &["--name", "shop"]);
    let (catalog, sids) = (items(CASE), sids(CASE));
    let mut past = catalog[..3].to_vec();
    past.insert(1, "gone".into());
    past.push("gone".into());
    let body = json!({
        "user_id": "u1",
        "history": past.iter().map(|id| json!({"item_id": id, "action": "click", "timestamp": 1_760_000_000})).collect::<Vec<_>>(),
        "num_items": 20, "beam_width": 128, "model": "shop", "normalization": "full_vocab",
        "filters": {"exclude_items": [catalog[5], "never heard of"], "exclude_seen": true, "require_tags": [],
                    "forbid_tags": ["no such tag"]},
        "timeout_ms": 20_000, "allow_degraded": true, "strict_history": false, "tenant": "t"
    });
    let raw =
        server.post_text("/v1/recommend", &body.to_string(), "application/json", &[("x-request-id", "abc")]);
    let answer = raw.ok();
    assert_eq!(answer["request_id"], "abc");
    assert_eq!(raw.headers["x-request-id"], "abc");
    let timing = raw.headers["server-timing"].to_str().unwrap();
    assert!(
        ["queue;dur=", "prefill;dur=", "decode;dur=", "total;dur="].iter().all(|part| timing.contains(part))
    );
    assert_eq!(answer["model"]["name"], "shop");
    let sha256 = answer["model"]["sha256"].as_str().unwrap();
    assert!(sha256.len() == 64 && sha256.starts_with(answer["model"]["version"].as_str().unwrap()));
    assert_eq!(answer["catalog_version"].as_str().unwrap().len(), 16);
    assert_eq!(answer["unknown_items"], json!(["gone"]));
    assert_eq!((&answer["items_requested"], &answer["items_returned"]), (&json!(20), &json!(20)));
    assert_eq!(
        (&answer["dropped_history"], &answer["degraded"], &answer["reason"]),
        (&json!(0), &Value::Null, &Value::Null)
    );
    assert_eq!(answer["normalization"], "full_vocab");
    // 27 tokens of prompt, 5 per item.
    assert_eq!(answer["usage"]["context_tokens"], 27 + 3 * 5);
    assert_eq!(answer["usage"]["beam_width"], 126);
    assert_eq!(answer["usage"]["steps"], 3);
    for stage in ["queue", "prefill", "decode", "total"] {
        assert!(answer["timings_ms"][stage].as_f64().is_some_and(|ms| ms >= 0.0));
    }
    let found = answer["items"].as_array().unwrap();
    for (item, rank) in found.iter().zip(1..) {
        let id = item["item_id"].as_str().unwrap();
        assert_eq!(item["rank"], rank);
        assert_eq!(item["sid"], sids[id]);
        assert!(!past.iter().any(|seen| seen == id) && id != catalog[5]);
    }
    assert!(found.windows(2).all(|pair| pair[0]["score"].as_f64() >= pair[1]["score"].as_f64()));
}

#[test]
fn ids_are_made_for_requests_without() {
    let server = Server::start(CASE, &[]);
    let body = json!({"history": []}).to_string();
    let made = |given: &[(&str, &str)]| {
        let raw = server.post_text("/v1/recommend", &body, "application/json", given);
        let id = raw.ok()["request_id"].as_str().unwrap().to_owned();
        assert_eq!(raw.headers["x-request-id"], id);
        id
    };
    let ids = [
        made(&[]),
        made(&[]),
        made(&[("x-request-id", "has space")]),
        made(&[("x-request-id", &"x".repeat(200))]),
    ];
    assert!(ids.iter().all(|id| id.len() == 25), "{ids:?}");
    assert_ne!(ids[0], ids[1]);
}

#[test]
fn history_token_ids_and_prompt_are_three_ways_to_say_the_same() {
    let server = Server::start(CASE, &[]);
    let cases = crate::harness::read_json(&fixture(CASE).join("cases.json"));
    let prompt = cases["prompts"].as_array().unwrap().iter().find(|prompt| prompt["name"] == "h7").unwrap();
    let past: Vec<String> = serde_json::from_value(prompt["history"].clone()).unwrap();
    let by_history = server.recommend(&json!({"history": history(&past)})).ok();
    let by_prompt = server.recommend(&json!({"prompt": prompt["prompt_text"]})).ok();
    assert_eq!(by_history["items"], by_prompt["items"]);
    assert_eq!(by_history["usage"]["context_tokens"], by_prompt["usage"]["context_tokens"]);
    let by_tokens = server.recommend(&json!({"token_ids": [1, 2, 3]})).ok();
    assert_eq!(by_tokens["usage"]["context_tokens"], 3);
    assert_eq!(ids(&by_tokens).len(), 10);
}

#[test]
fn an_empty_history_is_a_cold_start_and_a_history_of_strangers_is_an_error() {
    let server = Server::start(CASE, &[]);
    assert_eq!(ids(&server.recommend(&json!({"history": []})).ok()).len(), 10);
    let strangers = history(&["x".to_owned(), "y".to_owned()]);
    let error = server.recommend(&json!({"history": strangers})).fails(422, "no_known_items");
    assert_eq!(error["param"], "history");
    assert!(error["message"].as_str().unwrap().contains("\"x\", \"y\""));
}

#[test]
fn strict_history_names_the_strangers() {
    let server = Server::start(CASE, &[]);
    let mut past = items(CASE)[..2].to_vec();
    assert_eq!(
        server.recommend(&json!({"history": history(&past), "strict_history": true})).ok()["unknown_items"],
        json!([])
    );
    past.push("stranger".into());
    let error = server
        .recommend(&json!({"history": history(&past), "strict_history": true}))
        .fails(422, "unknown_items");
    assert!(error["message"].as_str().unwrap().contains("\"stranger\""));
}

#[test]
fn filters_hold_and_what_they_leave_is_returned() {
    let server = Server::start(CASE, &[]);
    let catalog = items(CASE);
    let all = server.recommend(&json!({"history": [], "num_items": 130, "beam_width": 130})).ok();
    assert_eq!(all["items_returned"], 130);
    assert_eq!(all["reason"], Value::Null);

    let allowed = json!({"history": [], "filters": {"allow_items": [catalog[7], catalog[9], "unknown"]}});
    let few = server.recommend(&allowed).ok();
    let mut found = ids(&few);
    found.sort();
    let mut expected = vec![catalog[7].clone(), catalog[9].clone()];
    expected.sort();
    assert_eq!(found, expected);
    assert_eq!((&few["reason"], &few["items_returned"]), (&json!("fewer_items_than_requested"), &json!(2)));
    // A filter changes which items come, not what they score.
    let score = |answer: &Value, id: &str| {
        answer["items"].as_array().unwrap().iter().find(|item| item["item_id"] == id).unwrap()["score"]
            .clone()
    };
    assert_eq!(score(&few, &catalog[7]), score(&all, &catalog[7]));

    for filters in [
        json!({"exclude_items": catalog}),
        json!({"allow_items": []}),
        json!({"require_tags": ["no such tag"]}),
        json!({"allow_items": [catalog[7]], "exclude_items": [catalog[7]]}),
    ] {
        let none = server.recommend(&json!({"history": [], "filters": filters})).ok();
        assert_eq!((&none["items"], &none["reason"]), (&json!([]), &json!("filters_leave_nothing")));
        assert_eq!(none["usage"]["steps"], 0);
    }
}

#[test]
fn tags_select() {
    let directory = tempfile::tempdir().unwrap();
    let catalog = directory.path().join("tagged.jsonl");
    let lines: Vec<String> = std::fs::read_to_string(fixture(CASE).join("catalog.jsonl"))
        .unwrap()
        .lines()
        .enumerate()
        .map(|(index, line)| {
            let mut record: Value = serde_json::from_str(line).unwrap();
            record["tags"] = json!([
                if index % 2 == 0 { "even" } else { "odd" },
                if index % 3 == 0 { "third" } else { "rest" }
            ]);
            record["title"] = json!(format!("Item {index}"));
            record.to_string()
        })
        .collect();
    std::fs::write(&catalog, lines.join("\n")).unwrap();
    let server = Server::start(CASE, &["--catalog", catalog.to_str().unwrap()]);
    let ask = |filters: Value| {
        let answer = server
            .recommend(&json!({"history": [], "num_items": 130, "beam_width": 130, "filters": filters}))
            .ok();
        let title = |item: &Value| item["title"].as_str().unwrap()[5..].parse::<usize>().unwrap();
        answer["items"].as_array().unwrap().iter().map(title).collect::<Vec<usize>>()
    };
    let even_thirds = ask(json!({"require_tags": ["even", "third"]}));
    assert!(even_thirds.len() == 22 && even_thirds.iter().all(|index| index % 6 == 0));
    let neither = ask(json!({"forbid_tags": ["even", "third"]}));
    assert!(neither.len() == 43 && neither.iter().all(|index| index % 2 == 1 && index % 3 != 0));
}

#[test]
fn a_forced_prefix_is_kept_whichever_way_it_is_written() {
    let server = Server::start(CASE, &[]);
    let sids = sids(CASE);
    let codes = server.recommend(&json!({"history": [], "sid_prefix": [4], "num_items": 50})).ok();
    let with_prefix = sids.values().filter(|sid| sid[0] == 4).count();
    assert_eq!(codes["items_returned"], with_prefix);
    assert!(codes["items"].as_array().unwrap().iter().all(|item| item["sid"][0] == 4));
    assert_eq!(codes["usage"]["context_tokens"], 27 + 1);
    let tokens = server.recommend(&json!({"history": [], "sid_prefix": ["<s_a_4>"], "num_items": 50})).ok();
    assert_eq!(tokens["items"], codes["items"]);

    // The forced tokens are context: asking for them as tokens gives the same scores.
    let two = codes["items"][0]["sid"].clone();
    let deep = server.recommend(&json!({"history": [], "sid_prefix": [two[0], two[1]]})).ok();
    assert!(deep["items"].as_array().unwrap().iter().all(|item| item["sid"][1] == two[1]));

    server.recommend(&json!({"history": [], "sid_prefix": [4, 99]})).fails(422, "unknown_sid_prefix");
    server.recommend(&json!({"history": [], "sid_prefix": ["<s_b_4>"]})).fails(422, "unknown_sid_prefix");
    // A whole SID leaves nothing to generate.
    let error = server.recommend(&json!({"history": [], "sid_prefix": two})).fails(422, "invalid_value");
    assert_eq!(error["param"], "sid_prefix");
}

#[test]
fn a_forced_prefix_works_where_tokens_follow_the_levels() {
    let server = Server::start("qwen2-minionerec", &[]);
    let any = server.recommend(&json!({"history": []})).ok();
    let prefix = any["items"][0]["sid"][0].clone();
    let forced = server.recommend(&json!({"history": [], "sid_prefix": [prefix]})).ok();
    assert!(forced["items"].as_array().unwrap().iter().all(|item| item["sid"][0] == prefix));
    // Two levels and the two tail tokens.
    assert_eq!(forced["usage"]["steps"], 4);
}

#[test]
fn a_warm_context_is_there_when_the_user_comes() {
    let server = Server::start(CASE, &[]);
    let past = history(&items(CASE)[..40]);
    let warmed = server.post("/v1/warm", &json!({"user_id": "u", "history": past})).ok();
    assert_eq!(warmed["usage"]["context_tokens"], 27 + 40 * 5);
    assert_eq!(warmed["usage"]["cached_tokens"], 0);
    assert_eq!(warmed["usage"]["beam_width"], 0);
    let answer = server.recommend(&json!({"user_id": "u", "history": past})).ok();
    assert!(answer["usage"]["cached_tokens"].as_u64().unwrap() >= 192, "{answer}");
    let again = server.post("/v1/warm", &json!({"user_id": "u", "history": past})).ok();
    assert!(again["usage"]["cached_tokens"].as_u64().unwrap() >= 192);
    server.post("/v1/warm", &json!({"history": past, "num_items": 3})).fails(400, "invalid_request");
}

#[test]
fn items_that_share_a_sid_come_in_catalog_order_and_the_list_is_cut() {
    let case = "qwen3-collisions";
    let server = Server::start(case, &[]);
    let order = items(case);
    let place = |id: &str| order.iter().position(|other| other == id).unwrap();
    for num_items in [1, 5, 9] {
        let answer = server.recommend(&json!({"history": [], "num_items": num_items, "beam_width": 20})).ok();
        let found = answer["items"].as_array().unwrap();
        assert_eq!(found.len(), num_items);
        for pair in found.windows(2).filter(|pair| pair[0]["sid"] == pair[1]["sid"]) {
            assert_eq!(pair[0]["score"], pair[1]["score"]);
            assert!(
                place(pair[0]["item_id"].as_str().unwrap()) < place(pair[1]["item_id"].as_str().unwrap())
            );
        }
    }
}

#[test]
fn a_beam_width_for_each_level_is_kept_to_level_by_level() {
    let server = Server::start(CASE, &[]);
    let past = history(&items(CASE)[..9]);
    let ask = |more: Value| {
        let mut request = json!({"history": past, "num_items": 9});
        request.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        server.recommend(&request).ok()
    };
    let one = ask(json!({"beam_width": 40}));
    let equal = ask(json!({"beam_widths": [40, 40, 40]}));
    assert_eq!(
        (&one["items"], &one["usage"]["beam_width"]),
        (&equal["items"], &equal["usage"]["beam_width"])
    );

    let narrow = ask(json!({"beam_widths": [2, 3, 9]}));
    assert_eq!(narrow["usage"]["beam_width"], 9);
    let found = narrow["items"].as_array().unwrap();
    let prefixes = |levels: usize| {
        let sids = found.iter().map(|item| item["sid"].as_array().unwrap()[..levels].to_vec());
        let mut all: Vec<_> = sids.collect();
        all.dedup();
        all.sort_by_key(|prefix| json!(prefix).to_string());
        all.dedup();
        all.len()
    };
    assert!(!found.is_empty() && prefixes(1) <= 2 && prefixes(2) <= 3, "{narrow}");
    // Every score is that of the same item in an exhaustive answer.
    let all = ask(json!({"beam_width": 130, "num_items": 130}));
    for item in found {
        let same = all["items"].as_array().unwrap().iter().find(|other| other["item_id"] == item["item_id"]);
        let difference = item["score"].as_f64().unwrap() - same.unwrap()["score"].as_f64().unwrap();
        assert_eq!(difference, 0.0, "{item}");
    }
    let first = found[0]["sid"][0].clone();
    let after = ask(json!({"beam_widths": [4, 9], "sid_prefix": [first]}));
    assert!(after["items_returned"].as_u64() > Some(0), "{after}");
}
