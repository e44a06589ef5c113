//! What was acknowledged is there after a kill: versions, labels and catalogs, kept under `--state`.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::harness::{PATIENCE, Random, Server, beamline, ids};
use crate::root::{Root, bodies, slate};

/// Kills in the middle of changes.
const KILLS: usize = 24;
const A: &str = "shop@canary";

struct Kept {
    root: Root,
    state: tempfile::TempDir,
}

impl Kept {
    fn new() -> Self {
        Self { root: Root::new(), state: tempfile::tempdir().unwrap() }
    }

    fn path(&self) -> &Path {
        self.state.path()
    }

    /// Always by the same command line.
    fn serve(&self) -> Server {
        self.root.serve(&["--state", self.path().to_str().unwrap()])
    }
}

fn patch(server: &Server, body: &Value) -> crate::harness::Answer {
    let json = [("content-type", "application/json")];
    server.call("PATCH", "/v1/models/shop/catalog", Some(&body.to_string()), &json)
}

/// What a server has loaded, without what differs from process to process.
fn models(server: &Server) -> Vec<Value> {
    let models = server.get("/v1/models").ok()["models"].clone();
    let of = |model: &Value| {
        json!([model["name"], model["version"], model["labels"], model["catalog"]["version"]])
    };
    models.as_array().unwrap().iter().map(of).collect()
}

fn catalogs(server: &Server) -> Value {
    let list = server.get("/v1/models/shop/catalog").ok();
    let versions: Vec<&Value> = list["versions"].as_array().unwrap().iter().map(|c| &c["version"]).collect();
    json!([list["current"], versions, list["durable"]])
}

#[test]
fn changes_survive_a_kill() {
    let kept = Kept::new();
    let server = kept.serve();
    let body = &bodies()[0];
    let first = server.recommend(body).ok();
    let gone = ids(&first)[0].clone();
    let original = first["catalog_version"].clone();
    // Of every kind, and acknowledged as durable.
    let b = server.post("/v1/models/shop/load", &json!({"directory": "b", "label": "canary"})).ok();
    let other = server.put("/v1/models/shop/labels/other", &json!({"version": b["version"]})).ok();
    let removed = server.call("DELETE", "/v1/models/shop/labels/other", None, &[]).ok();
    let patched = patch(&server, &json!({"remove": [gone]})).ok();
    let again = patch(&server, &json!({"retag": [{"item_id": ids(&first)[1], "tags": ["new"]}]})).ok();
    for answer in [&b, &other, &removed, &patched, &again, &server.get("/v1/models").ok()["models"][0]] {
        assert_eq!(answer["durable"], true, "{answer}");
    }
    let (loaded, kept_catalogs) = (models(&server), catalogs(&server));
    let answers: Vec<_> = bodies().iter().map(|body| slate(&server.recommend(body).ok())).collect();
    drop(server); // kill -9

    let server = kept.serve();
    assert_eq!((models(&server), catalogs(&server)), (loaded, kept_catalogs));
    assert!(!ids(&server.recommend(body).ok()).contains(&gone), "an item that was taken down stays so");
    let found: Vec<_> = bodies().iter().map(|body| slate(&server.recommend(body).ok())).collect();
    assert_eq!(found, answers);
    let of_canary = json!({"model": A, "history": [], "num_items": 3});
    assert_eq!(server.recommend(&of_canary).ok()["model"]["version"], b["version"]);
    assert_eq!(server.get("/readyz").ok(), json!({"status": "ok"}));
    // Back to the catalog of the checkpoint, over one more restart.
    let back = json!({"version": original});
    server.post("/v1/models/shop/catalog/rollback", &back).ok();
    drop(server);
    let server = kept.serve();
    assert_eq!(slate(&server.recommend(body).ok()), slate(&first));
    // What was unloaded stays away, and so do its catalogs.
    let a = server.get("/v1/models/shop/catalog").ok()["model"]["version"].clone();
    server.put("/v1/models/shop/labels/stable", &json!({"version": b["version"]})).ok();
    assert_eq!(server.post("/v1/models/shop/unload", &json!({"version": a})).ok()["durable"], true);
    drop(server);
    let server = kept.serve();
    assert_eq!(models(&server).len(), 1, "the state counts, not the command line");
    assert_eq!(server.recommend(body).ok()["model"]["version"], b["version"]);
    assert_eq!(std::fs::read_dir(kept.path().join("catalogs")).unwrap().count(), 0);
}

#[test]
fn without_a_state_the_answers_say_so() {
    let root = Root::new();
    let server = root.serve(&[]);
    let b = server.post("/v1/models/shop/load", &json!({"directory": "b"})).ok();
    let label = server.put("/v1/models/shop/labels/canary", &json!({"version": b["version"]})).ok();
    let patched = patch(&server, &json!({"retag": []})).ok();
    let gone = server.call("DELETE", "/v1/models/shop/labels/canary", None, &[]).ok();
    let unloaded = server.post("/v1/models/shop/unload", &json!({"version": b["version"]})).ok();
    for answer in [b, label, patched, gone, unloaded] {
        assert_eq!(answer["durable"], false, "{answer}");
    }
}

#[test]
fn a_kill_at_any_moment_leaves_the_old_or_the_new() {
    let kept = Kept::new();
    let server = kept.serve();
    let b =
        server.post("/v1/models/shop/load", &json!({"directory": "b", "label": "canary"})).ok()["version"]
            .clone();
    let a = server.get("/v1/models/shop/catalog").ok()["model"]["version"].clone();
    drop(server);
    let mut random = Random(7);
    // What was acknowledged, and what may have been written without being acknowledged.
    let (mut known, mut pending) = (a.clone(), a.clone());
    let mut changes = 0;
    for round in 0..KILLS {
        let mut server = kept.serve();
        let stable = server.recommend(&bodies()[0]).ok()["model"]["version"].clone();
        assert!(stable == known || stable == pending, "round {round}: {stable}, not {known} or {pending}");
        known = stable;
        let until = Instant::now() + Duration::from_millis(random.below(60) as u64);
        std::thread::scope(|scope| {
            let server = &server;
            let killer = scope.spawn(move || {
                std::thread::sleep(until.saturating_duration_since(Instant::now()));
                server.signal("KILL");
            });
            loop {
                pending = if known == a { b.clone() } else { a.clone() };
                let body = json!({"version": pending}).to_string();
                let head = format!(
                    "PUT /v1/models/shop/labels/stable HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-type: \
                     application/json\r\ncontent-length: {}",
                    body.len()
                );
                match server.try_raw(&head, &body) {
                    Some(text) if text.starts_with("HTTP/1.1 200") => known = pending.clone(),
                    _ => break,
                }
                changes += 1;
            }
            killer.join().unwrap();
        });
        server.wait();
    }
    println!("{changes} changes were acknowledged, {KILLS} kills");
    assert!(changes > 0);
}

#[test]
fn what_cannot_be_brought_back_is_told_and_the_rest_serves() {
    let kept = Kept::new();
    let server = kept.serve();
    let b = server.post("/v1/models/shop/load", &json!({"directory": "b", "label": "canary"})).ok();
    let first = slate(&server.recommend(&bodies()[0]).ok());
    drop(server);
    let directory = kept.root.path().join("shop/b");
    let aside = kept.root.path().join("aside");
    std::fs::rename(&directory, &aside).unwrap();

    let of_canary = json!({"model": A, "history": [], "num_items": 3});
    let server = kept.serve();
    let ready = server.get("/readyz").ok();
    assert_eq!((&ready["status"], &ready["missing"][0]["version"]), (&json!("degraded"), &b["version"]));
    assert_eq!(ready["missing"][0]["labels"], json!(["canary"]));
    assert_eq!(slate(&server.recommend(&bodies()[0]).ok()), first);
    let error = server.recommend(&of_canary).fails(503, "version_missing");
    assert!(error["message"].as_str().unwrap().contains("no such checkpoint"), "{error}");
    drop(server);

    // Another checkpoint in its place is another version.
    kept.root.add("shop/b");
    let server = kept.serve();
    let reason = server.get("/readyz").ok()["missing"][0]["reason"].to_string();
    assert!(reason.contains("changed on disk") && !reason.contains(kept.root.text()), "{reason}");
    drop(server);

    // Mended, all of it is back.
    std::fs::remove_dir_all(&directory).unwrap();
    std::fs::rename(&aside, &directory).unwrap();
    let server = kept.serve();
    assert_eq!(server.get("/readyz").ok(), json!({"status": "ok"}));
    assert_eq!(server.recommend(&of_canary).ok()["model"]["version"], b["version"]);
    drop(server);

    // Or it is given up.
    std::fs::remove_dir_all(&directory).unwrap();
    let server = kept.serve();
    let unload = json!({"version": b["version"]});
    server.post("/v1/models/shop/unload", &unload).fails(409, "version_labelled");
    server.call("DELETE", "/v1/models/shop/labels/canary", None, &[]).ok();
    assert_eq!(server.post("/v1/models/shop/unload", &unload).ok()["durable"], true);
    assert_eq!(server.get("/readyz").ok(), json!({"status": "ok"}));
    server.recommend(&of_canary).fails(404, "model_not_found");
}

#[test]
fn a_change_that_cannot_be_written_is_refused_and_changes_nothing() {
    let kept = Kept::new();
    let server = kept.serve();
    let a = server.get("/v1/models/shop/catalog").ok()["model"]["version"].clone();
    let before = models(&server);
    let item = ids(&server.recommend(&bodies()[0]).ok())[0].clone();
    // Directories in the way of what is written: not even root can write there.
    for name in ["state.json.new", "catalogs"] {
        let path = kept.path().join(name);
        let _ = std::fs::remove_dir(&path);
        if name == "catalogs" {
            std::fs::write(&path, "").unwrap()
        } else {
            std::fs::create_dir(&path).unwrap()
        }
    }
    let load = json!({"directory": "b", "label": "canary"});
    server.post("/v1/models/shop/load", &load).fails(503, "not_kept");
    server.put("/v1/models/shop/labels/other", &json!({"version": a})).fails(503, "not_kept");
    server.call("DELETE", "/v1/models/shop/labels/stable", None, &[]).fails(503, "not_kept");
    patch(&server, &json!({"remove": [item]})).fails(503, "not_kept");
    assert_eq!(models(&server), before);
    assert!(ids(&server.recommend(&bodies()[0]).ok()).contains(&item));
    std::fs::remove_dir(kept.path().join("state.json.new")).unwrap();
    std::fs::remove_file(kept.path().join("catalogs")).unwrap();
    std::fs::create_dir(kept.path().join("catalogs")).unwrap();
    server.post("/v1/models/shop/load", &load).ok();
    patch(&server, &json!({"remove": [item]})).ok();
    let after = models(&server);
    drop(server);
    assert_eq!(models(&kept.serve()), after);
}

/// The end of a server that must not start.
fn refused(kept: &Kept) -> String {
    let mut child = beamline()
        .args([
            "serve",
            "--listen",
            "127.0.0.1:0",
            "--log",
            "error",
            "--state",
            kept.path().to_str().unwrap(),
        ])
        .args(["--model-root", kept.root.text()])
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let start = Instant::now();
    while child.try_wait().unwrap().is_none() {
        assert!(start.elapsed() < PATIENCE, "the server starts");
        std::thread::sleep(Duration::from_millis(10));
    }
    let output = child.wait_with_output().unwrap();
    assert!(!output.status.success());
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn one_server_has_a_state_and_what_is_damaged_is_refused_by_name() {
    let kept = Kept::new();
    let server = kept.serve();
    let text = refused(&kept);
    assert!(text.contains("another server uses this directory"), "{text}");
    server.put("/v1/models/shop/labels/canary", &json!({"version": models(&server)[0][1]})).ok();
    drop(server);
    let file = kept.path().join("state.json");
    let good = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, good.replace("canary", "camary")).unwrap();
    let text = refused(&kept);
    assert!(
        text.contains("state.json") && text.contains("checksum") && text.contains("state.previous.json"),
        "{text}"
    );
    std::fs::write(&file, good).unwrap();
    assert_eq!(models(&kept.serve())[0][2], json!(["canary", "stable"]));
}
