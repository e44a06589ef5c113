//! Signals: which end a server, which open its logs again, and what becomes of the requests at hand.

use std::process::Stdio;

use serde_json::{Value, json};

use crate::harness::{Server, read_raw};

const CASE: &str = "qwen3-untied";
/// A server that takes its time, so that there is time to interfere.
/// Steps of few tokens, and time enough on a busy machine.
const SLOW: [&str; 6] = ["--threads", "1", "--max-step-tokens", "64", "--default-timeout-ms", "60000"];

fn long(user: u32) -> Value {
    let tokens: Vec<u32> = (0..4000).map(|index| (index * 7 + user) % 360).collect();
    json!({"user_id": format!("u{user}"), "token_ids": tokens, "timeout_ms": 60_000})
}

#[test]
fn sigquit_lets_requests_finish() {
    let mut server = Server::start(CASE, &SLOW);
    let streams: Vec<_> = (0..4).map(|user| server.send_recommend(&long(user))).collect();
    server.wait_for("the requests to arrive", |server| {
        server.metric("beamline_requests_running", "") + server.metric("beamline_requests_queued", "") >= 4.0
    });
    server.signal("QUIT");
    for stream in streams {
        assert!(read_raw(stream).starts_with("HTTP/1.1 200"));
    }
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_second_signal_ends_at_once() {
    let mut server = Server::start(CASE, &[&SLOW[..], &["--drain-timeout-ms", "600000"]].concat());
    let _streams: Vec<_> = (0..24).map(|user| server.send_recommend(&long(user))).collect();
    server.wait_for("the requests to run", |server| server.metric("beamline_requests_running", "") > 0.0);
    server.signal("INT");
    server.wait_for("the drain", |server| std::net::TcpStream::connect(server.address).is_err());
    server.signal("INT");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_rotated_request_log_is_opened_again_and_nothing_is_broken() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("requests.jsonl");
    let mut server = Server::start(CASE, &["--request-log", file.to_str().unwrap()]);
    let lines = |file: &std::path::Path| std::fs::read_to_string(file).map_or(0, |text| text.lines().count());
    for (rotation, signal) in ["HUP", "USR1"].into_iter().enumerate() {
        server.still_serves();
        server.wait_for("the line", |_| lines(&file) == 1);
        let rotated = directory.path().join(format!("requests.jsonl.{rotation}"));
        std::fs::rename(&file, &rotated).unwrap();
        server.signal(signal);
        server.wait_for("the new file", |_| file.exists());
        assert_eq!(lines(&rotated), 1);
    }
    server.still_serves();
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
    assert_eq!(lines(&file), 1);
}

#[test]
fn lines_of_refusals_say_why() {
    use std::io::Read;

    let mut server = Server::start_logging_to(CASE, &["--log", "info"], Stdio::piped());
    let model = format!("x\r\n\u{1b}[31mERROR forged {}", "y".repeat(1000));
    server.recommend(&json!({"history": [], "model": model})).fails(404, "model_not_found");
    server.recommend(&json!({"history": [], "beams": 5})).fails(400, "invalid_request");
    server.signal("TERM");
    let mut log = String::new();
    server.take_stderr().read_to_string(&mut log).unwrap();
    assert_eq!(server.wait().code(), Some(0));
    let line = log.lines().find(|line| line.contains("model_not_found")).unwrap();
    assert!(line.contains("error=\"model ") && line.len() < 1000, "{line}");
    assert!(log.contains("beams"), "{log}");
    assert!(!log.contains('\u{1b}') && log.lines().all(|line| !line.starts_with("ERROR")), "{log}");
    assert!(log.contains("set a key with --admin-key-file"), "{log}");
}
