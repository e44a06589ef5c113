//! One definition per value at every door: ids, times, tags, cold starts, over HTTP, in batches and in
//! catalogs.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value, json};

use crate::harness::{Server, beamline, fixture, history, ids, items};
use crate::root::{CASE, Root};

fn demo() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../weights/demo/checkpoint")
}

/// Answers lines, one by one.
fn batch(checkpoint: &Path, flags: &[&str], input: impl AsRef<[u8]>) -> Vec<Value> {
    let directory = tempfile::tempdir().unwrap();
    let (from, to) = (directory.path().join("in.jsonl"), directory.path().join("out.jsonl"));
    fs::write(&from, input).unwrap();
    let mut command = beamline();
    command.args(["batch", "--kv-memory", "32MiB", "--threads", "1", "--checkpoint"]).arg(checkpoint);
    command.args(flags).args([&from, &to]).output().unwrap();
    let text = fs::read_to_string(to).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// The fixture's catalog with the numbers of lines as ids, written as integers.
fn numbered() -> String {
    let text = fs::read_to_string(fixture(CASE).join("catalog.jsonl")).unwrap();
    let line = |(number, line): (usize, &str)| {
        let mut record: Value = serde_json::from_str(line).unwrap();
        record["item_id"] = number.into();
        format!("{record}\n")
    };
    text.lines().enumerate().map(line).collect()
}

#[test]
fn an_integer_id_is_its_decimal_text_at_every_door() {
    let root = Root::new();
    let catalog = root.path().join("numbers.jsonl");
    fs::write(&catalog, numbered()).unwrap();
    let server = root.serve(&["--catalog", catalog.to_str().unwrap()]);
    let ask = |body: Value| ids(&server.recommend(&body).ok());
    let with = |history: Value, items: Value| json!({"history": history, "user_id": 7, "filters": {"exclude_items": items}, "num_items": 5});
    let expected = ask(with(json!([{"item_id": "3"}, {"item_id": "4"}]), json!(["5"])));
    for same in [
        with(json!([{"item_id": 3}, {"item_id": 4}]), json!([5])),
        with(json!([3, 4]), json!(["5"])),
        with(json!(["3", "4"]), json!([5])),
    ] {
        assert_eq!(ask(same.clone()), expected, "{same}");
        let flags = ["--catalog", catalog.to_str().unwrap()];
        assert_eq!(ids(&batch(&fixture(CASE), &flags, same.to_string())[0]), expected, "{same}");
    }
    let rank = |candidates: Value| {
        let body = json!({"history": [3], "candidates": candidates});
        server.post("/v1/rank", &body).ok()["candidates"].clone()
    };
    assert_eq!(rank(json!([5, 6])), rank(json!([{"item_id": "5"}, "6"])));
    server.post("/v1/warm", &json!({"history": [3, 4]})).ok();

    // A change names items by number as well.
    let patch = json!({"remove": [5], "retag": [{"item_id": 6, "tags": ["new"]}], "add": [{"item_id": 5, "sid": [0, 0, 4]}]});
    let media = [("content-type", "application/json")];
    server.call("PATCH", "/v1/models/shop/catalog", Some(&patch.to_string()), &media).ok();
    let lines = [("content-type", "application/x-ndjson")];
    let put = format!("\u{feff}{}", numbered().replace('\n', "\r\n"));
    server.call("PUT", "/v1/models/shop/catalog", Some(&put), &lines).ok();
    assert_eq!(ask(with(json!([3, 4]), json!([5]))), expected);

    let float = server.recommend(&json!({"history": [3.0]})).fails(400, "invalid_request");
    assert!(float["message"].as_str().unwrap().contains("3.0 is a float"), "{float}");
    assert_eq!(float["param"], "history[0]");
}

#[test]
fn a_byte_order_mark_and_crlf_mean_nothing() {
    let line = json!({"history": [], "num_items": 1}).to_string();
    let plain = batch(&fixture(CASE), &[], format!("{line}\n{line}\n"));
    assert!(plain.iter().all(|answer| answer["items_returned"] == 1), "{plain:?}");
    assert_eq!(batch(&fixture(CASE), &[], format!("\u{feff}{line}\r\n{line}\r\n")), plain);
    let server = Server::start(CASE, &[]);
    let body = format!("\u{feff}{line}\r\n");
    server.post_text("/v1/recommend", &body, "application/json", &[]).ok();
}

#[test]
fn times_that_cannot_be_meant_are_named() {
    let server = Server::start(CASE, &[]);
    let known = &items(CASE)[..3];
    let refused = |path: &str, times: [Option<i64>; 3], extra: Value, parts: &[&str]| {
        let events = known.iter().zip(times);
        let events: Value = events.map(|(id, time)| json!({"item_id": id, "timestamp": time})).collect();
        let mut body = json!({"history": events});
        body.as_object_mut().unwrap().extend(extra.as_object().unwrap().clone());
        let error = server.post(path, &body).fails(422, "invalid_value");
        let message = error["message"].as_str().unwrap();
        assert!(parts.iter().all(|part| message.contains(part)), "{parts:?}: {message}");
    };
    let backwards = [Some(1_700_000_002), None, Some(1_700_000_001)];
    let parts = ["history.timestamp", "event 2", "event 0", "oldest first"];
    refused("/v1/recommend", backwards, json!({}), &parts);
    refused("/v1/warm", backwards, json!({}), &parts);
    refused("/v1/rank", backwards, json!({"candidates": [known[0]]}), &parts);
    let milliseconds = [None, None, Some(1_700_000_000_000)];
    refused("/v1/recommend", milliseconds, json!({}), &["event 2", "Divide milliseconds by 1,000"]);
    refused(
        "/v1/recommend",
        [None; 3],
        json!({"query_time": 1_700_000_000_000_000_i64}),
        &["query_time", "microseconds"],
    );
    let same =
        json!({"history": [{"item_id": known[0], "timestamp": 5}, {"item_id": known[1], "timestamp": 5}]});
    server.recommend(&same).ok();
}

#[test]
fn typos_in_filters_are_told() {
    let server = Server::start_at(&demo(), &[]);
    let ask = |filters: Value, strict: bool| {
        let body = json!({"history": [], "num_items": 2, "filters": filters, "strict_filters": strict});
        server.recommend(&body)
    };
    let typos = json!({"forbid_tags": ["zzz", "zzz"], "exclude_items": ["no such item"]});
    let answer = ask(typos.clone(), false).ok();
    assert_eq!(answer["unknown_tags"], json!(["zzz"]));
    assert_eq!(answer["unknown_filter_items"], json!(["no such item"]));
    let error = ask(typos, true).fails(422, "unknown_tags");
    assert_eq!(error["param"], "filters");
    ask(json!({"exclude_items": ["no such item"]}), true).fails(422, "unknown_filter_items");

    // The nearest name is suggested: of tags, and of items.
    let catalog = fs::read_to_string(demo().join("catalog.jsonl")).unwrap();
    let first: Value = serde_json::from_str(catalog.lines().next().unwrap()).unwrap();
    let (tag, item) = (first["tags"][0].as_str().unwrap(), first["item_id"].as_str().unwrap());
    let says = |error: &Value, meant: &str| {
        let message = error["message"].as_str().unwrap();
        assert!(message.contains(&format!("did you mean `{meant}`?")), "{message}");
    };
    says(&ask(json!({"require_tags": [format!("{tag}x")]}), true).fails(422, "unknown_tags"), tag);
    let typo = format!("{item}x");
    says(&ask(json!({"allow_items": [typo]}), true).fails(422, "unknown_filter_items"), item);
    says(&server.recommend(&json!({"history": [typo]})).fails(422, "no_known_items"), item);
    let rank = json!({"history": [item], "candidates": [typo]});
    says(&server.post("/v1/rank", &rank).fails(422, "no_known_candidates"), item);
    let known = ask(json!({"require_tags": [tag]}), true).ok();
    assert_eq!((&known["unknown_tags"], &known["unknown_filter_items"]), (&json!([]), &json!([])));
}

#[test]
fn a_prompt_of_unknown_words_is_refused() {
    let server = Server::start_at(&demo(), &[]);
    let prompt = json!({"prompt": "I want a baby blanket"});
    let error = server.recommend(&prompt).fails(422, "invalid_value");
    assert_eq!(error["param"], "prompt");
    server.post("/v1/warm", &prompt).fails(422, "invalid_value");
    let answer = batch(&demo(), &[], format!("{prompt}\n{{\"history\": []}}\n"));
    assert_eq!(answer[0]["error"]["type"], "invalid_value");
}

#[test]
fn what_a_tokenizer_puts_around_every_text_is_no_known_word() {
    let directory = tempfile::tempdir().unwrap();
    for entry in fs::read_dir(fixture("qwen3-collisions")).unwrap() {
        let path = entry.unwrap().path();
        fs::copy(&path, directory.path().join(path.file_name().unwrap())).unwrap();
    }
    let path = directory.path().join("convention.json");
    let mut convention: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    convention["add_special_tokens"] = json!(true);
    fs::write(&path, convention.to_string()).unwrap();
    let answers = batch(directory.path(), &[], "{\"prompt\": \"nobody knows this\"}\n{\"prompt\": \"\"}\n");
    assert_eq!(answers[0]["error"]["type"], "invalid_value", "{}", answers[0]);
}

#[test]
fn a_prompt_that_cannot_fit_is_refused_by_its_bytes() {
    let server = Server::start(CASE, &["--max-context", "64"]);
    let error = server.recommend(&json!({"prompt": "a".repeat(200_000)})).fails(422, "context_too_long");
    assert_eq!(error["param"], "prompt");
    assert!(error["message"].as_str().unwrap().contains("200000 bytes"), "{error}");
}

#[test]
fn a_convention_without_a_beginning_says_why_it_cannot_start_cold() {
    let root = Root::new();
    let made = root.add("bare");
    let path = made.join("convention.json");
    let mut convention: Value = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    for (name, value) in [
        ("prompt_prefix", json!("")),
        ("prompt_suffix", json!("")),
        ("generation_begin", Value::Null),
        ("add_special_tokens", json!(false)),
    ] {
        convention[name] = value;
    }
    fs::write(&path, convention.to_string()).unwrap();
    let server = Server::start_at(&made, &[]);
    for (path, body) in [
        ("/v1/recommend", json!({"history": []})),
        ("/v1/warm", json!({"history": []})),
        ("/v1/rank", json!({"history": [], "candidates": [items(CASE)[0]]})),
    ] {
        let error = server.post(path, &body).fails(422, "empty_context");
        let message = error["message"].as_str().unwrap();
        assert!(message.contains("`prompt_prefix`") && message.contains("at least one item"), "{message}");
        assert_eq!(error["param"], "history");
    }
    let line = batch(&made, &[], "{\"history\": []}\n");
    assert_eq!(line[0]["error"]["type"], "empty_context");
    server.recommend(&json!({"history": history(&items(CASE)[..2])})).ok();
}
