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
    assert_eq!(server.get("/v2").ok()["extensions"], json!(["model_repository", "binary_tensor_data"]));
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
        assert_eq!(post("/v2/repository/models/flat/load", None).ok(), json!({"durable": false}));
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
    assert_eq!(post("/v2/repository/models/shop/unload", None).ok(), json!({"durable": false}));
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

#[test]
fn every_error_under_the_protocol_is_text() {
    let root = Root::new();
    root.add("flat");
    let server = root.serve(&[]);
    failed(&server.get("/v2/models/shop/config"), 404);
    failed(&server.call("DELETE", "/v2/models/shop", None, &[]), 405);
    failed(&server.call("POST", "/v2/repository/index", Some("{"), &[]), 400);
    // What the stock client sends: no content type, parameters that change nothing.
    let post = |path: &str, body: &str| server.call("POST", path, Some(body), &[]);
    post("/v2/repository/index", "{\"ready\": true}").ok();
    for parameters in [json!({}), json!({"config": "{}"}), json!({"label": "stable"})] {
        post("/v2/repository/models/flat/load", &json!({"parameters": parameters}).to_string()).ok();
    }
    let dependents = json!({"parameters": {"unload_dependents": false}}).to_string();
    post("/v2/repository/models/flat/unload", &dependents).ok();
    let config = json!({"parameters": {"config": "{\"backend\": \"x\"}"}}).to_string();
    assert!(failed(&post("/v2/repository/models/flat/load", &config), 400).contains("`config`"));
    let typo = json!({"parameters": {"lable": "stable"}}).to_string();
    let message = failed(&post("/v2/repository/models/shop/load", &typo), 400);
    assert!(message.contains("did you mean `label`?"), "{message}");
}

#[test]
fn inference_carries_a_request_for_items() {
    let root = Root::new();
    let server = root.serve(&[]);
    let tensor = |data: Value| {
        let input = json!({"name": "request", "datatype": "BYTES", "shape": [1], "data": data});
        json!({"id": "a", "inputs": [input]}).to_string()
    };
    let infer = |body: &str| server.call("POST", "/v2/models/shop/infer", Some(body), &[]);
    let answer = infer(&tensor(json!([bodies()[0].to_string()]))).ok();
    assert_eq!((&answer["id"], &answer["model_name"]), (&json!("a"), &json!("shop")));
    let output = &answer["outputs"][0];
    assert_eq!((&output["name"], &output["datatype"]), (&json!("answer"), &json!("BYTES")));
    let items: Value = serde_json::from_str(output["data"][0].as_str().unwrap()).unwrap();
    assert_eq!(items["items"], server.recommend(&bodies()[0]).ok()["items"]);

    failed(&infer("{}"), 400);
    failed(&infer(&tensor(json!([1]))), 400);
    failed(&infer(&tensor(json!(["{}", "{}"]))), 400);
    let typo = failed(&infer(&tensor(json!(["{\"histroy\": []}"]))), 400);
    assert!(typo.contains("did you mean `history`?"), "{typo}");
    failed(
        &server.call("POST", "/v2/models/none/infer", Some(&tensor(json!(["{\"history\": []}"]))), &[]),
        404,
    );
    let head = [("inference-header-content-length", "900")];
    failed(&server.call("POST", "/v2/models/shop/infer", Some("{}"), &head), 400);
}
