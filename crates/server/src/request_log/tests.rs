//! Tests with a disk that hangs, a file that a crash has cut, and a file that was rotated.

use std::time::Duration;

use super::line::{LoggedAnswer, LoggedItem, LoggedModel, hash_user};
use super::*;

const PATIENCE: Duration = Duration::from_secs(30);

fn line(request_id: &str) -> LoggedAnswer {
    LoggedAnswer {
        request_id: request_id.into(),
        received_at: 1,
        request: RecommendRequest { user_id: Some("u".into()), ..RecommendRequest::default() },
        model: LoggedModel { sha256: "x".into(), weight_format: "f32".into(), kv_format: "f32".into() },
        catalog_version: "v".into(),
        items: vec![LoggedItem { item_id: "a".into(), score: -0.1 - 0.2 }],
        degraded: None,
        cached_tokens: 3,
    }
}

#[test]
fn text_and_back_keep_every_bit() {
    let mut bits = 0x3fe0_0000_0000_0001_u64;
    for _ in 0..100_000 {
        bits = bits.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        let score = -f64::from_bits((bits >> 4) | 0x3f00_0000_0000_0000);
        if !score.is_finite() {
            continue;
        }
        let mut line = line("r");
        line.items[0].score = score;
        let back: LoggedAnswer = serde_json::from_str(&serde_json::to_string(&line).unwrap()).unwrap();
        assert_eq!(back.items[0].score.to_bits(), score.to_bits());
    }
}

#[test]
fn requests_are_logged_as_they_are_read() {
    let text = r#"{"user_id":"u","history":[{"item_id":"a","action":"click","timestamp":7},{"item_id":"b"}],"sid_prefix":[1,"<b_2>"],"num_items":3,"normalization":"allowed_set","filters":{"exclude_items":["a"],"exclude_seen":true,"require_tags":[],"forbid_tags":["x"],"allow_items":[]},"timeout_ms":5,"allow_degraded":true}"#;
    let request: RecommendRequest = serde_json::from_str(text).unwrap();
    assert_eq!(serde_json::to_string(&request).unwrap(), text);
}

fn log(file: &Path) -> RequestLog {
    RequestLog::start(&RequestLogSettings { file: file.to_owned(), hash_users: true }).unwrap()
}

fn read(file: &Path) -> Vec<LoggedAnswer> {
    let text = std::fs::read_to_string(file).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn a_torn_file_is_gone_on_with_on_a_line_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("log.jsonl");
    std::fs::write(&file, "{\"torn").unwrap();
    for _ in 0..2 {
        let log = log(&file);
        log.answered(log.asked(&RecommendRequest::default()), &answer());
        assert!(log.close(PATIENCE));
    }
    let text = std::fs::read_to_string(&file).unwrap();
    let whole = text.strip_prefix("{\"torn\n").unwrap();
    std::fs::write(&file, whole).unwrap();
    assert_eq!(read(&file).len(), 2);
}

#[test]
fn after_a_rotation_lines_go_to_the_file_of_that_name() {
    let directory = tempfile::tempdir().unwrap();
    let (file, rotated) = (directory.path().join("log.jsonl"), directory.path().join("log.jsonl.1"));
    let log = log(&file);
    log.answered(log.asked(&RecommendRequest::default()), &answer());
    assert!(log.lines.flush(PATIENCE));
    std::fs::rename(&file, &rotated).unwrap();
    log.reopen();
    log.answered(log.asked(&RecommendRequest::default()), &answer());
    log.answered(log.asked(&RecommendRequest::default()), &answer());
    // A missing folder must not lose lines: the old file stays in use.
    assert!(log.lines.flush(PATIENCE));
    assert_eq!((read(&rotated).len(), read(&file).len()), (1, 2));
    let elsewhere = directory.path().join("elsewhere");
    std::fs::rename(&file, &elsewhere).unwrap();
    std::fs::create_dir(&file).unwrap();
    log.reopen();
    log.answered(log.asked(&RecommendRequest::default()), &answer());
    assert!(log.close(PATIENCE));
    assert_eq!((read(&elsewhere).len(), log.dropped_lines()), (3, 0));
}

#[test]
fn what_waits_is_bounded_in_bytes_and_nobody_waits() {
    // The thread of this writer takes no lines.
    let log = RequestLog { lines: LineWriter::stuck(1 << 20), hash_users: false };
    let large = RecommendRequest { prompt: Some("x".repeat(100_000)), ..RecommendRequest::default() };
    let answer = answer();
    for _ in 0..1000 {
        log.answered(log.asked(&large), &answer);
    }
    assert_eq!(log.dropped_lines(), 1000 - 10);
}

#[test]
fn users_have_one_name_and_not_their_own() {
    assert_eq!(hash_user("u1"), hash_user("u1"));
    assert_ne!(hash_user("u1"), hash_user("u2"));
    assert_eq!(hash_user("u1").len(), 32);
}

fn answer() -> RecommendResponse {
    RecommendResponse {
        request_id: "r".into(),
        model: crate::api::ModelName {
            name: "m".into(),
            version: "v".into(),
            sha256: "s".into(),
            weight_format: "f32".into(),
            kv_format: "f32".into(),
        },
        catalog_version: "c".into(),
        items: Vec::new(),
        items_requested: 1,
        items_returned: 0,
        unknown_items: Vec::new(),
        unknown_tags: Vec::new(),
        unknown_filter_items: Vec::new(),
        dropped_history: 0,
        degraded: None,
        reason: None,
        normalization: Some(crate::api::Normalization::default()),
        usage: crate::api::Usage::default(),
        timings_ms: crate::api::Timings::default(),
    }
}
