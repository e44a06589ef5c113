//! The parsers, each behind one function. The result of a target distinguishes inputs: one with a new
//! outcome is worth keeping. Messages of errors count as outcomes, without the numbers in them.

use std::path::Path;
use std::sync::LazyLock;

use beamline_catalog::{Catalog, CatalogLimits, FilterSpec, WrittenSymbols};
use beamline_model::checkpoint::Checkpoint;
use beamline_model::convention::Convention;
use beamline_model::convention::format::Format;
use beamline_model::families::hstu::Hstu;
use beamline_server::api;
use beamline_server::registry::state::{Records, StateDirectory};
use serde_json::Value;
use sha2::{Digest, Sha256};

use crate::corpus;

/// How inputs of a target are shaped, for the mutations that suit them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shape {
    /// A JSON value.
    Json,
    /// JSON values, one a line.
    JsonLines,
    /// A safetensors file: the length of a JSON header, the header, data.
    Safetensors,
    /// Bytes of any other shape.
    Bytes,
}

/// A parser under test.
#[derive(Clone, Copy, Debug)]
pub struct Target {
    /// Its name, and that of its folder in the corpus.
    pub name: &'static str,
    /// The shape of its inputs.
    pub shape: Shape,
    /// Parses, and checks what was parsed.
    pub run: fn(&[u8]) -> String,
}

/// All targets, each with its name.
pub const TARGETS: [Target; 10] = [
    Target { name: "request", shape: Shape::Json, run: request },
    Target { name: "admin", shape: Shape::Json, run: admin },
    Target { name: "catalog", shape: Shape::JsonLines, run: catalog },
    Target { name: "filter", shape: Shape::Json, run: filter },
    Target { name: "config", shape: Shape::Json, run: config },
    Target { name: "convention", shape: Shape::Json, run: convention },
    Target { name: "safetensors", shape: Shape::Safetensors, run: safetensors },
    Target { name: "index", shape: Shape::Json, run: index },
    Target { name: "parquet", shape: Shape::Bytes, run: parquet },
    Target { name: "state", shape: Shape::Json, run: state },
];

fn told<T, E: std::fmt::Display>(result: Result<T, E>) -> String {
    result.map_or_else(|error| error.to_string(), |_| "taken".to_owned())
}

/// Bodies of `/v1/recommend`, `/v1/rank` and `/v1/warm`.
fn request(input: &[u8]) -> String {
    let recommend = told(api::parse::<api::RecommendRequest>(input));
    let rank = told(api::parse::<api::RankRequest>(input));
    let warm = told(api::parse::<api::WarmRequest>(input));
    format!("{recommend}; {rank}; {warm}")
}

/// Bodies that change models and catalogs.
fn admin(input: &[u8]) -> String {
    let load = told(api::parse::<api::LoadRequest>(input));
    let patch = told(api::parse::<api::CatalogPatch>(input));
    let version = told(api::parse::<api::VersionRequest>(input));
    format!("{load}; {patch}; {version}")
}

/// A catalog as JSON lines, and as an index file. Whatever is taken is consistent.
fn catalog(input: &[u8]) -> String {
    let limits = CatalogLimits::default();
    let lines = read_catalog(input, "catalog.jsonl", &limits);
    let index = read_catalog(input, "items.index.json", &limits);
    format!("{lines}; {index}")
}

fn read_catalog(input: &[u8], name: &str, limits: &CatalogLimits) -> String {
    let folder = folder(&[(name, input)]);
    let path = folder.path().join(name);
    let read = WrittenSymbols::scan_path(&path, limits)
        .and_then(|symbols| Catalog::read_path(&path, &symbols, limits));
    let catalog = match read {
        Ok(catalog) => catalog,
        // The folder has another name every time.
        Err(error) => return error.to_string().replace(&folder.path().display().to_string(), ""),
    };
    assert!(catalog.num_items() >= catalog.num_leaves() && catalog.num_leaves() > 0);
    for item in catalog.items() {
        assert_eq!(catalog.item(catalog.item_id(item)), Some(item));
        assert!(catalog.items_of(catalog.leaf_of(item)).contains(&item));
    }
    "taken".to_owned()
}

/// The filters of a request on a small catalog, against item by item.
fn filter(input: &[u8]) -> String {
    static CATALOG: LazyLock<Option<Catalog>> = LazyLock::new(|| {
        let codes = WrittenSymbols::codes();
        Catalog::read_json_lines(crate::seeds::CATALOG.as_bytes(), &codes, &CatalogLimits::default()).ok()
    });
    let Some(catalog) = CATALOG.as_ref() else { return String::new() };
    let filters = match api::parse::<api::Filters>(input) {
        Ok(filters) => filters,
        Err(error) => return error.to_string(),
    };
    let found = catalog.filter(&FilterSpec {
        exclude_items: &filters.exclude_items,
        require_tags: &filters.require_tags,
        forbid_tags: &filters.forbid_tags,
        allow_items: filters.allow_items.as_deref(),
        ..FilterSpec::default()
    });
    for item in catalog.items() {
        let (id, tags) = (catalog.item_id(item), catalog.tags(item).collect::<Vec<_>>());
        let has = |tag: &String| tags.contains(&tag.as_str());
        let named = |list: &[String]| list.iter().any(|name| name == id);
        let allowed = !named(&filters.exclude_items)
            && filters.require_tags.iter().all(has)
            && !filters.forbid_tags.iter().any(has)
            && filters.allow_items.as_deref().is_none_or(named);
        assert_eq!(found.allows_item(item), allowed, "{id}");
    }
    format!("taken: {} items", found.num_items_allowed())
}

/// config.json, of a decoder and of HSTU, beside weights that fit neither.
fn config(input: &[u8]) -> String {
    let folder = folder(&[("config.json", input), ("model.safetensors", crate::seeds::WEIGHTS)]);
    examined(folder.path())
}

/// convention.json, bound to a tokenizer.
fn convention(input: &[u8]) -> String {
    let Ok(text) = std::str::from_utf8(input) else { return "not UTF-8".to_owned() };
    let format = match Format::parse(text) {
        Ok(format) => format,
        Err(error) => return error.to_string(),
    };
    let tokenizer = corpus::root().join("fixtures/hf/qwen3-collisions");
    told(Convention::bind(format, &tokenizer, 128))
}

/// A weights file: its header, and the tensors that it names.
fn safetensors(input: &[u8]) -> String {
    let config = crate::seeds::CONFIG.as_bytes();
    let folder = folder(&[("config.json", config), ("model.safetensors", input)]);
    examined(folder.path())
}

/// An index of shards.
fn index(input: &[u8]) -> String {
    let folder = folder(&[
        ("config.json", crate::seeds::CONFIG.as_bytes()),
        ("model.safetensors.index.json", input),
        ("model-00001-of-00001.safetensors", crate::seeds::WEIGHTS),
    ]);
    examined(folder.path())
}

/// What `inspect` would say of a checkpoint of either family.
fn examined(folder: &Path) -> String {
    let decoder = Checkpoint::open(folder).map_or_else(|error| error.to_string(), |_| "taken".to_owned());
    let hstu = told(Hstu::open(folder));
    // The folder has another name every time.
    format!("{decoder}; {hstu}").replace(&folder.display().to_string(), "")
}

/// A Parquet file of requests, every row.
fn parquet(input: &[u8]) -> String {
    let folder = folder(&[("requests.parquet", input)]);
    told(beamline_server::cli::parquet_rows(&folder.path().join("requests.parquet")))
}

/// The state file of a server, as it is, and with a checksum that is right.
fn state(input: &[u8]) -> String {
    let open = |content: &[u8]| {
        let folder = folder(&[("state.json", content)]);
        let said = told(StateDirectory::open(folder.path()));
        said.replace(&folder.path().display().to_string(), "")
    };
    let sealed = serde_json::from_slice::<Value>(input).ok().and_then(|mut document| {
        let records: Records = serde_json::from_value(document.get("state")?.clone()).ok()?;
        let digest = Sha256::digest(serde_json::to_vec(&records).ok()?);
        let digest: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        *document.get_mut("sha256")? = digest.into();
        serde_json::to_vec(&document).ok()
    });
    format!("{}; {}", open(input), sealed.map_or_else(String::new, |content| open(&content)))
}

/// A folder of files, which goes away.
#[expect(clippy::expect_used, reason = "a full disk is no finding, and ends the run")]
fn folder(files: &[(&str, &[u8])]) -> tempfile::TempDir {
    let folder = tempfile::tempdir().expect("a temporary folder");
    for (name, content) in files {
        std::fs::write(folder.path().join(name), content).expect("a temporary file");
    }
    folder
}
