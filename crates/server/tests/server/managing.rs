//! `beamline models` and `beamline catalog` against a running server.

use serde_json::{Value, json};

use crate::harness::{Server, beamline};
use crate::root::Root;

/// Runs a subcommand against a server; its output if it succeeds, else its error.
fn run(server: &Server, flags: &[&str], key: Option<&str>) -> Result<String, String> {
    let mut command = beamline();
    command.args(flags).args(["--server", &format!("http://{}", server.address)]);
    if let Some(key) = key {
        command.env("BEAMLINE_ADMIN_KEY", key);
    }
    let output = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    if output.status.success() { Ok(text(output.stdout)) } else { Err(text(output.stderr)) }
}

#[test]
fn models_are_managed_from_the_command_line() {
    let root = Root::new();
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("key");
    let key = "a key of some length";
    std::fs::write(&file, key).unwrap();
    let server = root.serve(&["--admin-key-file", file.to_str().unwrap()]);
    let ask = |flags: &[&str]| run(&server, flags, Some(key));

    let list: Value = serde_json::from_str(&ask(&["models", "list", "--json"]).unwrap()).unwrap();
    let a = list["models"][0]["version"].as_str().unwrap().to_owned();
    let refused = run(&server, &["models", "load", "shop", "--directory", "b"], None).unwrap_err();
    assert!(refused.contains("unauthorized") && !refused.contains(key), "{refused}");
    assert!(refused.contains("--admin-key-file FILE"), "{refused}");
    let loaded = ask(&["models", "load", "shop", "--directory", "b", "--label", "canary"]).unwrap();
    let b = loaded.trim().strip_prefix("loaded shop@").unwrap().strip_suffix(" (canary)").unwrap().to_owned();
    let table = ask(&["models", "list"]).unwrap();
    assert!(table.contains(&a) && table.contains(&b) && table.contains("canary"), "{table}");
    assert!(table.contains("memory taken: 6") && table.contains(" of "), "{table}");
    assert_eq!(
        ask(&["models", "label", "shop", "stable", &b]).unwrap(),
        format!("stable points at shop@{b} (canary, stable)\n")
    );
    let back = ask(&["models", "label", "shop", "stable", "--previous"]).unwrap();
    assert_eq!(back, format!("stable points at shop@{a} (stable)\n"));
    let forth = ask(&["models", "label", "--model", "shop", "stable", "--previous"]).unwrap();
    assert_eq!(forth, format!("stable points at shop@{b} (canary, stable)\n"));
    assert_eq!(ask(&["models", "unload", "shop", &a]).unwrap(), format!("unloaded shop@{a}\n"));
    let refused = ask(&["models", "unload", "shop", &b]).unwrap_err();
    assert!(refused.contains("version_labelled"), "{refused}");
    assert_eq!(ask(&["models", "label", "shop", "canary", "--delete"]).unwrap(), "deleted shop@canary\n");
    for bad in [
        &["models", "load", "../etc"][..],
        &["models", "load", "a/b"],
        &["models", "label", "shop", "a b", "x"],
    ] {
        assert!(ask(bad).unwrap_err().contains("is not a valid name"), "{bad:?}");
    }

    let catalog = root.path().join("shop/a/catalog.jsonl");
    let text = std::fs::read_to_string(&catalog).unwrap();
    let pushed = directory.path().join("pushed.jsonl");
    std::fs::write(&pushed, text.lines().take(50).collect::<Vec<_>>().join("\n")).unwrap();
    let said = ask(&["catalog", "push", pushed.to_str().unwrap(), "--model", "shop"]).unwrap();
    assert!(said.starts_with("shop serves catalog ") && said.ends_with(", 50 items\n"), "{said}");
    let answer = server.recommend(&json!({"history": [], "num_items": 60, "beam_width": 60})).ok();
    assert_eq!(answer["items_returned"], 50);
    let serving = said.split_whitespace().nth(3).unwrap().trim_end_matches(',').to_owned();
    let first: Value = serde_json::from_str(text.lines().next().unwrap()).unwrap();
    let (gone, kept) = (first["item_id"].as_str().unwrap(), text.lines().nth(1).unwrap());
    let kept: Value = serde_json::from_str(kept).unwrap();
    let patch = directory.path().join("patch.json");
    std::fs::write(&patch, json!({"retag": [{"item_id": kept["item_id"], "tags": ["new"]}]}).to_string())
        .unwrap();
    let said =
        ask(&["catalog", "patch", patch.to_str().unwrap(), "--remove", gone, "--model", "shop"]).unwrap();
    assert!(said.ends_with(", 49 items\n") && !said.contains(&serving), "{said}");
    let tagged =
        json!({"history": [], "num_items": 60, "beam_width": 60, "filters": {"require_tags": ["new"]}});
    assert_eq!(server.recommend(&tagged).ok()["items"][0]["item_id"], kept["item_id"]);
    let refused = ask(&["catalog", "patch", "--remove", gone, "--model", "shop"]).unwrap_err();
    assert!(refused.contains(gone), "{refused}");
    let table = ask(&["catalog", "list", "shop"]).unwrap();
    assert_eq!(table.matches("kept").count(), 2, "{table}");
    assert_eq!(
        ask(&["catalog", "rollback", &serving, "--model", "shop"]).unwrap(),
        format!("shop serves catalog {serving}, 50 items\n")
    );
    std::fs::write(&patch, "{\"drop\": []}").unwrap();
    let refused = ask(&["catalog", "patch", patch.to_str().unwrap(), "--model", "shop"]).unwrap_err();
    assert!(refused.contains("is not a patch") && refused.contains("drop"), "{refused}");
    let refused = ask(&["catalog", "push", "catalog.parquet", "--model", "shop"]).unwrap_err();
    assert!(refused.contains("not as Parquet"), "{refused}");
    std::fs::write(&pushed, "{}").unwrap();
    let refused = ask(&["catalog", "push", pushed.to_str().unwrap(), "--model", "shop@stable"]).unwrap_err();
    assert!(refused.contains("line 1") && refused.contains("catalog_refused"), "{refused}");
}
