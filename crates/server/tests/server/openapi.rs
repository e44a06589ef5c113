//! The description of the API: committed, complete, and the same as the router.

use std::collections::BTreeSet;
use std::path::Path;

use serde_json::Value;

fn description() -> Value {
    serde_json::from_str(beamline::openapi::json().unwrap()).unwrap()
}

/// Methods and paths, without the page for people.
fn operations(description: &Value) -> BTreeSet<(String, String)> {
    let paths = description["paths"].as_object().unwrap().iter();
    let methods = paths.flat_map(|(path, item)| {
        item.as_object().unwrap().keys().map(move |method| (method.clone(), path.clone()))
    });
    methods.collect()
}

#[test]
fn the_committed_description_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.json");
    let made = beamline::openapi::json().unwrap();
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(&path, made).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(made == committed, "openapi.json is out of date: run `cargo xtask openapi` and commit it");
}

#[test]
fn every_route_is_described_and_no_other() {
    let source = include_str!("../../src/http/mod.rs");
    let mut routed = BTreeSet::new();
    for route in source.split(".route(\"").skip(1) {
        let (path, rest) = route.split_once('"').unwrap();
        let handlers = rest.split(".route(").next().unwrap().split(".fallback").next().unwrap();
        for method in ["get", "put", "post", "delete", "patch"] {
            let names = [format!(" {method}("), format!(".{method}(")];
            if names.iter().any(|name| handlers.contains(name.as_str())) {
                routed.insert((method.to_owned(), path.to_owned()));
            }
        }
    }
    routed.remove(&("get".to_owned(), "/".to_owned()));
    assert_eq!(operations(&description()), routed);
}

#[test]
fn operations_have_ids_of_their_own_and_their_errors() {
    let description = description();
    let mut ids = BTreeSet::new();
    for (method, path) in operations(&description) {
        let operation = &description["paths"][&path][&method];
        let id = operation["operationId"].as_str().unwrap().to_owned();
        assert!(ids.insert(id.clone()), "{id} occurs twice");
        let statuses: BTreeSet<&str> =
            operation["responses"].as_object().unwrap().keys().map(String::as_str).collect();
        let lacks = |wanted: &[&str]| wanted.iter().any(|status| !statuses.contains(status));
        if path.starts_with("/v1/") {
            assert!(!lacks(&["500", "503"]), "{method} {path}: {statuses:?}");
        }
        if operation.get("requestBody").is_some() {
            assert!(!lacks(&["400", "408", "413", "422"]), "{method} {path}: {statuses:?}");
        }
        if operation.get("security").is_some() {
            assert!(!lacks(&["401", "403", "404"]), "{method} {path}: {statuses:?}");
        }
        for (status, response) in operation["responses"].as_object().unwrap() {
            let body = &response["content"]["application/json"]["schema"]["$ref"];
            let error = if path.starts_with("/v2") { "ProtocolError" } else { "ErrorBody" };
            let expected = format!("#/components/schemas/{error}");
            assert!(status.starts_with('2') || *body == *expected, "{method} {path} {status}: {body}");
        }
    }
    assert_eq!(description["servers"][0]["url"], "/");
    for path in ["/v1/recommend", "/v1/rank", "/v1/warm"] {
        let operation = &description["paths"][path]["post"];
        assert!(operation["requestBody"]["content"]["application/json"]["example"].is_object(), "{path}");
        let answer = &operation["responses"]["200"]["content"]["application/json"];
        assert!(answer["example"].is_object(), "{path}");
    }
}
