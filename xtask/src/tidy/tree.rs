//! The files that rules apply to: those that git tracks, and new ones that it does not ignore.
//!
//! Invariants: paths are relative to the root, with slashes, and sorted; files that hold no text are passed
//! over.
//!
//! What this must not know: rules.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

/// Endings of files without text. They are not even read.
const BINARY: [&str; 2] = [".safetensors", ".png"];

/// A checkout, and the names of its files.
pub(super) struct Tree {
    root: PathBuf,
    files: BTreeSet<String>,
}

impl Tree {
    /// The checkout at this root.
    pub(super) fn open(root: &Path) -> Result<Self> {
        let mut git = Command::new("git");
        git.args(["ls-files", "-z", "--cached", "--others", "--exclude-standard"]).current_dir(root);
        let output = git.output().context("cannot start git")?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "git ls-files: {}: {}", output.status, said.trim());
        let names = String::from_utf8(output.stdout).context("git names a file that is not UTF-8")?;
        let names = names.split('\0').filter(|name| !name.is_empty());
        // A file that was deleted and not yet committed is still listed.
        let files = names.filter(|name| root.join(name).is_file()).map(str::to_owned).collect();
        Ok(Self { root: root.to_owned(), files })
    }

    /// Whether there is a file, or a folder with files, of this name. The root is the empty name.
    pub(super) fn has(&self, path: &str) -> bool {
        if path.is_empty() || self.files.contains(path) {
            return true;
        }
        let folder = format!("{path}/");
        self.files.range(folder.clone()..).next().is_some_and(|file| file.starts_with(&folder))
    }

    /// Every file with text, and its text.
    pub(super) fn texts(&self) -> Result<Vec<(String, String)>> {
        let names = self.files.iter().filter(|name| !BINARY.iter().any(|ending| name.ends_with(ending)));
        let mut texts = Vec::new();
        for name in names {
            let bytes = std::fs::read(self.root.join(name)).with_context(|| format!("cannot read {name}"))?;
            if let Ok(text) = String::from_utf8(bytes) {
                texts.push((name.clone(), text));
            }
        }
        Ok(texts)
    }

    /// A checkout that holds these names and nothing else.
    #[cfg(test)]
    pub(super) fn of_names(names: &[&str]) -> Self {
        Self { root: PathBuf::new(), files: names.iter().map(|&name| name.to_owned()).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn folders_are_those_of_files() {
        let tree = Tree::of_names(&["docs/CUDA.md", "docs2/a.md"]);
        for there in ["", "docs", "docs/CUDA.md", "docs2"] {
            assert!(tree.has(there), "{there}");
        }
        for missing in ["doc", "docs/cuda.md", "docs/CUDA.md/x"] {
            assert!(!tree.has(missing), "{missing}");
        }
    }
}
