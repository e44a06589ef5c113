//! The examples of the project give the answers of the server, and wait as it says.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::time::{Duration, Instant};

use serde_json::json;

use crate::harness::{Server, ids};

const HISTORY: [&str; 3] =
    ["trail-running-shoe-women-red", "family-stamp-kit-music", "soft-night-light-music"];

fn project() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn demo() -> PathBuf {
    project().join("weights/demo/checkpoint")
}

/// An example of Rust: cargo builds them beside the tests.
fn built(name: &str) -> Command {
    let tests = std::env::current_exe().unwrap();
    Command::new(tests.parent().unwrap().join("../examples").join(name))
}

fn python() -> Command {
    let mut command = Command::new("python3");
    command.arg(project().join("examples/client.py"));
    command
}

/// The last words of the lines.
fn words(output: &Output) -> Vec<String> {
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8_lossy(&output.stdout);
    text.lines().map(|line| line.rsplit(' ').next().unwrap().trim_matches('"').to_owned()).collect()
}

#[test]
fn embedded_or_over_http_items_are_the_same() {
    let server = Server::start_at(&demo(), &[]);
    let served = ids(&server.recommend(&json!({"history": HISTORY, "num_items": 10})).ok());
    let output = built("embed").arg(demo()).args(HISTORY).output().unwrap();
    assert_eq!(words(&output), served);

    // Five items, and then the same in the order of their ranks, though they were given in the reverse.
    let twice = [&served[..5], &served[..5]].concat();
    for mut client in [built("client"), python()] {
        let output = client.arg(format!("http://{}", server.address)).args(HISTORY).output().unwrap();
        assert_eq!(words(&output), twice);
    }
}

#[test]
fn clients_wait_as_long_as_the_server_says_and_give_up_on_other_errors() {
    for (client, status) in [(built("client"), 429), (python(), 503)] {
        let (waited, output) = with_answers(client, &[(status, "retry-after: 1\r\n"), (422, "")]);
        assert!(waited >= Duration::from_secs(1), "{waited:?}");
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && said.contains("422") && said.contains("no such item"), "{said}");
    }
}

/// Runs a client against these answers, given one after the other.
fn with_answers(mut client: Command, answers: &[(u16, &str)]) -> (Duration, Output) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    std::thread::scope(|scope| {
        scope.spawn(move || {
            for (status, header) in answers {
                let (mut stream, _) = listener.accept().unwrap();
                // Read the whole request, so that closing the connection does not reset it: its body
                // ends with a brace.
                let (mut request, mut byte) = (Vec::new(), [0]);
                while !request.ends_with(b"}") && stream.read(&mut byte).unwrap() > 0 {
                    request.push(byte[0]);
                }
                let body = r#"{"error": {"type": "some_error", "message": "no such item"}}"#;
                let length = body.len();
                let head = format!(
                    "HTTP/1.1 {status} -\r\n{header}connection: close\r\ncontent-length: {length}\r\n"
                );
                write!(stream, "{head}content-type: application/json\r\n\r\n{body}").unwrap();
            }
        });
        let start = Instant::now();
        let output = client.arg(url).args(HISTORY).output().unwrap();
        (start.elapsed(), output)
    })
}
