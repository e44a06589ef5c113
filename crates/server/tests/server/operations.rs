//! What operators rely on: health, metrics, hang-ups, draining.

use std::io::Read;

use serde_json::{Value, json};

use crate::harness::{Server, beamline, fixture, read_raw};

const CASE: &str = "qwen3-untied";
/// A server that takes its time, so that there is time to interfere.
/// Steps of few tokens, and time enough on a busy machine.
const SLOW: [&str; 6] = ["--threads", "1", "--max-step-tokens", "64", "--default-timeout-ms", "60000"];

fn long(user: u32) -> Value {
    let tokens: Vec<u32> = (0..4000).map(|index| (index * 7 + user) % 360).collect();
    json!({"user_id": format!("u{user}"), "token_ids": tokens, "beam_width": 256})
}

#[test]
fn health_models_and_index() {
    let server = Server::start(CASE, &["--name", "shop"]);
    assert_eq!(server.get("/livez").ok()["status"], "ok");
    assert_eq!(server.get("/readyz").ok()["status"], "ok");
    let models = server.get("/v1/models").ok();
    let model = &models["models"][0];
    assert_eq!(
        (&model["name"], &model["state"], &model["family"]),
        (&json!("shop"), &json!("ready"), &json!("qwen"))
    );
    assert_eq!(model["architecture"], "Qwen3ForCausalLM");
    assert_eq!(model["parameters"], 89_392);
    // 4096 positions, 3 of them generated.
    assert_eq!(model["context_limit"], 4093);
    assert_eq!(model["max_history_items"], (4093 - 27) / 5);
    assert_eq!((&model["levels"], &model["generated_steps"]), (&json!(3), &json!(3)));
    assert_eq!((&model["catalog"]["items"], &model["catalog"]["leaves"]), (&json!(130), &json!(130)));
    assert_eq!(server.get("/").ok()["recommend"], "POST /v1/recommend");
    assert_eq!(server.get("/openapi.json").ok()["info"]["title"], "beamline");
}

#[test]
fn metrics_tell_what_happened() {
    let server = Server::start(CASE, &[]);
    let body = json!({"history": crate::harness::history(&crate::harness::items(CASE)[..40])});
    server.recommend(&body).ok();
    server.recommend(&body).ok();
    server.recommend(&json!({"history": [], "num_items": 0}));
    // The engine publishes its numbers after it has answered.
    server.wait_for("the engine's numbers", |server| {
        server.metric("beamline_engine_requests_total", "end=\"finished\"") >= 3.0
    });
    let text = server.get("/metrics").text;
    for line in [
        "beamline_build_info{version=",
        "beamline_model_info{name=\"default\",sha256=",
        "beamline_ready 1",
        "beamline_requests_total{endpoint=\"/v1/recommend\",outcome=\"ok\"} 2",
        "beamline_requests_total{endpoint=\"/v1/recommend\",outcome=\"invalid_value\"} 1",
        "beamline_stage_seconds_bucket{stage=\"prefill\",le=\"0.001\"}",
        "beamline_stage_seconds_bucket{stage=\"total\",le=\"0.15\"}",
        "beamline_stage_seconds_count{stage=\"decode\"} 2",
        "beamline_requests_queued 0",
        "beamline_requests_running 0",
        "beamline_pages{state=\"free\"}",
        "beamline_pages{state=\"cached\"}",
        "beamline_pages{state=\"referenced\"} 0",
        "beamline_prefix_tokens_total{result=\"hit\"}",
        "beamline_prefix_lookups_total",
        "beamline_page_evictions_total 0",
        "beamline_steps_total{result=\"ok\"}",
        "beamline_rows_total{kind=\"branch\"}",
        "beamline_engine_requests_total{end=\"cancelled\"} 0",
        "beamline_engine_requests_total{end=\"expired\"} 0",
        "# HELP beamline_requests_total",
        "# TYPE beamline_stage_seconds histogram",
    ] {
        assert!(text.lines().any(|found| found.starts_with(line)), "{line} is not in\n{text}");
    }
    assert!(server.metric("beamline_prefix_tokens_total", "result=\"hit\"") >= 192.0);
}

#[cfg(target_os = "linux")]
#[test]
fn metrics_tell_what_the_process_takes() {
    let before = std::time::SystemTime::now();
    let server = Server::start(CASE, &[]);
    // Of pages and ticks, the system counts whole ones.
    let near = |found: f64, expected: f64, slack: f64| {
        assert!((found - expected).abs() <= slack, "{found} is not {expected}");
    };
    let resident = server.metric("process_resident_memory_bytes", "");
    near(resident, server.resident() as f64, 16e6);
    assert!(server.metric("process_virtual_memory_bytes", "") >= resident);
    let start = before.duration_since(std::time::UNIX_EPOCH).unwrap().as_secs_f64();
    near(server.metric("process_start_time_seconds", ""), start, 10.0);
    let (open, most) = (server.metric("process_open_fds", ""), server.metric("process_max_fds", ""));
    assert!(open >= 3.0 && open < most, "{open} of {most}");
    let _connections: Vec<_> =
        (0..20).map(|_| std::net::TcpStream::connect(server.address).unwrap()).collect();
    server.wait_for("more open files", |server| server.metric("process_open_fds", "") >= open + 20.0);
    assert!(server.metric("process_threads", "") >= 3.0);
    // It counts whole seconds, so it may be 0; it is there.
    assert!(server.get("/metrics").text.contains("\nprocess_cpu_seconds_total "));
}

#[test]
fn a_client_that_hangs_up_frees_its_pages() {
    let server = Server::start(CASE, &SLOW);
    let streams: Vec<_> = (0..24).map(|user| server.send_recommend(&long(user))).collect();
    server.wait_for("the requests to run", |server| server.metric("beamline_pages", "referenced") > 0.0);
    drop(streams);
    server.wait_for("the requests to go", |server| {
        server.metric("beamline_pages", "referenced") == 0.0
            && server.metric("beamline_requests_running", "") == 0.0
            && server.metric("beamline_requests_queued", "") == 0.0
            && server.metric("beamline_requests_total", "outcome=\"cancelled\"") > 0.0
            // The engine learns of it a moment after the connection.
            && server.metric("beamline_engine_requests_total", "end=\"cancelled\"") > 0.0
    });
    server.still_serves();
}

#[test]
fn sigterm_lets_requests_finish() {
    let mut server = Server::start(CASE, &SLOW);
    let streams: Vec<_> = (0..6).map(|user| server.send_recommend(&long(user))).collect();
    server.wait_for("the requests to arrive", |server| {
        server.metric("beamline_requests_running", "") + server.metric("beamline_requests_queued", "") >= 6.0
    });
    server.signal("TERM");
    for stream in streams {
        let text = read_raw(stream);
        assert!(text.starts_with("HTTP/1.1 200"), "{text}");
    }
    assert_eq!(server.wait().code(), Some(0));
    assert!(std::net::TcpStream::connect(server.address).is_err(), "nobody listens any more");
}

#[test]
fn while_draining_it_says_so_and_goes_on_answering_for_the_delay() {
    let mut server = Server::start(CASE, &["--drain-delay-ms", "2000"]);
    server.signal("INT");
    server.wait_for("readiness to go", |server| server.get("/readyz").status == 503);
    let answer = server.get("/readyz");
    answer.fails(503, "draining");
    assert_eq!(answer.headers["retry-after"], "2");
    assert_eq!(server.get("/livez").status, 200);
    server.still_serves();
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn draining_does_not_wait_for_ever() {
    let mut server = Server::start(CASE, &[&SLOW[..], &["--drain-timeout-ms", "100"]].concat());
    let _streams: Vec<_> = (0..24).map(|user| server.send_recommend(&long(user))).collect();
    server.wait_for("the requests to run", |server| server.metric("beamline_requests_running", "") > 0.0);
    server.signal("TERM");
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn logs_are_json_and_carry_the_request_id() {
    let mut child = beamline()
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--log-format",
            "json",
            "--kv-memory",
            "32MiB",
            "--checkpoint",
        ])
        .arg(fixture(CASE))
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let mut stdout = std::io::BufReader::new(child.stdout.take().unwrap());
    std::io::BufRead::read_line(&mut stdout, &mut line).unwrap();
    let url = line.trim().strip_prefix("listening on ").unwrap().to_owned();
    let agent: ureq::Agent = ureq::Agent::config_builder().http_status_as_error(false).build().into();
    let start = std::time::Instant::now();
    while agent.get(format!("{url}/readyz")).call().unwrap().status() != 200 {
        assert!(start.elapsed() < crate::harness::PATIENCE);
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    let request = agent.post(format!("{url}/v1/recommend")).header("x-request-id", "find-me");
    assert_eq!(request.send_json(json!({"history": []})).unwrap().status(), 200);
    let pid = child.id().to_string();
    assert!(std::process::Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
    let mut log = String::new();
    child.stderr.take().unwrap().read_to_string(&mut log).unwrap();
    assert!(child.wait().unwrap().success());
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    let messages: Vec<&str> = lines.iter().filter_map(|line| line["message"].as_str()).collect();
    for message in [
        "listening",
        "opened the checkpoint",
        "loaded the weights",
        "answered the probe",
        "ready",
        "draining",
        "stopped",
    ] {
        assert!(messages.contains(&message), "{message} is not in {messages:?}");
    }
    let answered = lines.iter().find(|line| line["message"] == "answered").unwrap();
    assert_eq!(answered["span"]["request_id"], "find-me");
    assert_eq!((&answered["status"], &answered["outcome"]), (&json!(200), &json!("ok")));
}
