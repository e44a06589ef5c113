//! Semantic IDs from HSTU layers over HTTP, against a plain PyTorch reference that keeps no cache
//! (`weights/hstu/reference.py`, which wrote the fixture).

use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::{Server, beamline};

fn fixture() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/hstu-semantic-ids")
}

fn reference() -> Value {
    serde_json::from_str(&std::fs::read_to_string(fixture().join("reference.json")).unwrap()).unwrap()
}

fn list(value: &Value) -> &[Value] {
    value.as_array().unwrap()
}

#[test]
fn beams_and_scores_are_the_reference() {
    let server = Server::start_at(&fixture(), &[]);
    let models = server.get("/v1/models").ok();
    let model = &models["models"][0];
    assert_eq!(model["tasks"], json!(["recommend", "rank"]));
    assert_eq!((&model["levels"], &model["generated_steps"]), (&json!(3), &json!(3)));
    let reference = reference();
    let tolerance = reference["tolerance"].as_f64().unwrap();
    assert!(list(&reference["recommend"]).len() >= 20);
    for case in list(&reference["recommend"]) {
        let answer = server.recommend(&case["body"]).ok();
        let (found, expected) = (list(&answer["items"]), list(&case["expected"]));
        let ids = |items: &[Value]| items.iter().map(|item| item["item_id"].clone()).collect::<Vec<_>>();
        assert_eq!(ids(found), ids(expected), "{}", case["body"]);
        for (found, expected) in found.iter().zip(expected) {
            let (found, expected) = (found["score"].as_f64().unwrap(), expected["score"].as_f64().unwrap());
            assert!((found - expected).abs() < tolerance, "{found} against {expected}");
        }
    }
    for case in list(&reference["rank"]) {
        let answer = server.post("/v1/rank", &case["body"]).ok();
        for (candidate, expected) in
            list(&case["body"]["candidates"]).iter().zip(list(&case["log_probabilities"]))
        {
            let found =
                list(&answer["candidates"]).iter().find(|c| c["item_id"] == candidate["item_id"]).unwrap();
            let found = found["predictions"]["log_probability"].as_f64().unwrap();
            assert!((found - expected.as_f64().unwrap()).abs() < tolerance, "{found} against {expected}");
        }
    }
}

/// Visits of one user: events every hour, asked a minute after the last.
fn visit(events: usize, tenant: &str) -> Value {
    let event = |at: usize| json!({"item_id": format!("item-{}", 1 + at * 7 % 60), "action": (at % 5).to_string(), "timestamp": 1_760_000_000 + 3600 * at});
    json!({
        "history": (0..events).map(event).collect::<Vec<_>>(), "query_time": 1_760_000_060 + 3600 * (events - 1),
        "num_items": 10, "beam_width": 32, "user_id": "u", "tenant": tenant,
    })
}

#[test]
fn a_returning_user_gets_the_same_bits_from_cached_pages() {
    let server = Server::start_at(&fixture(), &[]);
    server.recommend(&visit(15, "a")).ok();
    let warm = server.recommend(&visit(17, "a")).ok();
    // 45 rows of the first visit; the last looked at the time of the query.
    assert_eq!(warm["usage"]["cached_tokens"], 32);
    assert_eq!(warm["usage"]["context_tokens"], 51);
    let cold = server.recommend(&visit(17, "b")).ok();
    assert_eq!((&cold["usage"]["cached_tokens"], &cold["items"]), (&json!(0), &warm["items"]));
    // A warmed context is found by any later request of its tenant.
    server
        .post(
            "/v1/warm",
            &json!({"history": visit(20, "c")["history"], "query_time": 1_770_000_000, "tenant": "c"}),
        )
        .ok();
    assert_eq!(server.recommend(&visit(20, "c")).ok()["usage"]["cached_tokens"], 32);
    // Another action is another history.
    let mut other = visit(17, "a");
    other["history"][0]["action"] = json!("4");
    assert_eq!(server.recommend(&other).ok()["usage"]["cached_tokens"], 0);
}

#[test]
fn a_long_history_loses_its_oldest_items_whole() {
    let server = Server::start_at(&fixture(), &["--history-cut", "exact"]);
    let long = server.recommend(&visit(27, "a")).ok();
    assert_eq!((&long["dropped_history"], &long["usage"]["context_tokens"]), (&json!(7), &json!(60)));
    let mut kept = visit(27, "b");
    kept["history"] = json!(list(&kept["history"])[7..]);
    assert_eq!(server.recommend(&kept).ok()["items"], long["items"]);
}

#[test]
fn a_forced_prefix_leaves_the_scores_of_the_rest() {
    let server = Server::start_at(&fixture(), &[]);
    let mut request = visit(9, "a");
    (request["num_items"], request["beam_width"]) = (json!(60), json!(64));
    let all = server.recommend(&request).ok();
    let first = list(&all["items"])[0]["sid"][0].clone();
    request["sid_prefix"] = json!([first]);
    let below = server.recommend(&request).ok();
    let expected: Vec<&Value> = list(&all["items"]).iter().filter(|item| item["sid"][0] == first).collect();
    assert!(expected.len() > 1);
    assert_eq!(list(&below["items"]).len(), expected.len());
    let score = |item: &Value| item["score"].as_f64().unwrap();
    let of_prefix = score(expected[0]) - score(&below["items"][0]);
    assert!(of_prefix < 0.0);
    for (whole, rest) in expected.iter().zip(list(&below["items"])) {
        assert_eq!(whole["item_id"], rest["item_id"]);
        assert!((score(whole) - score(rest) - of_prefix).abs() < 1e-5);
    }
}

#[test]
fn inspect_shows_what_is_there_and_lists_all_problems() {
    let run = |directory: &Path| {
        let output = beamline().arg("inspect").arg(directory).output().unwrap();
        (output.status.code(), String::from_utf8(output.stdout).unwrap())
    };
    let (code, text) = run(&fixture());
    assert_eq!(code, Some(0), "{text}");
    for part in [
        "hstu, variant research",
        "5 actions, times",
        "at most 20 events",
        "semantic IDs, codes by level 8, 8, 8",
        "64 items on 57 SIDs",
        "sha256",
    ] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    let broken = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors", "catalog.jsonl"] {
        std::fs::copy(fixture().join(name), broken.path().join(name)).unwrap();
    }
    let config = broken.path().join("config.json");
    let mut changed: Value = serde_json::from_str(&std::fs::read_to_string(&config).unwrap()).unwrap();
    changed["output"]["head"]["semantic_id_levels"][2]["codes"] = json!(1);
    changed["stack"]["layers"] = json!(3);
    std::fs::write(&config, changed.to_string()).unwrap();
    let (code, text) = run(broken.path());
    assert_eq!(code, Some(1), "{text}");
    for part in ["missing", "_attention_layers.2.", "lines 1, ", "this level has the codes 0 to 0"] {
        assert!(text.contains(part), "{part:?} in {text}");
    }
    changed["output"]["head"]["semantic_id_levels"] = json!([{"first_token": 0, "codes": 8}]);
    std::fs::write(&config, changed.to_string()).unwrap();
    let (code, text) = run(broken.path());
    assert_eq!(code, Some(1), "{text}");
    assert!(text.contains("padding_id"), "{text}");
}

#[test]
fn wrong_inputs_are_named() {
    let server = Server::start_at(&fixture(), &[]);
    let with = |field: &str, value: Value| {
        let mut body = visit(2, "a");
        body[field] = value;
        server.recommend(&body)
    };
    let event = |action: Value| json!([{"item_id": "item-1", "action": action, "timestamp": 1}]);
    assert_eq!(with("history", event(Value::Null)).fails(422, "invalid_value")["param"], "history.action");
    assert_eq!(with("history", event(json!("click"))).fails(422, "invalid_value")["param"], "history.action");
    with("history", event(json!("5"))).fails(400, "invalid_request");
    assert_eq!(with("query_time", Value::Null).fails(422, "invalid_value")["param"], "query_time");
    with("history", json!([])).fails(422, "empty_history");
    assert_eq!(with("sid_prefix", json!([0, 1, 2])).fails(422, "invalid_value")["param"], "sid_prefix");
    with("sid_prefix", json!([8])).fails(422, "unknown_sid_prefix");
    let mut widths = visit(2, "a");
    widths.as_object_mut().unwrap().remove("beam_width");
    widths["beam_widths"] = json!([9, 9]);
    assert_eq!(server.recommend(&widths).fails(422, "invalid_value")["param"], "beam_widths");
    server.recommend(&json!({"token_ids": [1, 2]})).fails(400, "invalid_request");
    // A code without a token is refused with the catalog.
    let lines = r#"{"item_id": "far", "sid": [0, 1, 8]}"#;
    let headers = [("content-type", "application/x-ndjson")];
    server.call("PUT", "/v1/models/default/catalog", Some(lines), &headers).fails(422, "catalog_refused");
}
