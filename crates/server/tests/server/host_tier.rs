//! Contexts that no longer fit into the KV memory come back from host memory, and only the time changes.

use serde_json::{Value, json};

use crate::determinism::essence;
use crate::harness::{Random, Server, history, items};
use crate::root::Root;

const CASE: &str = "qwen3-untied";
/// Room for one largest request and little else, so that every user displaces the others.
const TINY: [&str; 6] = ["--kv-memory", "1MiB", "--max-context", "1024", "--max-beam-width", "128"];

fn tiny(more: &[&str]) -> Server {
    Server::start(CASE, &[&TINY[..], more].concat())
}

fn visit(user: usize, past: &[String]) -> Value {
    json!({"user_id": format!("u{user}"), "history": history(past), "num_items": 10, "beam_width": 60})
}

fn cached(answer: &Value) -> u64 {
    answer["usage"]["cached_tokens"].as_u64().unwrap()
}

/// Histories that take 9 to 21 pages, of several users.
fn histories(random: &mut Random, users: usize) -> Vec<Vec<String>> {
    let catalog = items(CASE);
    (0..users).map(|_| (0..60 + random.below(70)).map(|_| random.pick(&catalog).clone()).collect()).collect()
}

#[test]
fn evicted_contexts_come_back_and_the_answers_are_the_same() {
    evicted_contexts_come_back(&tiny(&["--kv-host-memory", "64MiB"]), &tiny(&[]), &[]);
}

#[test]
fn evicted_contexts_in_bfloat16_come_back_and_the_answers_are_the_same() {
    // As many pages, each of half the size.
    let tiny = |more: &[&str]| {
        let kv = ["--kv-format", "bf16", "--kv-memory", "512KiB"];
        Server::start(CASE, &[&kv, &TINY[2..], more].concat())
    };
    let more = ["--kv-format", "bf16"];
    evicted_contexts_come_back(&tiny(&["--kv-host-memory", "64MiB"]), &tiny(&[]), &more);
}

fn evicted_contexts_come_back(with: &Server, without: &Server, more: &[&str]) {
    let reference = Server::start(CASE, &[&TINY[2..], more].concat());
    let catalog = items(CASE);
    let mut random = Random(21);
    let mut users = histories(&mut random, 12);
    let mut saved = [0, 0];
    for round in 0..5 {
        for (user, past) in users.iter_mut().enumerate() {
            past.extend((0..1 + random.below(3)).map(|_| random.pick(&catalog).clone()));
            let request = visit(user, past);
            let mut cold = request.clone();
            cold["tenant"] = json!(format!("cold {round} {user}"));
            let expected = reference.recommend(&cold).ok();
            assert_eq!(cached(&expected), 0);
            for (server, saved) in [with, without].into_iter().zip(&mut saved) {
                let answer = server.recommend(&request).ok();
                assert_eq!(essence(&answer), essence(&expected), "round {round}: {request}");
                *saved += cached(&answer);
            }
            if round > 0 {
                // All pages of the last visit, except its last, partly filled one; none of them can be
                // left on the device.
                let before = 27 + (past.len() - 3) as u64 * 5;
                let found = cached(&with.recommend(&request).ok());
                assert!(found + 64 >= before, "{found} of {before} tokens of the last visit were found");
            }
        }
    }
    assert!(saved[0] > 5 * saved[1].max(1000), "{saved:?}");
    with.wait_for("the engine's numbers", |server| {
        server.metric("beamline_prefix_tokens_total", "restored") > 10_000.0
    });
    for (metric, label) in [
        ("beamline_host_pages", ""),
        ("beamline_host_bytes", "used"),
        ("beamline_host_lookups_total", ""),
        ("beamline_host_exported_pages_total", ""),
        ("beamline_host_restored_pages_total", ""),
    ] {
        assert!(with.metric(metric, label) > 0.0, "{metric}");
        assert_eq!(without.metric(metric, label), 0.0, "{metric}");
    }
    assert_eq!(with.metric("beamline_host_bytes", "capacity"), f64::from(64 << 20));
    assert_eq!(with.metric("beamline_hash_collisions_total", ""), 0.0);
}

#[test]
fn many_users_at_once_are_answered_as_if_each_were_alone() {
    let server = tiny(&["--kv-host-memory", "8MiB"]);
    let reference = Server::start(CASE, &TINY[2..]);
    let users = histories(&mut Random(22), 8);
    let expected: Vec<String> = users
        .iter()
        .enumerate()
        .map(|(user, past)| essence(&reference.recommend(&visit(user, past)).ok()))
        .collect();
    std::thread::scope(|scope| {
        for (user, (past, expected)) in users.iter().zip(&expected).enumerate() {
            let server = &server;
            scope.spawn(move || {
                for round in 0..12 {
                    let answer = server.recommend(&visit(user, past)).ok();
                    assert_eq!(essence(&answer), *expected, "user {user}, round {round}");
                }
            });
        }
    });
    server.wait_for("the engine's numbers", |server| {
        server.metric("beamline_prefix_tokens_total", "restored") > 1000.0
    });
    assert!(server.metric("beamline_host_bytes", "used") <= server.metric("beamline_host_bytes", "capacity"));
}

#[test]
fn host_memory_is_bounded_and_pages_grow_old() {
    let server = tiny(&["--kv-host-memory", "512KiB", "--kv-host-ttl-seconds", "1"]);
    for (user, past) in histories(&mut Random(23), 12).iter().enumerate() {
        server.recommend(&visit(user, past)).ok();
        assert!(server.metric("beamline_host_bytes", "used") <= f64::from(512 << 10));
    }
    server.wait_for("pages to go for want of room", |server| {
        server.metric("beamline_host_dropped_pages_total", "room") > 0.0
    });
    // Nobody asks for anything, and they go all the same.
    server.wait_for("pages to grow old", |server| {
        server.metric("beamline_host_pages", "") == 0.0 && server.metric("beamline_host_bytes", "used") == 0.0
    });
    assert!(server.metric("beamline_host_dropped_pages_total", "age") > 0.0);
    server.still_serves();
}

#[test]
fn host_pages_belong_to_their_tenant() {
    let server = tiny(&["--kv-host-memory", "64MiB"]);
    let users = histories(&mut Random(24), 8);
    let of = |tenant: &str, user: usize| {
        let mut request = visit(user, &users[user]);
        request["tenant"] = json!(tenant);
        cached(&server.recommend(&request).ok())
    };
    for user in 0..8 {
        assert_eq!(of("a", user), 0);
    }
    for user in 0..4 {
        assert_eq!(of("b", user), 0, "another tenant's pages were used");
    }
    assert!((0..4).all(|user| of("a", user) > 0));
}

#[test]
fn a_version_that_is_unloaded_takes_its_host_pages_with_it() {
    let root = Root::new();
    let server = root.serve(&[&TINY[..], &["--kv-host-memory", "64MiB"]].concat());
    let users = histories(&mut Random(25), 8);
    for (user, past) in users.iter().enumerate() {
        server.recommend(&visit(user, past)).ok();
    }
    server.wait_for("pages in host memory", |server| server.metric("beamline_host_pages", "") > 50.0);
    let models = server.get("/v1/models").ok();
    let (a, memory) = (models["models"][0]["version"].clone(), &models["models"][0]["memory"]);
    assert_eq!(memory["kv_host_bytes"], 64 << 20);
    let parts = ["weights_bytes", "kv_bytes", "kv_host_bytes"];
    let catalog = models["models"][0]["catalog"]["memory_bytes"].as_u64().unwrap();
    let of_one = catalog + parts.iter().map(|part| memory[part].as_u64().unwrap()).sum::<u64>();
    assert_eq!(models["memory"]["used_bytes"].as_u64(), Some(of_one));

    server.post("/v1/models/shop/load", &json!({"directory": "b", "label": "stable"})).ok();
    // The other checkpoint finds nothing of the first one's, on the device or in host memory.
    for (user, past) in users.iter().enumerate() {
        assert_eq!(cached(&server.recommend(&visit(user, past)).ok()), 0);
    }
    let both = server.metric("beamline_host_pages", "");
    server.post("/v1/models/shop/unload", &json!({"version": a})).ok();
    server.wait_for("the first one's pages to go", |server| {
        let left = server.metric("beamline_host_pages", "");
        left > 0.0 && left < both && server.metric("beamline_host_bytes", "capacity") == f64::from(64 << 20)
    });
    assert_eq!(server.get("/v1/models").ok()["memory"]["used_bytes"].as_u64(), Some(of_one));
    assert!(cached(&server.recommend(&visit(0, &users[0])).ok()) > 0);
}

#[test]
fn host_memory_that_holds_no_page_is_refused() {
    let stderr =
        crate::loading::stderr_of_serve(&crate::harness::fixture(CASE), &["--kv-host-memory", "1KiB"]);
    assert!(stderr.contains("kv-host-memory of 1.0 KiB holds not even one page"), "{stderr}");
}
