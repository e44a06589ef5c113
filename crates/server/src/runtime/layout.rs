//! What a folder must hold to be a checkpoint, and what people bring instead.
//!
//! Place in the flow: before any file is opened for good. `serve`, `inspect` and loading over HTTP ask
//! the same question, so that they never disagree.
//!
//! Invariants: only names, sizes and the first bytes of files are read; the work is bounded whatever
//! lies in the folder. Every problem says what to do.

use std::fs::{self, File};
use std::io::Read as _;
use std::path::{Path, PathBuf};

use beamline_model::checkpoint::file::{MAX_CONFIG_BYTES, read_text};
use beamline_model::loaded;
use beamline_wording::suggest;

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const TOKENIZER: &str = "tokenizer.json";
/// Files of PEFT: the presence of any makes transformers apply the adapter to the base model.
const ADAPTER: [&str; 3] = ["adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"];
/// What tokenizers are kept in that only Python can read.
const SLOW_TOKENIZER: [&str; 5] =
    ["tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "vocab.json", "vocab.txt"];
/// Names of files that hold a catalog.
const CATALOGS: [&str; 2] = ["catalog.jsonl", "catalog.parquet"];
/// How a file begins that Git LFS has not fetched.
const LFS: &[u8] = b"version https://git-lfs";
/// Entries of a folder that are looked at.
const MAX_ENTRIES: usize = 10_000;
/// Folders with a checkpoint that a message names.
const NAMED: usize = 3;

/// Why a folder is no checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum LayoutProblem {
    /// Nothing has this name.
    #[error("there is no such directory{}", match meant { Some(meant) => format!("; did you mean {}?", meant.display()), None => String::new() })]
    Missing {
        /// A neighbour whose name is nearly the same.
        meant: Option<PathBuf>,
    },
    /// It is a file.
    #[error("this is a file: name the directory that holds config.json and the weights")]
    NotADirectory,
    /// The folder that the hub's cache keeps for a repository.
    #[error("this is a folder of the Hugging Face cache; the checkpoint in it is {}: name that", .0.display())]
    HubCache(PathBuf),
    /// The checkpoint lies deeper.
    #[error("config.json is not here but in {}: name {}", folders(.0), if .0.len() == 1 { "that folder" } else { "one of them" })]
    Nested(Vec<PathBuf>),
    /// The weights of an adapter, without the model.
    #[error(
        "this is an adapter (LoRA or another of PEFT) without its base model: load both in Python, and save the result of \
         merge_and_unload() with save_pretrained"
    )]
    AdapterAlone,
    /// An adapter that would be left out.
    #[error(
        "{0} is an adapter beside the weights, and would be left out: merge it in Python (merge_and_unload(), then \
         save_pretrained), or remove the files of the adapter to serve the base model"
    )]
    AdapterBeside(String),
    /// Nothing says what the model is.
    #[error(
        "config.json is missing: name a directory that save_pretrained wrote (config.json, model.safetensors, tokenizer.json)"
    )]
    NoConfig,
    /// Weights in GGUF, another format.
    #[error("{0} is a GGUF file, which is not read: bring the directory that save_pretrained wrote")]
    Gguf(String),
    /// Weights that run code when they are read.
    #[error(
        "the weights are in {0}, a pickle, which is not read: save them in Python with save_pretrained(DIR, \
         safe_serialization=True)"
    )]
    Pickle(String),
    /// Weights under another name.
    #[error("the weights are in {0}: rename it to model.safetensors")]
    OtherName(String),
    /// Shards that nothing lists.
    #[error(
        "the weights are in {0} shards, but model.safetensors.index.json, which lists them, is missing: copy it too"
    )]
    NoIndex(usize),
    /// No weights at all.
    #[error("model.safetensors is missing: the directory holds no weights")]
    NoWeights,
    /// A link to nothing.
    #[error("{file} is a link to {}, which does not exist: copy the file itself", target.display())]
    DeadLink {
        /// Name of the link.
        file: String,
        /// Where it leads.
        target: PathBuf,
    },
    /// A placeholder of Git LFS.
    #[error("{0} is a pointer of Git LFS, not the file itself: run `git lfs pull` in the directory")]
    LfsPointer(String),
    /// A tokenizer that only Python can read.
    #[error(
        "tokenizer.json is missing, and {0} is the slow form of a tokenizer: write the fast one in Python with \
         AutoTokenizer.from_pretrained(DIR, use_fast=True).save_pretrained(DIR)"
    )]
    SlowTokenizer(String),
    /// No tokenizer at all.
    #[error("tokenizer.json is missing: write it in Python with tokenizer.save_pretrained(DIR)")]
    NoTokenizer,
}

impl LayoutProblem {
    /// The file that is there and cannot be read, if that is the problem.
    pub fn file(&self) -> Option<&str> {
        match self {
            Self::LfsPointer(file) | Self::DeadLink { file, .. } => Some(file),
            _ => None,
        }
    }
}

/// Every reason why this directory cannot be served, as far as names and sizes tell.
pub fn problems(directory: &Path) -> Vec<LayoutProblem> {
    let Ok(kind) = fs::metadata(directory) else {
        return vec![LayoutProblem::Missing { meant: neighbour(directory) }];
    };
    if !kind.is_dir() {
        return vec![LayoutProblem::NotADirectory];
    }
    let names = names(directory);
    let has = |name: &str| names.iter().any(|other| other == name);
    if !has(CONFIG) {
        return vec![without_config(directory, &names)];
    }
    let mut problems = weights(&names);
    // A model that ranks reads no text.
    if !has(TOKENIZER) && reads_tokens(directory) {
        let slow = SLOW_TOKENIZER.into_iter().find(|name| has(name));
        problems
            .push(slow.map_or(LayoutProblem::NoTokenizer, |name| LayoutProblem::SlowTokenizer(name.into())));
    }
    if let Some(adapter) = ADAPTER.into_iter().find(|name| has(name)) {
        problems.push(LayoutProblem::AdapterBeside(adapter.into()));
    }
    problems.extend(names.iter().filter(|name| is_read(name)).filter_map(|name| unreadable(directory, name)));
    problems
}

/// What a catalog is called here that is not called as one, if anything looks like it.
pub fn likely_catalog(directory: &Path) -> Option<String> {
    let names = names(directory);
    let catalogs = CATALOGS.into_iter();
    let misspelt = catalogs.clone().find_map(|name| suggest(name, names.iter().map(String::as_str)));
    let tables = || names.iter().find(|name| [".jsonl", ".parquet"].iter().any(|end| name.ends_with(end)));
    misspelt.map(str::to_owned).or_else(|| tables().cloned())
}

fn without_config(directory: &Path, names: &[String]) -> LayoutProblem {
    if let Some(snapshot) = hub_snapshot(directory) {
        return LayoutProblem::HubCache(snapshot);
    }
    if names.iter().any(|name| ADAPTER.contains(&name.as_str())) {
        return LayoutProblem::AdapterAlone;
    }
    let inside = names.iter().map(|name| directory.join(name)).filter(|path| path.is_dir());
    let found: Vec<PathBuf> = inside
        .filter_map(|folder| match folder.join(CONFIG).is_file() {
            true => Some(folder),
            false => hub_snapshot(&folder),
        })
        .take(NAMED + 1)
        .collect();
    if !found.is_empty() {
        return LayoutProblem::Nested(found);
    }
    match names.iter().find(|name| name.ends_with(".gguf")) {
        Some(file) => LayoutProblem::Gguf(file.clone()),
        None => LayoutProblem::NoConfig,
    }
}

/// The snapshot in `models--OWNER--NAME`: the one that `main` points at, else one that is there.
fn hub_snapshot(directory: &Path) -> Option<PathBuf> {
    let snapshots = directory.join("snapshots");
    let is_checkpoint = |path: &PathBuf| path.join(CONFIG).exists();
    let main = begin_of(&directory.join("refs/main"))
        .map(|hash| snapshots.join(String::from_utf8_lossy(&hash).trim()))
        .filter(is_checkpoint);
    main.or_else(|| names(&snapshots).iter().map(|name| snapshots.join(name)).find(is_checkpoint))
}

fn weights(names: &[String]) -> Vec<LayoutProblem> {
    let has = |name: &str| names.iter().any(|other| other == name);
    if has(WEIGHTS) || has(INDEX) {
        return Vec::new();
    }
    let shards =
        names.iter().filter(|name| name.starts_with("model-") && name.ends_with(".safetensors")).count();
    let other = |ends: &[&str]| {
        let matches = |name: &&String| ends.iter().any(|end| name.ends_with(end)) && !is_beside(name);
        names.iter().find(matches).cloned()
    };
    let pickle = names.iter().find(|name| name.starts_with("pytorch_model")).cloned();
    vec![if shards > 0 {
        LayoutProblem::NoIndex(shards)
    } else if let Some(file) = pickle {
        LayoutProblem::Pickle(file)
    } else if let Some(file) = other(&[".safetensors"]) {
        LayoutProblem::OtherName(file)
    } else if let Some(file) = other(&[".bin", ".pt", ".pth", ".ckpt"]) {
        LayoutProblem::Pickle(file)
    } else if let Some(file) = other(&[".gguf"]) {
        LayoutProblem::Gguf(file)
    } else {
        LayoutProblem::NoWeights
    }]
}

/// Files of training, and of adapters, which are not the model's weights.
fn is_beside(name: &str) -> bool {
    const BESIDE: [&str; 5] =
        ["training_args.bin", "optimizer.pt", "scheduler.pt", "optimizer.bin", "scaler.pt"];
    BESIDE.contains(&name) || name.starts_with("adapter_") || name.starts_with("rng_state")
}

/// Whether a file of this name is read when the checkpoint is served.
fn is_read(name: &str) -> bool {
    let weights = name.starts_with("model") && name.ends_with(".safetensors");
    weights || [CONFIG, INDEX, TOKENIZER, "convention.json"].contains(&name) || CATALOGS.contains(&name)
}

/// What keeps a file from being what its name says.
fn unreadable(directory: &Path, name: &str) -> Option<LayoutProblem> {
    let path = directory.join(name);
    if !path.exists() {
        let target = fs::read_link(&path).ok()?;
        return Some(LayoutProblem::DeadLink { file: name.to_owned(), target });
    }
    begin_of(&path)?.starts_with(LFS).then(|| LayoutProblem::LfsPointer(name.to_owned()))
}

/// The first bytes of a file. What is no file, such as a pipe, is not opened.
fn begin_of(path: &Path) -> Option<Vec<u8>> {
    fs::metadata(path).ok()?.is_file().then_some(())?;
    let mut begin = Vec::new();
    File::open(path).ok()?.take(64).read_to_end(&mut begin).ok()?;
    Some(begin)
}

/// Whether the model reads tokens, and so needs a tokenizer and a convention. An unreadable config.json
/// is taken for that of a decoder, as most are.
pub fn reads_tokens(directory: &Path) -> bool {
    !read_text(&directory.join(CONFIG), MAX_CONFIG_BYTES).is_ok_and(|text| loaded::reads_events(&text))
}

/// The names in a folder, sorted, so that messages do not depend on the file system. A name with control
/// characters is left out: it could forge a line of the log.
fn names(directory: &Path) -> Vec<String> {
    let entries = fs::read_dir(directory).into_iter().flatten().take(MAX_ENTRIES).flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut names: Vec<String> = names.filter(|name| !name.contains(char::is_control)).collect();
    names.sort();
    names
}

/// A folder beside a missing one whose name is nearly the same.
fn neighbour(directory: &Path) -> Option<PathBuf> {
    let parent = match directory.parent()? {
        parent if parent.as_os_str().is_empty() => Path::new("."),
        parent => parent,
    };
    let names = names(parent);
    let meant = suggest(directory.file_name()?.to_str()?, names.iter().map(String::as_str))?;
    Some(directory.with_file_name(meant)).filter(|path| path.is_dir())
}

fn folders(paths: &[PathBuf]) -> String {
    let named: Vec<String> = paths.iter().take(NAMED).map(|path| path.display().to_string()).collect();
    let more = if paths.len() > NAMED { " and others" } else { "" };
    named.join(", ") + more
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    /// A folder with these files. Names that end in `/` are folders.
    fn folder(files: &[&str]) -> tempfile::TempDir {
        let directory = tempfile::tempdir().unwrap();
        for file in files {
            let path = directory.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            match file.ends_with('/') {
                true => fs::create_dir_all(path).unwrap(),
                false => fs::write(path, "{}").unwrap(),
            }
        }
        directory
    }

    fn said(files: &[&str]) -> String {
        let directory = folder(files);
        let problems = problems(directory.path());
        let lines: Vec<String> = problems.iter().map(ToString::to_string).collect();
        lines.join("\n").replace(&format!("{}", directory.path().display()), "DIR")
    }

    #[test]
    fn what_serves_has_no_problem() {
        assert_eq!(said(&[CONFIG, WEIGHTS, TOKENIZER, "optimizer.pt", "training_args.bin"]), "");
        assert_eq!(said(&[CONFIG, INDEX, TOKENIZER, "model-00001-of-00001.safetensors"]), "");
        let hstu = folder(&[WEIGHTS]);
        fs::write(hstu.path().join(CONFIG), r#"{"model_type": "hstu"}"#).unwrap();
        assert_eq!(problems(hstu.path()), [], "a model that ranks has no tokenizer");
    }

    #[test]
    fn every_problem_says_what_to_do() {
        for (files, part) in [
            (&["readme.md"][..], "config.json is missing: name a directory that save_pretrained wrote"),
            (&["checkpoint-500/config.json"], "is not here but in DIR/checkpoint-500: name that folder"),
            (&["a/config.json", "b/config.json"], "in DIR/a, DIR/b: name one of them"),
            (&["models--x--y/snapshots/abc/config.json"], "in DIR/models--x--y/snapshots/abc: name that"),
            (
                &["snapshots/abc/config.json", "refs/main"],
                "the checkpoint in it is DIR/snapshots/abc: name that",
            ),
            (&["adapter_config.json", "adapter_model.safetensors"], "without its base model"),
            (&["model.gguf"], "GGUF"),
            (&[CONFIG, WEIGHTS, TOKENIZER, "adapter_config.json"], "merge_and_unload"),
            (&[CONFIG, WEIGHTS, TOKENIZER, "adapter_model.safetensors"], "merge_and_unload"),
            (&[CONFIG, TOKENIZER, "pytorch_model.bin"], "safe_serialization=True"),
            (&[CONFIG, TOKENIZER, "pytorch_model.bin.index.json"], "safe_serialization=True"),
            (&[CONFIG, TOKENIZER, "weights.safetensors"], "rename it to model.safetensors"),
            (
                &[CONFIG, TOKENIZER, "model-00001-of-00002.safetensors"],
                "in 1 shards, but model.safetensors.index.json",
            ),
            (&[CONFIG, TOKENIZER, "optimizer.pt"], "holds no weights"),
            (&[CONFIG, WEIGHTS], "tokenizer.save_pretrained(DIR)"),
            (&[CONFIG, WEIGHTS, "spiece.model"], "use_fast=True"),
        ] {
            let text = said(files);
            assert!(text.contains(part), "{files:?}: {text}");
        }
    }

    #[test]
    fn placeholders_and_dead_links_are_named() {
        let directory = folder(&[CONFIG, TOKENIZER]);
        let path = directory.path();
        fs::write(path.join(WEIGHTS), "version https://git-lfs.github.com/spec/v1\noid sha256:0\n").unwrap();
        symlink("/nowhere/blob", path.join("catalog.jsonl")).unwrap();
        let target = PathBuf::from("/nowhere/blob");
        let expected = [
            LayoutProblem::DeadLink { file: "catalog.jsonl".into(), target },
            LayoutProblem::LfsPointer(WEIGHTS.into()),
        ];
        assert_eq!(problems(path), expected);
        assert!(expected[1].to_string().contains("git lfs pull"));
    }

    #[test]
    fn a_hub_cache_gives_the_snapshot_of_main() {
        let directory = folder(&["snapshots/a/config.json", "snapshots/b/config.json", "refs/main"]);
        fs::write(directory.path().join("refs/main"), "b\n").unwrap();
        assert_eq!(
            problems(directory.path()),
            [LayoutProblem::HubCache(directory.path().join("snapshots/b"))]
        );
    }

    #[test]
    fn a_wrong_name_finds_its_neighbour() {
        let directory = folder(&["checkpoint/config.json", "file"]);
        let missing = problems(&directory.path().join("chekpoint"));
        assert_eq!(missing, [LayoutProblem::Missing { meant: Some(directory.path().join("checkpoint")) }]);
        assert!(
            problems(&directory.path().join("nothing like it"))[0].to_string().contains("no such directory")
        );
        assert_eq!(problems(&directory.path().join("file")), [LayoutProblem::NotADirectory]);
    }

    #[test]
    fn a_catalog_under_another_name_is_found() {
        assert_eq!(
            likely_catalog(folder(&[CONFIG, "catalogue.jsonl"]).path()).as_deref(),
            Some("catalogue.jsonl")
        );
        assert_eq!(
            likely_catalog(folder(&[CONFIG, "items.parquet"]).path()).as_deref(),
            Some("items.parquet")
        );
        assert_eq!(likely_catalog(folder(&[CONFIG, TOKENIZER]).path()), None);
    }
}
