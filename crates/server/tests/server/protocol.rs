//! The Open Inference Protocol: health, metadata, repository.

use serde_json::{Value, json};

use crate::harness::{Answer, Server};
use crate::root::{Root, bodies};

fn failed(answer: &Answer, status: u16) -> String {
    assert_eq!(answer.status, status, "{}", answer.text);
    answer.json()["error"].as_str().unwrap().to_owned()
}

#[test]
fn models_are_looked_after_by_the_protocol() {
    let root = Root::new();
    root.add("flat");
    let server = root.serve(&[]);
    assert_eq!(server.get("/v2").ok()["extensions"], json!(["model_repository"]));
    assert_eq!(server.get("/v2/health/live").ok(), json!({"live": true}));
    assert_eq!(server.get("/v2/health/ready").ok(), json!({"ready": true}));
    let model = server.get("/v2/models/shop").ok();
    assert_eq!((&model["name"], &model["platform"]), (&json!("shop"), &json!("beamline_Qwen3ForCausalLM")));
    let a = model["versions"][0].as_str().unwrap().to_owned();
    assert_eq!(server.get(&format!("/v2/models/shop/versions/{a}")).ok(), model);
    assert_eq!(server.get("/v2/models/shop/ready").ok(), json!({"name": "shop", "ready": true}));
    assert_eq!(server.get("/v2/models/shop/versions/stable/ready").status, 200);
    assert!(failed(&server.get("/v2/models/none"), 404).contains("none"));
    failed(&server.get("/v2/models/shop/versions/000000000000/ready"), 404);

    let post = |path: &str, body: Option<&Value>| {
        let json = [("content-type", "application/json")];
        let text = body.map(Value::to_string);
        server.call("POST", path, text.as_deref(), if body.is_some() { &json } else { &[] })
    };
    // Without a body, and twice: the second changes nothing.
    for _ in 0..2 {
        post("/v2/repository/models/flat/load", None).ok();
    }
    let b = json!({"parameters": {"directory": "b", "label": "stable"}});
    post("/v2/repository/models/shop/load", Some(&b)).ok();
    let index = post("/v2/repository/index", Some(&json!({"ready": true}))).ok();
    assert_eq!(index.as_array().unwrap().len(), 3, "{index}");
    assert!(index.as_array().unwrap().iter().all(|model| model["state"] == "READY"));
    assert_ne!(server.recommend(&bodies()[0]).ok()["model"]["version"], json!(a));

    failed(&post("/v2/repository/index", Some(&json!({"ready": "yes"}))), 400);
    failed(&post("/v2/repository/models/a..b/load", None), 422);
    failed(&post("/v2/repository/models/none/load", None), 404);
    failed(&post("/v2/repository/models/none/unload", None), 404);
    failed(&post("/v2/repository/models/shop/load", Some(&json!({"parameters": {"config": "x"}}))), 400);
    post("/v2/repository/models/shop/unload", Some(&json!({"parameters": {"version": a}}))).ok();
    post("/v2/repository/models/shop/unload", None).ok();
    // Another model is left.
    assert_eq!(server.get("/v2/health/ready").status, 200);
    assert_eq!(post("/v2/repository/index", None).ok().as_array().unwrap().len(), 1);
}

#[test]
fn a_page_in_a_browser_changes_nothing() {
    let root = Root::new();
    let server = root.serve(&[]);
    let origin = [("origin", "http://elsewhere.example")];
    let unload = |server: &Server| server.call("POST", "/v2/repository/models/shop/unload", None, &origin);
    failed(&unload(&server), 403);
    server.still_serves();
}
