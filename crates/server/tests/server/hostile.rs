//! Clients that are slow, silent or many: they cost themselves, and nobody else.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use serde_json::json;

use crate::harness::{PATIENCE, Server, read_raw};
use crate::root::Root;

const CASE: &str = "qwen3-untied";

/// The head of a request whose body is still to come.
fn head(method: &str, path: &str, media: &str, length: usize, more: &str) -> String {
    format!("{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {media}\r\n{more}content-length: {length}")
}

/// Reads one answer, headers in small letters, with a body of the declared length.
fn read_answer(stream: &mut TcpStream) -> String {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let (mut text, mut buffer) = (String::new(), [0; 4096]);
    loop {
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).unwrap_or("0");
            if body.len() >= length.parse::<usize>().unwrap() {
                return text;
            }
        }
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => return text,
            Ok(count) => text.push_str(&String::from_utf8_lossy(&buffer[..count]).to_lowercase()),
        }
    }
}

#[test]
fn slow_bodies_refuse_nobody() {
    // The engine takes two requests; 64 more may be on their way.
    let flags = ["--max-running", "1", "--max-queued", "1", "--read-timeout-ms", "60000"];
    let server = Server::start(CASE, &flags);
    let head = head("POST", "/v1/recommend", "application/json", 100_000, "");
    let slow: Vec<_> = (0..200).map(|_| server.send_raw(&head, "{\"history\"")).collect();
    for _ in 0..10 {
        server.recommend(&json!({"history": [], "num_items": 2})).ok();
    }
    // They do not keep the least pace, and are told so long before the read time-out.
    for stream in slow {
        assert!(read_raw(stream).starts_with("HTTP/1.1 408"));
    }
}

#[test]
fn large_bodies_are_bounded_together_and_keep_no_small_one_out() {
    let server = Server::start(CASE, &["--max-body-memory", "1MiB", "--max-body-bytes", "1MiB"]);
    let head = head("POST", "/v1/recommend", "application/json", 1 << 20, "");
    let large = || server.send_raw(&head, &" ".repeat(900 << 10));
    let mut streams = [large(), large()];
    let refused = streams.each_mut().map(|stream| {
        stream.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
        let mut buffer = [0; 1024];
        let count = stream.read(&mut buffer).unwrap_or(0);
        String::from_utf8_lossy(&buffer[..count]).starts_with("HTTP/1.1 429")
    });
    assert_eq!(refused.iter().filter(|refused| **refused).count(), 1, "{refused:?}");
    server.still_serves();
}

#[test]
fn after_an_early_refusal_the_client_knows_whether_the_connection_goes_on() {
    let root = Root::new();
    let server = root.serve(&["--max-body-bytes", "64KiB"]);
    let json = "application/json";
    let refusals = [
        ("POST", "/v1/nothing", json, "", "404"),
        ("PUT", "/v1/recommend", json, "", "405"),
        ("POST", "/v1/recommend", "text/plain", "", "415"),
        ("POST", "/v1/recommend", json, "content-encoding: gzip\r\n", "415"),
        ("POST", "/v1/recommend", json, "host: y\r\n", "400"),
        ("POST", "/v1/models/x/load", json, "origin: http://elsewhere\r\n", "403"),
        ("POST", "/v1/models/x/load", json, "x-forwarded-for: 1.2.3.4\r\n", "403"),
        ("PUT", "/v1/models/none/catalog", "application/x-ndjson", "", "404"),
        ("POST", "/v1/recommend", json, "", "400"),
    ];
    for (method, path, media, more, status) in refusals {
        let body = "{\"histori\": 1}";
        let mut stream = server.send_raw(&head(method, path, media, body.len(), more), "");
        std::thread::sleep(Duration::from_millis(30));
        let _ = stream.write_all(body.as_bytes());
        let answer = read_answer(&mut stream);
        assert!(answer.starts_with(&format!("http/1.1 {status}")), "{method} {path} {more}: {answer}");
        if !answer.contains("connection: close") {
            stream.write_all(b"GET /livez HTTP/1.1\r\nhost: x\r\n\r\n").unwrap();
            let next = read_answer(&mut stream);
            assert!(next.starts_with("http/1.1 200"), "after {method} {path} {more}: {next}");
        }
    }
    // A large body that is refused by its length: the answer is read, not a reset.
    let mut stream = server.send_raw(&head("POST", "/v1/recommend", json, 8 << 20, ""), "");
    stream.write_all(&vec![b' '; 8 << 20]).unwrap();
    let answer = read_answer(&mut stream);
    assert!(answer.starts_with("http/1.1 413") && answer.contains("connection: close"), "{answer}");
}

#[test]
fn a_compressed_body_is_refused_by_the_name_of_its_encoding() {
    let server = Server::start(CASE, &[]);
    let encoded = |encoding| {
        let headers = [("content-encoding", encoding)];
        server.post_text("/v1/recommend", "{\"history\": []}", "application/json", &headers)
    };
    let error = encoded("br").fails(415, "unsupported_media_type");
    assert!(error["message"].as_str().unwrap().contains("content-encoding: br"), "{error}");
    assert_eq!(encoded("identity").status, 200);
}

#[test]
fn idle_connections_keep_nobody_out() {
    let server = Server::start(CASE, &["--max-connections", "20"]);
    let connect = || TcpStream::connect(server.address).unwrap();
    let mut idle: Vec<_> = (0..200).map(|_| connect()).collect();
    for _ in 0..5 {
        assert_eq!(server.get("/livez").status, 200);
        server.still_serves();
        idle.extend((0..50).map(|_| connect()));
    }
}

#[test]
fn health_is_answered_when_all_connections_are_at_work() {
    let server =
        Server::start(CASE, &["--max-connections", "4", "--threads", "1", "--max-step-tokens", "64"]);
    let tokens = |user: u32| (0..4000).map(|index| (index * 7 + user) % 360).collect::<Vec<u32>>();
    let work: Vec<_> = (0..4)
        .map(|user| {
            server
                .send_recommend(&json!({"token_ids": tokens(user), "beam_width": 256, "timeout_ms": 60_000}))
        })
        .collect();
    server.wait_for("work", |server| server.metric("beamline_requests_running", "") > 0.0);
    assert_eq!(server.get("/livez").status, 200);
    assert_eq!(server.get("/v2/health/ready").status, 200);
    drop(work);
}

#[test]
fn a_listener_for_health_checks_alone() {
    let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let server = Server::start(CASE, &["--health-listen", &port.to_string()]);
    let ask = |path: &str| {
        let mut stream = TcpStream::connect(port).unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).unwrap();
        read_raw(stream)
    };
    for path in ["/livez", "/readyz", "/metrics"] {
        assert!(ask(path).starts_with("HTTP/1.1 200"), "{path}");
    }
    assert!(ask("/v1/models").starts_with("HTTP/1.1 404"));
    server.still_serves();
}

#[test]
fn few_file_handles() {
    let server = Server::start_with_open_files(CASE, 256, &[]);
    let idle: Vec<_> = (0..400).map(|_| TcpStream::connect(server.address).unwrap()).collect();
    for _ in 0..20 {
        assert_eq!(server.get("/livez").status, 200);
    }
    drop(idle);
    server.still_serves();
}

#[test]
fn catalogs_that_arrive_share_the_room_of_one() {
    let root = Root::new();
    let server = root.serve(&["--max-catalog-bytes", "1MiB"]);
    let media = "application/x-ndjson";
    let expect = "expect: 100-continue\r\n";
    let mut first = server.send_raw(&head("PUT", "/v1/models/shop/catalog", media, 900_000, expect), "");
    // The server asks for the body when it has reserved the room. A second upload that came before would
    // be the first.
    assert!(read_answer(&mut first).starts_with("http/1.1 100"));
    let second = || {
        let line = " ".repeat(600_000);
        server.call("PUT", "/v1/models/shop/catalog", Some(&line), &[("content-type", media)])
    };
    let refused = second();
    refused.fails(429, "uploads_busy");
    assert!(refused.headers.contains_key("retry-after"));
    // A small change still goes through, and the next large one after the first is gone.
    let retag = json!({"retag": [{"item_id": crate::harness::items(crate::root::CASE)[0], "tags": ["x"]}]});
    let patch = server.call(
        "PATCH",
        "/v1/models/shop/catalog",
        Some(&retag.to_string()),
        &[("content-type", "application/json")],
    );
    assert_eq!(patch.status, 200, "{}", patch.text);
    drop(first);
    server.wait_for("room", |_| second().status == 422);
}
