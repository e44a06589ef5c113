//! Requests that are none, or that mean two things.

use std::io::Write;
use std::time::Duration;

use anyhow::Result;

use crate::attack::arena::Arena;
use crate::attack::bystanders::Bystanders;
use crate::attack::outcome::Outcome;
use crate::attack::wire;

/// A request that an ambiguous one tries to smuggle in.
const SMUGGLED: &str = "GET /v1/models HTTP/1.1\r\nhost: smuggled\r\n\r\n";
/// How long more of an answer is waited for.
const PATIENCE: Duration = Duration::from_millis(150);

/// What must become of a shape.
enum Fate {
    /// It is refused, or closed without an answer.
    Refused,
    /// It is answered with this status.
    Status(u16),
}

fn shapes() -> Vec<(&'static str, Vec<u8>, Fate)> {
    use Fate::{Refused, Status};
    let post = |headers: &str, body: &str| {
        format!("POST /v1/warm HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n{headers}\r\n{body}")
            .into_bytes()
    };
    let get = |headers: &str| format!("GET /livez HTTP/1.1\r\n{headers}\r\n").into_bytes();
    let smuggle = format!("0\r\n\r\n{SMUGGLED}");
    vec![
        ("both lengths", post("content-length: 6\r\ntransfer-encoding: chunked\r\n", &smuggle), Refused),
        ("two lengths", post("content-length: 2\r\ncontent-length: 90\r\n", &smuggle), Refused),
        ("signed length", post("content-length: +2\r\n", &smuggle), Refused),
        ("length of hex", post("content-length: 0x2\r\n", &smuggle), Refused),
        ("endless length", post("content-length: 99999999999999999999999\r\n", &smuggle), Refused),
        ("obfuscated encoding", post("transfer-encoding: xchunked\r\n", &smuggle), Refused),
        ("encoding twice", post("transfer-encoding: chunked, chunked\r\n", &smuggle), Refused),
        ("encoding of tabs", post("transfer-encoding:\tchunked\x0b\r\n", &smuggle), Refused),
        ("space before colon", post("content-length : 2\r\n", "{}"), Refused),
        ("bad chunk size", post("transfer-encoding: chunked\r\n", "zz\r\n{}\r\n0\r\n\r\n"), Refused),
        ("huge chunk size", post("transfer-encoding: chunked\r\n", "ffffffffffffffffff\r\n{}"), Refused),
        ("folded header", get("host: x\r\n y: z\r\n"), Refused),
        ("two hosts", get("host: x\r\nhost: y\r\n"), Status(400)),
        ("same host twice", get("host: x\r\nhost: x\r\n"), Status(400)),
        ("no host", get("accept: */*\r\n"), Status(400)),
        ("no such host", get("host: a b/c\r\n"), Status(400)),
        ("null in header", get("host: x\r\na: \0\r\n"), Refused),
        ("not HTTP", b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(), Refused),
        ("HTTP/2", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".to_vec(), Refused),
        ("no version", b"GET /livez\r\n\r\n".to_vec(), Refused),
        ("version 3", b"GET /livez HTTP/3.0\r\nhost: x\r\n\r\n".to_vec(), Refused),
        ("large head", get(&format!("host: x\r\na: {}\r\n", "x".repeat(200_000))), Refused),
        ("many headers", get(&format!("host: x\r\n{}", "a: b\r\n".repeat(2000))), Refused),
        ("traversal", b"GET /v1/../../etc/passwd HTTP/1.1\r\nhost: x\r\n\r\n".to_vec(), Status(404)),
        ("compressed", post("content-encoding: gzip\r\ncontent-length: 2\r\n", "{}"), Status(415)),
        ("too large", post("content-length: 100000000\r\n", ""), Status(413)),
        ("deep JSON", wire::post("/v1/recommend", &"[".repeat(500_000)).into_bytes(), Status(400)),
        ("pipelined", get("host: x\r\n").repeat(50), Status(200)),
    ]
}

/// Every shape several times, over connections of its own.
pub(super) fn run(arena: &Arena) -> Result<Outcome> {
    let server = arena.serve(&[])?;
    let bystanders = Bystanders::watch(&server);
    let mut outcome = Outcome::default();
    let shapes = shapes();
    for (name, bytes, fate) in &shapes {
        let mut stream = wire::connect(server.address)?;
        let _ = stream.write_all(bytes);
        let answer = wire::read_all(&mut stream, PATIENCE);
        let status = wire::status(&answer);
        let good = match fate {
            Fate::Refused => status == 0 || (400..500).contains(&status),
            Fate::Status(expected) => status == *expected,
        };
        outcome.expect(good, format!("{name}: status {status}"));
        outcome.expect(!answer.contains("\"models\""), format!("{name}: a request was smuggled in"));
    }
    outcome.happened = format!("{} shapes", shapes.len());
    outcome.witness = Some(bystanders.stop());
    Ok(outcome)
}
