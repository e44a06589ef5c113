//! Checkpoints that take each other's place under load: no request fails, every answer is that of the
//! version it names, and the memory comes back.

use serde_json::{Value, json};

use crate::harness::Server;
use crate::root::{Reference, Root, bodies, slate, under_load};

const SWAPS: usize = 50;
/// Large enough to show among what the allocator keeps.
pub(crate) const KV_MEMORY: [&str; 2] = ["--kv-memory", "96MiB"];
/// Half the pages of one version, so that one that stays would show.
pub(crate) const TOLERANCE: usize = 48 << 20;

fn load(server: &Server, body: &Value) -> String {
    let loaded = server.post("/v1/models/shop/load", body).ok();
    loaded["version"].as_str().unwrap().to_owned()
}

fn unload(server: &Server, version: &str) -> Value {
    server.post("/v1/models/shop/unload", &json!({"version": version})).ok()
}

/// Loads the other checkpoint as `stable` and unloads the one before.
fn swap(server: &Server, directory: &str, before: &str) -> String {
    let version = load(server, &json!({"directory": directory, "label": "stable"}));
    assert_eq!(unload(server, before)["state"], "unloaded");
    version
}

#[test]
fn fifty_swaps_under_load() {
    let root = Root::new();
    // The allocator keeps freed memory for a while, in case it is wanted again. Without that, the
    // resident memory is the memory in use.
    let server = root.serve_with(&KV_MEMORY, &[("MIMALLOC_PURGE_DELAY", "0")]);
    let mut reference = Reference::default();
    reference.learn(&server, "shop");
    let mut version = server.get("/v1/models").ok()["models"][0]["version"].as_str().unwrap().to_owned();
    version = swap(&server, "b", &version);
    reference.learn(&server, "shop");
    assert_eq!(reference.len(), 2, "the checkpoints differ");

    // Some rounds before the measurement, so that what stays for good is there.
    let rounds = |version: &mut String, count: usize| {
        for round in 0..count {
            *version = swap(&server, ["a", "b"][round % 2], version);
        }
    };
    let (_, ()) = under_load(&server, &reference, || rounds(&mut version, 6));
    let before = server.resident();
    let (answered, ()) = under_load(&server, &reference, || rounds(&mut version, SWAPS));
    let after = server.resident();
    println!("{SWAPS} swaps, {answered} answers, resident {} -> {} KiB", before >> 10, after >> 10);
    assert!(answered > SWAPS, "there was load: {answered}");
    assert!(after < before + TOLERANCE, "memory grew from {before} to {after}");
    let models = server.get("/v1/models").ok();
    assert_eq!(models["models"].as_array().unwrap().len(), 1);
    let (memory, catalog) = (&models["models"][0]["memory"], &models["models"][0]["catalog"]);
    let taken = memory["weights_bytes"].as_u64().unwrap()
        + memory["kv_bytes"].as_u64().unwrap()
        + catalog["memory_bytes"].as_u64().unwrap();
    assert_eq!(models["memory"]["used_bytes"].as_u64().unwrap(), taken);
    assert_eq!(server.metric("beamline_model_info", "name=\"shop\""), 1.0);
    assert!(server.metric("beamline_engine_requests_total", "end=\"finished\"") >= answered as f64);
    assert_eq!(server.metric("beamline_engine_requests_total", "end=\"failed\""), 0.0);
}

#[test]
fn labels_point_at_loaded_versions_and_roll_back() {
    let root = Root::new();
    let server = root.serve(&[]);
    let a = server.get("/v1/models").ok()["models"][0].clone();
    assert_eq!((&a["name"], &a["labels"]), (&json!("shop"), &json!(["stable"])));
    let a = a["version"].as_str().unwrap().to_owned();
    let body = &bodies()[0];
    let ask = |model: &str| {
        let mut body = body.clone();
        body["model"] = json!(model);
        server.recommend(&body)
    };
    let first = slate(&server.recommend(body).ok());

    // A second version takes no label unless asked.
    let b = load(&server, &json!({"directory": "b", "label": "canary"}));
    assert_eq!(ask("shop").ok()["model"]["version"], json!(a));
    assert_eq!(ask("shop@canary").ok()["model"]["version"], json!(b));
    assert_eq!(ask(&format!("shop@{b}")).ok()["model"]["version"], json!(b));
    let sha256 = ask("shop@canary").ok()["model"]["sha256"].as_str().unwrap().to_owned();
    assert_eq!(ask(&format!("shop@{sha256}")).ok()["model"]["version"], json!(b));
    let message = ask("shop@nightly").fails(404, "model_not_found")["message"].to_string();
    assert!(
        message.contains(&format!("{a} (stable), {b} (canary)")) || message.contains("(canary), "),
        "{message}"
    );
    for unknown in ["shop@nightly", "nonesuch", "shop@", "@stable", "shop@000000000000", "shop@stable@x"] {
        ask(unknown).fails(404, "model_not_found");
    }

    // Forth and back.
    let label = |label: &str, version: &str| {
        server.put(&format!("/v1/models/shop/labels/{label}"), &json!({"version": version}))
    };
    assert_eq!(label("stable", &b).ok()["labels"], json!(["canary", "stable"]));
    assert_ne!(slate(&server.recommend(body).ok()), first);
    label("stable", &a).ok();
    assert_eq!(slate(&server.recommend(body).ok()), first);
    label("stable", "000000000000").fails(404, "version_not_found");
    let error = label("stable", "canary").fails(404, "version_not_found");
    assert!(error["message"].as_str().unwrap().contains("name the version that it points at"), "{error}");
    label("0123456789ab", &a).fails(422, "invalid_value");
    label("..x", &a).fails(422, "invalid_name");
    server.put("/v1/models/none/labels/stable", &json!({"version": a})).fails(404, "model_not_found");

    // What a label points at stays.
    let refused = server.post("/v1/models/shop/unload", &json!({"version": b}));
    assert!(refused.fails(409, "version_labelled")["message"].as_str().unwrap().contains("canary"));
    server.post("/v1/models/shop/load", &json!({"directory": "b"})).fails(409, "already_loaded");
    assert_eq!(server.call("DELETE", "/v1/models/shop/labels/canary", None, &[]).ok()["durable"], false);
    server.call("DELETE", "/v1/models/shop/labels/canary", None, &[]).fails(404, "label_not_found");
    unload(&server, &b);
    ask("shop@canary").fails(404, "model_not_found");
    server.post("/v1/models/shop/unload", &json!({"version": b})).fails(404, "version_not_found");

    // With its last version a model is gone, and the server has nothing to serve.
    server.call("DELETE", "/v1/models/shop/labels/stable", None, &[]);
    unload(&server, &a);
    server.recommend(body).fails(503, "no_model");
    server.get("/readyz").fails(503, "no_model");
    assert_eq!(server.get("/livez").status, 200);
    // The first version of a model is stable.
    assert_eq!(load(&server, &json!({"directory": "b"})), b);
    assert_eq!(server.recommend(body).ok()["model"]["version"], json!(b));
}

#[test]
fn pages_of_a_removed_version_are_not_hit() {
    let root = Root::new();
    let server = root.serve(&[]);
    let body = json!({"user_id": "u", "history": crate::harness::history(&crate::harness::items(crate::root::CASE)[..40])});
    let cached = || server.recommend(&body).ok()["usage"]["cached_tokens"].as_u64().unwrap();
    let a = server.get("/v1/models").ok()["models"][0]["version"].as_str().unwrap().to_owned();
    assert_eq!(cached(), 0);
    assert!(cached() > 0);
    let b = swap(&server, "b", &a);
    assert_eq!(cached(), 0, "another version has pages of its own");
    swap(&server, "a", &b);
    assert_eq!(cached(), 0, "the same checkpoint, loaded again, begins with no pages");
}

#[test]
fn a_server_may_begin_with_nothing() {
    let root = Root::new();
    let server = Server::spawn(&["--model-root", root.text()]);
    server.wait_for("the registry", |server| server.get("/v1/models").status == 200);
    server.get("/readyz").fails(503, "no_model");
    load(&server, &json!({"directory": "a"}));
    let mut body = bodies()[0].clone();
    body["model"] = json!("shop");
    server.recommend(&body).ok();
    // Under whatever name: it takes requests.
    assert_eq!(server.get("/readyz").status, 200);
    assert_eq!(server.get("/v2/health/ready").status, 200);
}
