//! Catalogs that change under load: no request fails, every answer fits the catalog it names, and what
//! was removed is gone from the next request on.

use serde_json::{Value, json};

use crate::harness::{Server, fixture, ids};
use crate::root::{CASE, Reference, Root, bodies, under_load};
use crate::swapping::{KV_MEMORY, TOLERANCE};

/// Updates and swaps; `cargo xtask soak --swaps N` asks for more.
fn updates() -> usize {
    std::env::var("BEAMLINE_SWAPS").map_or(50, |count| count.parse().unwrap())
}

const LINES: [(&str, &str); 1] = [("content-type", "application/x-ndjson")];

fn lines() -> Vec<String> {
    let text = std::fs::read_to_string(fixture(CASE).join("catalog.jsonl")).unwrap();
    text.lines().map(str::to_owned).collect()
}

/// The catalog without every fifth item, counted from `phase`.
fn without(lines: &[String], phase: usize) -> String {
    let kept = lines.iter().enumerate().filter(|(index, _)| index % 5 != phase);
    kept.map(|(_, line)| format!("{line}\n")).collect()
}

fn push(server: &Server, model: &str, text: &str) -> Value {
    server.call("PUT", &format!("/v1/models/{model}/catalog"), Some(text), &LINES).ok()
}

fn patch(server: &Server, body: &Value) -> crate::harness::Answer {
    let json = [("content-type", "application/json")];
    server.call("PATCH", "/v1/models/shop/catalog", Some(&body.to_string()), &json)
}

#[test]
fn fifty_updates_and_fifty_swaps_under_load() {
    let root = Root::new();
    // See `swapping`: what is resident should be what is in use, and a version that stays should show.
    let server = root.serve_with(&KV_MEMORY, &[("MIMALLOC_PURGE_DELAY", "0")]);
    let all = lines();
    let catalogs: Vec<String> = (0..4).map(|phase| without(&all, phase)).collect();
    let load = |directory: &str| {
        let body = json!({"directory": directory, "label": "stable"});
        server.post("/v1/models/shop/load", &body).ok()["version"].as_str().unwrap().to_owned()
    };
    let mut reference = Reference::default();
    let mut version = server.get("/v1/models").ok()["models"][0]["version"].as_str().unwrap().to_owned();
    for directory in ["b", "a"] {
        let next = load(directory);
        server.post("/v1/models/shop/unload", &json!({"version": version})).ok();
        version = next;
        reference.learn(&server, "shop");
        for catalog in &catalogs {
            push(&server, "shop", catalog);
            reference.learn(&server, "shop");
        }
    }
    assert_eq!(reference.len(), 10);

    let update = |version: &mut String, rounds: usize| {
        for round in 0..rounds {
            let phase = round % catalogs.len();
            let current = push(&server, "shop", &catalogs[phase])["current"].clone();
            // From the next request on.
            let answer = server.recommend(&bodies()[round % 12]).ok();
            assert_eq!(answer["catalog_version"], current);
            assert!(ids(&answer).iter().all(|id| catalogs[phase].contains(&format!("\"{id}\""))), "{answer}");
            let next = load(["b", "a"][round % 2]);
            server.post("/v1/models/shop/unload", &json!({"version": version})).ok();
            *version = next;
        }
    };
    let used = || server.get("/v1/models").ok()["memory"]["used_bytes"].clone();
    let (_, ()) = under_load(&server, &reference, || update(&mut version, 6));
    let before = (used(), server.resident());
    let updates = updates();
    let (answered, ()) = under_load(&server, &reference, || update(&mut version, updates));
    let after = (used(), server.resident());
    println!(
        "{updates} catalogs and {updates} swaps, {answered} answers, counted and resident {before:?} -> {after:?}"
    );
    assert_eq!(after.0, before.0, "counted memory is back");
    assert!(after.1 < before.1 + TOLERANCE, "resident memory grew: {before:?} -> {after:?}");
    assert!(answered > updates, "{answered}");
    assert_eq!(server.metric("beamline_engine_requests_total", "end=\"failed\""), 0.0);
}

#[test]
fn catalogs_are_patched_listed_and_rolled_back() {
    let root = Root::new();
    let server = root.serve(&["--keep-catalogs", "2"]);
    let body = json!({"history": [], "num_items": 130, "beam_width": 130});
    let first = server.get("/v1/models/shop/catalog").ok();
    let first_version = first["current"].as_str().unwrap().to_owned();
    let best = ids(&server.recommend(&body).ok())[0].clone();

    // Remove and retag.
    let removed = patch(&server, &json!({"remove": [best], "retag": []})).ok();
    assert_eq!(removed["versions"][1]["items"], 129);
    let answer = server.recommend(&body).ok();
    assert!(!ids(&answer).contains(&best) && ids(&answer).len() == 129);
    assert_eq!(answer["catalog_version"], removed["current"]);
    let second = ids(&answer)[0].clone();
    patch(&server, &json!({"retag": [{"item_id": second, "tags": ["only"]}]})).ok();
    let mut tagged = body.clone();
    tagged["filters"] = json!({"require_tags": ["only"]});
    assert_eq!(ids(&server.recommend(&tagged).ok()), [second.as_str()]);

    // Add it again under another name.
    let line: Value = lines()
        .iter()
        .map(|line| serde_json::from_str::<Value>(line).unwrap())
        .find(|line| line["item_id"] == json!(best))
        .unwrap();
    let added =
        patch(&server, &json!({"add": [{"item_id": "fresh", "sid": line["sid"], "tags": ["new"]}]})).ok();
    assert!(ids(&server.recommend(&body).ok()).contains(&"fresh".to_owned()));
    // One serves and two are kept: the first is forgotten.
    assert_eq!(added["versions"].as_array().unwrap().len(), 3);
    let roll_back =
        |version: &Value| server.post("/v1/models/shop/catalog/rollback", &json!({"version": version}));
    roll_back(&json!(first_version)).fails(404, "catalog_not_found");
    assert_eq!(roll_back(&removed["current"]).ok()["current"], removed["current"]);
    assert_eq!(ids(&server.recommend(&body).ok()), ids(&answer));

    // What is wrong changes nothing.
    let before = server.get("/v1/models/shop/catalog").ok();
    patch(&server, &json!({"remove": ["nonesuch"]})).fails(422, "invalid_value");
    patch(&server, &json!({"retag": [{"item_id": "nonesuch", "tags": []}]})).fails(422, "invalid_value");
    patch(&server, &json!({"add": [{"item_id": second, "sid": line["sid"]}]})).fails(422, "catalog_refused");
    patch(&server, &json!({"add": [{"item_id": "x", "sid": [1, 2, 99]}]})).fails(422, "catalog_refused");
    patch(&server, &json!({"add": [{"item_id": "x", "sid": [1, 2]}]})).fails(422, "catalog_refused");
    patch(&server, &json!({"added": []})).fails(400, "invalid_request");
    let put = |text: &str| server.call("PUT", "/v1/models/shop/catalog", Some(text), &LINES);
    put("").fails(422, "catalog_refused");
    let bad =
        "{\"item_id\": \"a\", \"sid\": [1, 2, 3]}\nnonsense\n\n{\"item_id\": 7.5, \"sid\": [1, 2, 3]}\n";
    let error = put(bad).fails(422, "catalog_refused");
    let message = error["message"].as_str().unwrap();
    for part in ["2 bad records", "line 2: ", "line 4: ", "7.5 is a float"] {
        assert!(message.contains(part), "{part} is not in {message}");
    }
    server.put("/v1/models/shop/catalog", &json!({})).fails(415, "unsupported_media_type");
    server.call("PUT", "/v1/models/none/catalog", Some(""), &LINES).fails(404, "model_not_found");
    assert_eq!(server.get("/v1/models/shop/catalog").ok(), before);
}

#[test]
fn catalogs_count_against_the_memory_budget() {
    let root = Root::new();
    let all = lines();
    let figure = |value: &Value| value.as_u64().unwrap();
    let memory = |server: &Server| server.get("/v1/models").ok()["memory"].clone();

    // Without a limit of one's own there is one that the machine sets.
    let server = root.serve(&[]);
    assert!(figure(&memory(&server)["limit_bytes"]) > 256 << 20);
    let start = figure(&memory(&server)["used_bytes"]);
    let pushed = push(&server, "shop", &without(&all, 0));
    let size = figure(&pushed["versions"][1]["memory_bytes"]);
    assert!(size > 1000);
    assert_eq!(figure(&memory(&server)["used_bytes"]), start + size);
    assert_eq!(server.metric("beamline_model_memory_bytes", "kind=\"used\""), (start + size) as f64);
    drop(server);

    // Room for two small catalogs beside the first: of the three that may be kept, the oldest give way.
    let limit = start + 2 * size + size / 2;
    let server = root.serve(&["--model-memory", &limit.to_string()]);
    for round in 0..8 {
        let list = push(&server, "shop", &without(&all, round % 4));
        assert_eq!(list["versions"].as_array().unwrap().len(), (2 + round).min(3), "{list}");
        assert!(figure(&memory(&server)["used_bytes"]) <= limit);
    }
    let before = (server.get("/v1/models/shop/catalog").ok(), memory(&server));
    // Titles that take more than all that could give way.
    let title = "x".repeat(4096);
    let large: String = all
        .iter()
        .map(|line| {
            let mut record: Value = serde_json::from_str(line).unwrap();
            record["title"] = json!(title);
            format!("{record}\n")
        })
        .collect();
    let refused = server.call("PUT", "/v1/models/shop/catalog", Some(&large), &LINES);
    let message = refused.fails(409, "over_memory_budget")["message"].as_str().unwrap().to_owned();
    for part in ["the catalog's items, names and trie need 5", "are free", "--model-memory"] {
        assert!(message.contains(part), "{part} is not in {message}");
    }
    assert_eq!((server.get("/v1/models/shop/catalog").ok(), memory(&server)), before);
    server.still_serves();
}

#[test]
fn a_large_catalog_has_a_limit_of_its_own() {
    let root = Root::new();
    let server = root.serve(&["--max-catalog-bytes", "1KiB"]);
    let text = lines().join("\n");
    server.call("PUT", "/v1/models/shop/catalog", Some(&text), &LINES).fails(413, "body_too_large");
}
