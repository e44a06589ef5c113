//! Bad input: each kind its own error, and a server that goes on serving.

use std::io::{Read, Write};

use serde_json::{Value, json};

use crate::harness::{Server, history, items, read_raw};

const CASE: &str = "qwen3-untied";

#[test]
fn a_prompt_that_the_model_cannot_read_is_refused() {
    let server = Server::start("qwen3-collisions", &["--max-context", "64"]);
    let refused = |prompt: &str, kind: &str, part: &str| {
        let error = server.recommend(&json!({"prompt": prompt})).fails(422, kind);
        assert_eq!(error["param"], "prompt");
        assert!(error["message"].as_str().unwrap().contains(part), "{error}");
    };
    refused("I want a baby blanket", "invalid_value", "holds no word that the tokenizer of this model knows");
    // So long that no 64 tokens hold it: it is not even tokenised.
    refused(&"a ".repeat(30_000), "context_too_long", "has 60000 bytes");
    server.still_serves();
}

#[test]
fn bodies_that_are_no_request() {
    let server = Server::start(CASE, &["--max-body-bytes", "64KiB"]);
    let post = |body: &str| server.post_text("/v1/recommend", body, "application/json", &[]);
    for broken in ["", "{", "{\"history\": [}", "not json", "{\"history\": []} trailing", "\u{feff}"] {
        post(broken).fails(400, "invalid_json");
    }
    let shaped = |body: Value, param: &str| {
        let error = server.recommend(&body).fails(400, "invalid_request");
        assert_eq!(error["param"], param, "{body}");
    };
    shaped(json!({"history": "i1"}), "history");
    shaped(json!({"history": [{"item_id": 7.0}]}), "history[0].item_id");
    shaped(json!({"history": [{"item_id": "a", "when": 1}]}), "history[0].when");
    shaped(json!({"history": [], "num_items": "ten"}), "num_items");
    shaped(json!({"history": [], "num_items": 1.5}), "num_items");
    shaped(json!({"history": [], "beam_width": -1}), "beam_width");
    shaped(json!({"history": [], "beam_widths": [9, -1, 9]}), "beam_widths[1]");
    shaped(json!({"history": [], "beam_widths": 9}), "beam_widths");
    shaped(json!({"history": [], "beam_width": 9, "beam_widths": [9, 9, 9]}), "beam_widths");
    shaped(json!({"history": [], "normalization": "softmax"}), "normalization");
    shaped(json!({"history": [], "priority": "urgent"}), "priority");
    shaped(json!({"history": [], "beams": 5}), "beams");
    shaped(json!({"history": [], "filters": {"exclude": []}}), "filters.exclude");
    shaped(json!({"token_ids": [1, -1]}), "token_ids[1]");
    shaped(json!({"token_ids": [4_294_967_296_u64]}), "token_ids[0]");
    shaped(json!({}), "history");
    shaped(json!({"history": [], "prompt": "x"}), "prompt");
    shaped(json!({"history": [], "token_ids": [1], "prompt": "x"}), "prompt");
    server.recommend(&json!([1])).fails(400, "invalid_request");
    post(&format!("{{\"history\": {}", "[".repeat(10_000))).fails(400, "invalid_request");
    post(&format!("{{\"sid_prefix\": {}", "{\"a\":".repeat(10_000))).fails(400, "invalid_request");
    server.recommend(&json!([])).fails(400, "invalid_request");

    let media = |media| server.post_text("/v1/recommend", "{\"history\": []}", media, &[]);
    media("text/plain").fails(415, "unsupported_media_type");
    media("application/x-www-form-urlencoded").fails(415, "unsupported_media_type");
    assert_eq!(media("application/json; charset=utf-8").status, 200);

    post(&format!("{{\"prompt\": \"{}\"}}", "x".repeat(65_536))).fails(413, "body_too_large");
    // Without a declared length the limit holds all the same.
    let head = "POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n\
                transfer-encoding: chunked";
    let chunk = format!("11000\r\n{}\r\n0\r\n\r\n", " ".repeat(0x11000));
    let text = read_raw(server.send_raw(head, &chunk));
    assert!(text.starts_with("HTTP/1.1 413") && text.contains("body_too_large"), "{text}");
    server.still_serves();
}

#[test]
fn values_that_mean_nothing_or_are_over_their_limits() {
    let server = Server::start(
        CASE,
        &["--max-context", "400", "--max-history-items", "500", "--max-list-items", "20"],
    );
    let refused = |body: Value, kind: &str, param: &str| {
        let error = server.recommend(&body).fails(422, kind);
        assert_eq!(error["param"], param, "{body}");
    };
    refused(json!({"history": [], "num_items": 0}), "invalid_value", "num_items");
    refused(json!({"history": [], "num_items": 513}), "limit_exceeded", "num_items");
    refused(json!({"history": [], "num_items": u64::MAX}), "limit_exceeded", "num_items");
    refused(json!({"history": [], "beam_width": 0}), "invalid_value", "beam_width");
    refused(json!({"history": [], "beam_width": 513}), "limit_exceeded", "beam_width");
    refused(json!({"history": [], "beam_width": u64::MAX}), "limit_exceeded", "beam_width");
    refused(json!({"history": [], "beam_width": 9, "num_items": 10}), "invalid_value", "beam_width");
    for widths in
        [json!([]), json!([50, 50]), json!([50, 50, 50, 50]), json!([0, 50, 50]), json!([50, 50, 9])]
    {
        refused(json!({"history": [], "beam_widths": widths}), "invalid_value", "beam_widths");
    }
    let prefix = json!({"history": [], "sid_prefix": [1], "beam_widths": [50, 50, 50]});
    refused(prefix, "invalid_value", "beam_widths");
    refused(json!({"history": [], "beam_widths": [513, 50, 50]}), "limit_exceeded", "beam_widths");
    refused(json!({"history": [], "beam_widths": [50, 50, 513]}), "limit_exceeded", "beam_widths");
    refused(json!({"history": [], "beam_widths": vec![50; 21]}), "limit_exceeded", "beam_widths");
    refused(json!({"history": [], "timeout_ms": 0}), "invalid_value", "timeout_ms");
    refused(json!({"history": [], "timeout_ms": 60_001}), "limit_exceeded", "timeout_ms");
    refused(json!({"history": [], "timeout_ms": u64::MAX}), "limit_exceeded", "timeout_ms");
    refused(json!({"history": [], "user_id": "u".repeat(513)}), "limit_exceeded", "user_id");
    refused(json!({"history": [], "tenant": ""}), "invalid_value", "tenant");
    refused(json!({"history": [], "tenant": "a\nb"}), "invalid_value", "tenant");
    refused(json!({"history": [{"item_id": "i".repeat(513)}]}), "limit_exceeded", "history.item_id");
    refused(
        json!({"history": [], "filters": {"exclude_items": vec!["x"; 21]}}),
        "limit_exceeded",
        "filters.exclude_items",
    );
    refused(
        json!({"history": [], "filters": {"require_tags": vec!["x"; 21]}}),
        "limit_exceeded",
        "filters.require_tags",
    );
    refused(json!({"history": vec![json!({"item_id": "x"}); 501]}), "limit_exceeded", "history");
    refused(json!({"prompt": "x".repeat(300_000)}), "limit_exceeded", "prompt");
    refused(json!({"token_ids": [1, 448]}), "token_out_of_range", "token_ids");
    refused(json!({"history": history(&["x".to_owned()])}), "no_known_items", "history");
    server.recommend(&json!({"token_ids": []})).fails(422, "empty_context");
    server.recommend(&json!({"prompt": ""})).fails(422, "empty_context");
    server.recommend(&json!({"token_ids": vec![1; 401]})).fails(422, "context_too_long");
    server.recommend(&json!({"prompt": "word ".repeat(500)})).fails(422, "context_too_long");
    server.recommend(&json!({"token_ids": vec![1; 400], "sid_prefix": [4]})).fails(422, "context_too_long");
    assert_eq!(server.recommend(&json!({"token_ids": vec![1; 400]})).status, 200);
    // An over-long history is cut, not refused.
    let many: Vec<String> = items(CASE).into_iter().cycle().take(500).collect();
    assert!(
        server.recommend(&json!({"history": history(&many)})).ok()["dropped_history"].as_u64().unwrap() > 400
    );
    server.still_serves();
}

#[test]
fn names_paths_and_methods_that_do_not_exist() {
    let server = Server::start(CASE, &[]);
    let error = server.recommend(&json!({"history": [], "model": "gpt"})).fails(404, "model_not_found");
    assert_eq!(error["param"], "model");
    server.get("/v1/nothing").fails(404, "not_found");
    server.get("/v1/recommend").fails(405, "method_not_allowed");
    server.post("/metrics", &json!({})).fails(405, "method_not_allowed");
    let text = read_raw(server.send_raw("BREW / HTTP/1.1\r\nhost: x\r\nconnection: close", ""));
    assert!(text.starts_with("HTTP/1.1 405"), "{text}");
    let text = read_raw(server.send_raw("nonsense", ""));
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 400"), "{text}");
    server.still_serves();
}

#[test]
fn a_deadline_that_cannot_be_met() {
    let server = Server::start(CASE, &["--threads", "1", "--max-step-tokens", "64"]);
    let tokens: Vec<u32> = (0..4000).map(|index| index % 300).collect();
    let error =
        server.recommend(&json!({"token_ids": tokens, "timeout_ms": 1})).fails(504, "deadline_exceeded");
    assert_eq!(error["param"], Value::Null);
    server.post("/v1/warm", &json!({"token_ids": tokens, "timeout_ms": 1})).fails(504, "deadline_exceeded");
    server.still_serves();
}

#[test]
fn overload_is_answered() {
    let server = Server::start(
        CASE,
        &["--threads", "1", "--max-running", "1", "--max-queued", "2", "--max-step-tokens", "64"],
    );
    let answers: Vec<_> = std::thread::scope(|scope| {
        let send = |user: u32| {
            let server = &server;
            scope.spawn(move || {
                let tokens: Vec<u32> = (0..4000).map(|index| (index + user) % 300).collect();
                server.recommend(&json!({"token_ids": tokens}))
            })
        };
        let threads: Vec<_> = (0..16).map(send).collect();
        threads.into_iter().map(|thread| thread.join().unwrap()).collect()
    });
    let refused: Vec<_> = answers.iter().filter(|answer| answer.status != 200).collect();
    assert!(!refused.is_empty() && refused.len() < 16, "{} refused", refused.len());
    for answer in refused {
        answer.fails(429, "overloaded");
        assert_eq!(answer.headers["retry-after"], "1");
    }
    server.still_serves();
}

#[test]
fn slow_bodies_and_heads_are_bounded() {
    let server = Server::start(CASE, &["--read-timeout-ms", "300"]);
    let head = "POST /v1/recommend HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\nconnection: close\r\n\
                content-length: 100";
    let text = read_raw(server.send_raw(head, "{\"history\""));
    assert!(text.starts_with("HTTP/1.1 408") && text.contains("request_timeout"), "{text}");
    // A head that never ends: the connection is closed.
    let mut stream = std::net::TcpStream::connect(server.address).unwrap();
    stream.set_read_timeout(Some(crate::harness::PATIENCE)).unwrap();
    std::io::Write::write_all(&mut stream, b"GET /livez HTTP/1.1\r\nhost:").unwrap();
    let text = read_raw(stream);
    assert!(text.is_empty() || text.starts_with("HTTP/1.1 4"), "{text}");
    server.still_serves();
}

#[test]
fn no_error_leaks_what_is_inside() {
    let server = Server::start(CASE, &[]);
    let answers = [
        server.get("/nothing"),
        server.recommend(&json!({"history": [{"item_id": 7}]})),
        server.recommend(&json!({"prompt": "x", "model": "../../etc/passwd"})),
    ];
    for answer in answers {
        assert!(!answer.text.contains("fixtures") && !answer.text.contains(".rs"), "{}", answer.text);
    }
}

#[test]
fn a_refusal_before_the_body_says_that_the_connection_ends() {
    let server = Server::start("qwen3-untied", &[]);
    let answer = |path: &str, kind: &str, body: &str| {
        let mut stream = std::net::TcpStream::connect(server.address).unwrap();
        let length = body.len();
        let head = format!(
            "POST {path} HTTP/1.1\r\nhost: a\r\ncontent-type: {kind}\r\ncontent-length: {length}\r\n\r\n"
        );
        stream.write_all(head.as_bytes()).unwrap();
        // The body in a packet of its own, after the answer.
        std::thread::sleep(std::time::Duration::from_millis(50));
        let _ = stream.write_all(body.as_bytes());
        stream.set_read_timeout(Some(std::time::Duration::from_secs(5))).unwrap();
        let (mut text, mut buffer) = (String::new(), [0; 4096]);
        while !text.contains("\r\n\r\n") {
            match stream.read(&mut buffer) {
                Ok(0) | Err(_) => break,
                Ok(count) => text.push_str(&String::from_utf8_lossy(&buffer[..count])),
            }
        }
        text.to_lowercase()
    };
    for (path, kind, status) in
        [("/v1/nothing", "application/json", "404"), ("/v1/recommend", "text/plain", "415")]
    {
        let text = answer(path, kind, "{}");
        assert!(
            text.starts_with(&format!("http/1.1 {status}")) && text.contains("connection: close"),
            "{text}"
        );
    }
    // A body that was read is no reason.
    let text = answer("/v1/recommend", "application/json", "{}");
    assert!(text.starts_with("http/1.1 4") && !text.contains("connection: close"), "{text}");
}
