//! Checkpoints that must not go live, and people who must not change anything: each is refused with a
//! reason of its own, while traffic goes on.

use std::os::unix::fs::symlink;
use std::path::Path;

use serde_json::{Value, json};

use crate::harness::{Server, read_raw};
use crate::loading::{copy, edit, edit_json};
use crate::root::{CASE, Reference, Root, under_load};

type Damage = fn(&Path);

const DAMAGES: [(&str, u16, &str, &str, Damage); 8] = [
    ("half", 422, "checkpoint_damaged", "the file holds 177512: it is truncated", |d| {
        edit(d.join("model.safetensors"), |b| b.truncate(b.len() / 2));
    }),
    ("header-cut", 422, "checkpoint_damaged", "truncated", |d| {
        edit(d.join("model.safetensors"), |b| b.truncate(100));
    }),
    ("wrong-shape", 422, "tensors_mismatch", "has shape", |d| {
        edit_json(d.join("config.json"), |c| c["intermediate_size"] = json!(64));
    }),
    ("not-finite", 422, "weights_not_finite", "not finite", |d| {
        edit(d.join("model.safetensors"), |b| {
            let end = b.len();
            b[end - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
        });
    }),
    ("no-sid-tokens", 422, "convention_mismatch", "lacks", |d| {
        edit(d.join("tokenizer.json"), |b| {
            *b = String::from_utf8_lossy(b).replace("<s_a_", "<q_").into_bytes()
        });
    }),
    ("no-config", 422, "checkpoint_unreadable", "config.json", |d| {
        std::fs::remove_file(d.join("config.json")).unwrap();
    }),
    ("bad-catalog", 422, "catalog_refused", "line 1", |d| {
        std::fs::write(d.join("catalog.jsonl"), "{}").unwrap()
    }),
    ("linked", 403, "outside_root", "model root", |d| {
        std::fs::remove_file(d.join("tokenizer.json")).unwrap();
        symlink("/etc/hostname", d.join("tokenizer.json")).unwrap();
    }),
];

#[test]
fn what_cannot_be_served_changes_nothing() {
    let root = Root::new();
    for (name, .., damage) in DAMAGES {
        let made = root.add(&format!("shop/{name}"));
        // Another digest, so that what is refused is the damage and not that it is loaded.
        edit(made.join("config.json"), |bytes| bytes.push(b'\n'));
        damage(&made);
    }
    let outside = copy(CASE);
    symlink(outside.path(), root.path().join("shop/outside")).unwrap();
    symlink(outside.path(), root.path().join("outside")).unwrap();
    let server = root.serve(&["--model-memory", "70MiB"]);
    let mut reference = Reference::default();
    reference.learn(&server, "shop");
    let refused = |path: &str, body: Value, status: u16, kind: &str, reason: &str| {
        let before = server.get("/v1/models").ok();
        let answer = server.post(path, &body);
        let error = answer.fails(status, kind);
        let message = error["message"].as_str().unwrap();
        println!("{path} {body}: {status} {kind}: {message}");
        assert!(message.contains(reason), "{message}");
        assert!(
            !message.contains(root.text()) && !message.contains(outside.path().to_str().unwrap()),
            "{message}"
        );
        assert_eq!(server.get("/v1/models").ok(), before, "{body}");
    };
    let load = "/v1/models/shop/load";
    let (answered, ()) = under_load(&server, &reference, || {
        for (name, status, kind, reason, _) in DAMAGES {
            refused(load, json!({"directory": name, "label": "stable"}), status, kind, reason);
        }
        refused(load, json!({"directory": "outside"}), 403, "outside_root", "out of the model root");
        refused("/v1/models/outside/load", json!({}), 403, "outside_root", "out of the model root");
        refused(load, json!({"directory": "nonesuch"}), 404, "checkpoint_not_found", "no such checkpoint");
        for directory in ["..", "../shop/b", "a/../b", "/etc", "a..b", ".", ""] {
            refused(load, json!({"directory": directory}), 422, "invalid_name", "`directory`");
        }
        refused("/v1/models/a..b/load", json!({}), 422, "invalid_name", "`name`");
        // Through a raw connection, because clients tidy such paths up.
        let head = "POST /v1/models/%2e%2e/load HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\
                    content-type: application/json\r\ncontent-length: 2";
        let text = read_raw(server.send_raw(head, "{}"));
        assert!(text.starts_with("HTTP/1.1 422") && text.contains("invalid_name"), "{text}");
        refused(load, json!({"directory": "b", "label": "a/b"}), 422, "invalid_name", "`label`");
        refused(
            load,
            json!({"directory": "b", "catalog": "../a/catalog.jsonl"}),
            422,
            "invalid_name",
            "`catalog`",
        );
        refused(
            load,
            json!({"directory": "b", "convention": "/etc/passwd"}),
            422,
            "invalid_name",
            "`convention`",
        );
        refused(
            load,
            json!({"directory": "b", "convention": "nonesuch"}),
            422,
            "convention_mismatch",
            "preset",
        );
        // Two fit, three do not.
        server.post(load, &json!({"directory": "b"})).ok();
        let third = root.add("shop/c");
        edit(third.join("config.json"), |bytes| bytes.push(b'\n'));
        refused(load, json!({"directory": "c"}), 409, "over_memory_budget", "of 70.0 MiB are free");
        server.post(load, &json!({"dir": "b"})).fails(400, "invalid_request");
    });
    println!("{answered} answers meanwhile");
    assert!(answered > 10, "{answered}");
}

#[test]
fn changes_need_the_key() {
    let root = Root::new();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("key");
    std::fs::write(&file, "a key of some length\n").unwrap();
    let server = root.serve(&["--admin-key-file", file.to_str().unwrap()]);
    let load = |headers: &[(&str, &str)]| {
        server.post_text("/v1/models/shop/load", r#"{"directory": "b"}"#, "application/json", headers)
    };
    for headers in
        [&[][..], &[("authorization", "Bearer wrong")], &[("authorization", "a key of some length")]]
    {
        let answer = load(headers);
        answer.fails(401, "unauthorized");
        assert_eq!(answer.headers["www-authenticate"], "Bearer");
    }
    for (method, path) in [("POST", "unload"), ("PUT", "labels/stable"), ("DELETE", "labels/stable")] {
        server.call(method, &format!("/v1/models/shop/{path}"), None, &[]).fails(401, "unauthorized");
    }
    assert_eq!(server.get("/v1/models").status, 200);
    load(&[("authorization", "Bearer a key of some length")]).ok();

    let open = Server::spawn(&["--listen", "0.0.0.0:0", "--model-root", root.text()]);
    open.wait_for("the registry", |server| server.get("/v1/models").status == 200);
    open.post("/v1/models/shop/load", &json!({"directory": "b"})).fails(403, "admin_disabled");
}

#[test]
fn without_a_root_nothing_is_loaded() {
    let server = Server::start(CASE, &[]);
    server.post("/v1/models/shop/load", &json!({})).fails(403, "no_model_root");
}
