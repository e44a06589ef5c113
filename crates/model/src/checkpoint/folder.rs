//! Weights that lie in a checkpoint's directory and are not read.
//!
//! An author may mean the second set of weights, so a note names the one that counts.

use std::path::Path;

use super::note::Note;

/// Most names that are looked at.
const MAX_NAMES: usize = 4096;
/// Endings of files that hold weights.
const WEIGHTS: [&str; 7] = [".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".msgpack"];
/// Beginnings of files that trainers leave beside a model and that hold none.
const NO_MODEL: [&str; 6] =
    ["training_args.", "optimizer.", "scheduler.", "rng_state", "scaler.", "adapter_"];

/// Notes on all files with weights but those that were read.
pub(super) fn unread_weights(directory: &Path, read: &[String]) -> Vec<Note> {
    let entries = std::fs::read_dir(directory).into_iter().flatten().take(MAX_NAMES).flatten();
    let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    let mut unread: Vec<String> = names
        .filter(|name| WEIGHTS.iter().any(|end| name.ends_with(end)))
        .filter(|name| !NO_MODEL.iter().any(|begin| name.starts_with(begin)) && !read.contains(name))
        .collect();
    unread.sort();
    let what = format!("the weights are those of {}", read.join(", "));
    unread.into_iter().map(|name| Note::UnreadFile { name, what: what.clone() }).collect()
}
