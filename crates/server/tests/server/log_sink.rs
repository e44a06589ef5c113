//! A log that nobody can write to or reads costs nobody an answer.

use std::fs::OpenOptions;
use std::process::Stdio;

use serde_json::json;

use crate::harness::{Server, read_raw};

const CASE: &str = "qwen3-untied";

/// Everything works, the lost lines are counted, and the server drains.
fn serves_and_drains(mut server: Server) {
    for _ in 0..30 {
        server.recommend(&json!({"history": [], "num_items": 2})).ok();
        server.get("/v1/nothing").fails(404, "not_found");
    }
    assert_eq!(server.get("/readyz").status, 200);
    server.wait_for("lost lines", |server| server.metric("beamline_log_lines_dropped_total", "") > 0.0);
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_reader_that_went_away() {
    let mut server = Server::start_logging_to(CASE, &["--log", "debug"], Stdio::piped());
    drop(server.take_stderr());
    serves_and_drains(server);
}

#[test]
fn a_full_disk() {
    let full = OpenOptions::new().write(true).open("/dev/full").unwrap();
    serves_and_drains(Server::start_logging_to(CASE, &["--log", "debug"], full.into()));
}

#[test]
fn a_reader_that_is_stuck() {
    let mut server = Server::start_logging_to(CASE, &["--log", "debug"], Stdio::piped());
    let _unread = server.take_stderr();
    // More than the pipe and the queue hold.
    let id = "x".repeat(128);
    let request = format!("GET /v1/nothing HTTP/1.1\r\nhost: x\r\nx-request-id: {id}\r\n\r\n");
    for _ in 0..200 {
        let head = format!("{}GET / HTTP/1.1\r\nhost: x\r\nconnection: close", request.repeat(100));
        assert!(read_raw(server.send_raw(&head, "")).contains("\"service\":\"beamline\""));
        if server.metric("beamline_log_lines_dropped_total", "") > 0.0 {
            break;
        }
    }
    serves_and_drains(server);
}
