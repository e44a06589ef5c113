//! The request log, and its replay.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_json::{Value, json};

use crate::harness::{Random, Server, beamline, fixture, history, items};

const CASE: &str = "qwen3-untied";

fn log_file() -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("log.jsonl");
    (directory, file)
}

fn lines(file: &Path) -> Vec<Value> {
    let text = fs::read_to_string(file).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn command(log: &Path, flags: &[&str]) -> Command {
    let mut command = beamline();
    command.args(["replay", "--kv-memory", "32MiB", "--checkpoint"]).arg(fixture(CASE)).arg(log).args(flags);
    command
}

fn replay(log: &Path, flags: &[&str]) -> Output {
    command(log, flags).output().unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// Histories that grow from visit to visit, widths, filters, prefixes, normalisations: all mixed.
fn request(random: &mut Random, catalog: &[String]) -> Value {
    let user = random.below(12);
    let visits = 3 + random.below(60);
    let past: Vec<String> =
        (0..visits).map(|visit| catalog[(user * 31 + visit * 7) % catalog.len()].clone()).collect();
    let mut request = json!({
        "user_id": format!("u{user}"),
        "history": history(&past),
        "num_items": 1 + random.below(20),
        "beam_width": 20 + random.below(80),
    });
    match random.below(6) {
        0 => request["normalization"] = json!("allowed_set"),
        1 => {
            request["filters"] = json!({"exclude_seen": true, "exclude_items": [catalog[random.below(100)]]})
        }
        2 => request["sid_prefix"] = json!([random.below(8)]),
        3 => request["tenant"] = json!("t"),
        4 => request["timeout_ms"] = json!(20_000),
        _ => {}
    }
    request
}

#[test]
fn what_was_answered_under_mixed_load_is_answered_again() {
    let (_directory, log) = log_file();
    // Few pages and small steps, so that contexts are evicted and cut.
    let flags = ["--request-log", log.to_str().unwrap(), "--max-step-tokens", "96", "--kv-memory", "16MiB"];
    let mut server = Server::start(CASE, &flags);
    let catalog = items(CASE);
    std::thread::scope(|scope| {
        for client in 0..6 {
            let (server, catalog) = (&server, &catalog);
            scope.spawn(move || {
                let mut random = Random(client);
                for _ in 0..50 {
                    let answer = server.recommend(&request(&mut random, catalog));
                    assert!([200, 422].contains(&answer.status), "{}", answer.text);
                }
            });
        }
    });
    let answered = server.metric("beamline_requests_total", "endpoint=\"/v1/recommend\",outcome=\"ok\"");
    assert_eq!(server.metric("beamline_request_log_dropped_total", ""), 0.0);
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
    let logged = lines(&log);
    assert_eq!(logged.len() as f64, answered, "a line per answer, all of them there after a drain");
    assert!(logged.len() > 200);
    assert!(logged.iter().any(|line| line["cached_tokens"].as_u64().unwrap() > 0));

    for flags in [&["--in-flight", "7", "--threads", "1"][..], &[]] {
        let done = replay(&log, flags);
        assert!(done.status.success(), "{}", stderr(&done));
        assert!(
            stderr(&done).contains(&format!("{} identical, 0 different", logged.len())),
            "{}",
            stderr(&done)
        );
    }
}

#[test]
fn differences_are_found_and_what_cannot_be_compared_is_counted() {
    let (directory, log) = log_file();
    let mut server = Server::start(CASE, &["--request-log", log.to_str().unwrap()]);
    for count in 1..=7 {
        let history = history(&items(CASE)[..count]);
        server.recommend(&json!({"user_id": format!("u{count}"), "history": history, "num_items": 3})).ok();
    }
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
    let mut logged = lines(&log);
    // One unit in the last place.
    let score = logged[1]["items"][2]["score"].as_f64().unwrap();
    logged[1]["items"][2]["score"] = json!(f64::from_bits(score.to_bits() + 1));
    logged[2]["items"][0]["item_id"] = json!("another");
    logged[3]["model"]["sha256"] = json!("0");
    logged[4]["catalog_version"] = json!("0");
    logged[5]["degraded"] =
        json!({"reason": "deadline", "beam_width_asked": 9, "needed_ms": 2.5, "left_ms": 1.0});
    let text: Vec<String> = logged.iter().map(Value::to_string).chain(["{\"torn".to_owned()]).collect();
    fs::write(&log, text.join("\n")).unwrap();

    let out = directory.path().join("differences.jsonl");
    let summary = directory.path().join("summary.json");
    let (out_flag, summary_flag) = (out.to_str().unwrap(), summary.to_str().unwrap());
    let done = replay(&log, &["--out", out_flag, "--summary", summary_flag]);
    assert_eq!(done.status.code(), Some(1));
    let said = stderr(&done);
    for part in [
        "2 identical, 2 different; passed over: 1 of another checkpoint, 1 of another catalog, 1 degraded, 1 unreadable",
        "line 2, request",
        "at rank 1 was \"another\"",
        "line 8:",
    ] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
    let differences = lines(&out);
    assert_eq!((&differences[0]["line"], &differences[0]["first_rank"]), (&json!(2), &json!(3)));
    assert_eq!(differences[0]["request_id"], logged[1]["request_id"]);
    assert_eq!(differences[0]["user_id"], "u2");
    let counts: Value = serde_json::from_slice(&fs::read(&summary).unwrap()).unwrap();
    let expected = json!({
        "model_sha256": logged[0]["model"]["sha256"], "catalog_version": logged[0]["catalog_version"],
        "beamline_version": env!("CARGO_PKG_VERSION"), "identical": 2, "different": 2,
        "other_model": 1, "other_catalog": 1, "degraded": 1, "unreadable": 1,
    });
    assert_eq!(counts, expected);
    assert!(!stderr(&replay(&log, &["--show", "0"])).contains("at rank"));
    // Nobody has to read what is found.
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    assert_eq!(command(&log, &[]).stderr(full).status().unwrap().code(), Some(1));
    assert_eq!(differences[0]["replayed"][2]["score"].as_f64().unwrap().to_bits(), score.to_bits());

    fs::write(&log, &text[3]).unwrap();
    let nothing = replay(&log, &[]);
    assert_eq!(nothing.status.code(), Some(1));
    assert!(stderr(&nothing).contains("no answer of this checkpoint and catalog"));
}

#[test]
fn the_log_says_who_asked_only_if_it_may() {
    let (_directory, log) = log_file();
    let file = log.to_str().unwrap();
    for flags in [&["--request-log", file][..], &["--request-log", file, "--request-log-hash-users"]] {
        let mut server = Server::start(CASE, flags);
        let answer = server.recommend(&json!({"user_id": "ada", "history": [], "num_items": 2})).ok();
        server
            .recommend(&json!({"user_id": "ada", "history": [], "num_items": 0}))
            .fails(422, "invalid_value");
        server.signal("TERM");
        server.wait();
        let logged = lines(&log);
        let last = logged.last().unwrap();
        assert_eq!(last["request_id"], answer["request_id"]);
        assert_eq!(last["model"]["sha256"], answer["model"]["sha256"]);
        assert_eq!(last["catalog_version"], answer["catalog_version"]);
        assert_eq!(last["items"][1]["score"], answer["items"][1]["score"]);
        assert!(last["received_at"].as_u64().unwrap() > 1_600_000_000_000);
    }
    let logged = lines(&log);
    assert_eq!(logged.len(), 2, "errors are not logged, and the file is appended to");
    assert_eq!(logged[0]["request"]["user_id"], "ada");
    let hashed = logged[1]["request"]["user_id"].as_str().unwrap();
    assert!(hashed.len() == 32 && !hashed.contains("ada"));
    let failed = beamline()
        .args(["serve", "--listen", "127.0.0.1:0", "--request-log", "/nowhere/log", "--checkpoint"])
        .arg(fixture(CASE))
        .output()
        .unwrap();
    assert!(stderr(&failed).contains("cannot write the request log"), "{}", stderr(&failed));
}
