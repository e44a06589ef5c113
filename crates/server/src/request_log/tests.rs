//! A disk that fails, a disk that hangs, a file that a crash has torn.

use std::cell::Cell;
use std::io::{self, Write};
use std::sync::mpsc::sync_channel;
use std::time::Duration;

use super::line::{LoggedAnswer, LoggedItem, LoggedModel, hash_user};
use super::writer::{Message, write};
use super::*;

fn line(request_id: &str) -> LoggedAnswer {
    LoggedAnswer {
        request_id: request_id.into(),
        received_at: 1,
        request: RecommendRequest { user_id: Some("u".into()), ..RecommendRequest::default() },
        model: LoggedModel { sha256: "x".into(), weight_format: "f32".into() },
        catalog_version: "v".into(),
        items: vec![LoggedItem { item_id: "a".into(), score: -0.1 - 0.2 }],
        degraded: None,
        cached_tokens: 3,
    }
}

fn message(request_id: &str) -> Message {
    Message::Line(Box::new(line(request_id)))
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

/// Fails when it is told to.
struct Disk<'a> {
    fails: &'a Cell<u32>,
    text: Vec<u8>,
}

impl Write for &mut Disk<'_> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.fails.get() {
            0 => self.text.write(bytes),
            left => {
                self.fails.set(left - 1);
                // Half of it gets through.
                self.text.extend_from_slice(&bytes[..bytes.len() / 2]);
                Err(io::Error::other("full"))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn after_a_failure_lines_are_whole_again() {
    let (fails, dropped) = (Cell::new(1), Cell::new(0));
    let mut disk = Disk { fails: &fails, text: Vec::new() };
    for name in ["a", "b"] {
        let (sender, messages) = sync_channel(4);
        sender.send(message(name)).unwrap();
        sender.send(Message::Close).unwrap();
        let torn = !disk.text.is_empty();
        write(&messages, &mut disk, torn, |lines| dropped.set(dropped.get() + lines));
    }
    let text = String::from_utf8(disk.text).unwrap();
    let whole: Vec<LoggedAnswer> = text.lines().filter_map(|text| serde_json::from_str(text).ok()).collect();
    assert_eq!((whole, dropped.get()), (vec![line("b")], 1));
}

#[test]
fn a_torn_file_is_gone_on_with_on_a_line_of_its_own() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("log.jsonl");
    std::fs::write(&file, "{\"torn").unwrap();
    let settings = RequestLogSettings { file: file.clone(), hash_users: true };
    for _ in 0..2 {
        let log = RequestLog::start(&settings).unwrap();
        log.sender.send(message("a")).unwrap();
        log.close();
    }
    let text = std::fs::read_to_string(&file).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines, ["{\"torn", &serde_json::to_string(&line("a")).unwrap()[..], lines[1]]);
}

#[test]
fn who_logs_never_waits() {
    // Nobody takes anything out of this channel.
    let (sender, _messages) = sync_channel(2);
    let log = RequestLog { sender, thread: Mutex::new(None), hash_users: false };
    let start = std::time::Instant::now();
    let answer = answer();
    for _ in 0..1000 {
        log.answered(log.asked(&RecommendRequest::default()), &answer);
    }
    assert!(start.elapsed() < Duration::from_secs(5));
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
        },
        catalog_version: "c".into(),
        items: Vec::new(),
        items_requested: 1,
        items_returned: 0,
        unknown_items: Vec::new(),
        dropped_history: 0,
        degraded: None,
        reason: None,
        normalization: Some(crate::api::Normalization::default()),
        usage: crate::api::Usage::default(),
        timings_ms: crate::api::Timings::default(),
    }
}
