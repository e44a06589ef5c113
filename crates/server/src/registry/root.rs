//! The one directory under which checkpoints may be loaded over HTTP.
//!
//! ```text
//! ROOT/<name>                a checkpoint
//! ROOT/<name>/<directory>    one of several checkpoints of a model
//! ```
//!
//! Invariant: no path from a client is opened. Clients send names, which are single components. The
//! path of a name is resolved, including links, and must lie under the root, and so must every file
//! of the checkpoint.

use std::path::{Path, PathBuf};

use super::name;
use crate::error::Error;
use crate::runtime::Files;

/// Most entries that a checkpoint directory may have.
const MAX_ENTRIES: usize = 10_000;

/// The directory under which checkpoints lie.
#[derive(Clone, Debug)]
pub struct ModelRoot {
    /// The resolved path of the directory.
    path: PathBuf,
}

/// The checkpoint that a client asks to load.
#[derive(Clone, Copy, Debug, Default)]
pub struct Wanted<'a> {
    /// Name of the model, which is a directory of the root.
    pub name: &'a str,
    /// A directory within that, if it holds several checkpoints.
    pub directory: Option<&'a str>,
    /// The catalog: a file of the checkpoint.
    pub catalog: Option<&'a str>,
    /// The convention: a file of the checkpoint, or a preset.
    pub convention: Option<&'a str>,
}

impl ModelRoot {
    /// Resolves a directory.
    ///
    /// # Errors
    ///
    /// When the path is not a directory.
    pub fn new(path: &Path) -> std::io::Result<Self> {
        let path = path.canonicalize()?;
        if path.is_dir() { Ok(Self { path }) } else { Err(std::io::ErrorKind::NotADirectory.into()) }
    }

    /// Finds the files of a checkpoint.
    ///
    /// # Errors
    ///
    /// When a name is not valid, when there is no such checkpoint, or when any of its files lies
    /// elsewhere.
    pub fn find(&self, wanted: Wanted<'_>) -> Result<Files, Error> {
        name::check("name", wanted.name)?;
        for (param, text) in
            [("directory", wanted.directory), ("catalog", wanted.catalog), ("convention", wanted.convention)]
        {
            text.map_or(Ok(()), |text| name::check(param, text))?;
        }
        let mut checkpoint = self.resolve(&self.path.join(wanted.name))?;
        if let Some(directory) = wanted.directory {
            checkpoint = self.resolve(&checkpoint.join(directory))?;
        }
        if !checkpoint.is_dir() {
            return Err(Error::CheckpointNotFound);
        }
        self.check_entries(&checkpoint)?;
        let catalog = wanted.catalog.map(|file| checkpoint.join(file));
        if catalog.as_ref().is_some_and(|file| !file.is_file()) {
            return Err(Error::InvalidValue {
                param: "catalog",
                message: "is no file of the checkpoint".into(),
            });
        }
        let convention = wanted.convention.map(|file| match checkpoint.join(file) {
            path if path.is_file() => path.to_string_lossy().into_owned(),
            _ => file.to_owned(),
        });
        // A text that is not a file of the checkpoint must be a preset, whose name has no dot.
        if convention.as_ref().is_some_and(|text| !text.contains('/') && text.contains('.')) {
            let message = "is neither a file of the checkpoint nor a preset".into();
            return Err(Error::InvalidValue { param: "convention", message });
        }
        Ok(Files { checkpoint, random_weights: None, catalog, convention })
    }

    /// Removes the paths of this machine from a text for a client.
    pub fn redact(&self, files: &Files, text: &str) -> String {
        let inside = format!("{}/", files.checkpoint.display());
        let root = format!("{}/", self.path.display());
        text.replace(&inside, "").replace(&root, "")
    }

    fn resolve(&self, path: &Path) -> Result<PathBuf, Error> {
        let resolved = path.canonicalize().map_err(|_| Error::CheckpointNotFound)?;
        match resolved.starts_with(&self.path) && resolved != self.path {
            true => Ok(resolved),
            false => Err(Error::OutsideRoot),
        }
    }

    /// Refuses links that lead elsewhere, and pipes, which could be read for ever.
    fn check_entries(&self, checkpoint: &Path) -> Result<(), Error> {
        let entries = std::fs::read_dir(checkpoint).map_err(|_| Error::CheckpointNotFound)?;
        for (index, entry) in entries.enumerate() {
            // Entries that are not checked are not trusted.
            if index == MAX_ENTRIES {
                let message = format!("holds more than {MAX_ENTRIES} files").into();
                return Err(Error::InvalidValue { param: "directory", message });
            }
            let path = entry.map_err(|_| Error::CheckpointNotFound)?.path();
            let kind = std::fs::metadata(self.resolve(&path)?).map_err(|_| Error::CheckpointNotFound)?;
            if !kind.is_file() && !kind.is_dir() {
                return Err(Error::OutsideRoot);
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    #[test]
    fn a_directory_too_large_to_be_looked_through_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let checkpoint = directory.path().join("shop");
        std::fs::create_dir(&checkpoint).unwrap();
        for index in 0..MAX_ENTRIES {
            std::fs::write(checkpoint.join(index.to_string()), "").unwrap();
        }
        let root = ModelRoot::new(directory.path()).unwrap();
        let wanted = Wanted { name: "shop", ..Wanted::default() };
        assert!(root.find(wanted).is_ok());
        std::fs::write(checkpoint.join("one more"), "").unwrap();
        assert!(matches!(root.find(wanted), Err(Error::InvalidValue { param: "directory", .. })));
    }

    #[test]
    fn only_what_lies_under_the_root_is_found() {
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("secret"), "x").unwrap();
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path();
        for made in ["shop/v1", "shop/v2", "flat", "linked/v1", "file"] {
            std::fs::create_dir_all(path.join(made)).unwrap();
        }
        std::fs::write(path.join("shop/v1/config.json"), "{}").unwrap();
        symlink(path.join("shop/v1"), path.join("shop/current")).unwrap();
        symlink(outside.path(), path.join("away")).unwrap();
        symlink(outside.path(), path.join("shop/away")).unwrap();
        symlink(outside.path().join("secret"), path.join("linked/v1/tokenizer.json")).unwrap();
        std::fs::remove_dir(path.join("file")).unwrap();
        std::fs::write(path.join("file"), "x").unwrap();
        let root = ModelRoot::new(path).unwrap();
        let find = |name: &'static str, directory: Option<&'static str>| {
            root.find(Wanted { name, directory, ..Wanted::default() }).map_err(|error| error.class().kind)
        };
        let real = path.canonicalize().unwrap();
        assert_eq!(find("shop", Some("v1")).unwrap().checkpoint, real.join("shop/v1"));
        assert_eq!(find("shop", Some("current")).unwrap().checkpoint, real.join("shop/v1"));
        assert_eq!(find("flat", None).unwrap().checkpoint, real.join("flat"));
        for (name, directory, kind) in [
            ("shop", Some("v3"), "checkpoint_not_found"),
            ("nothing", None, "checkpoint_not_found"),
            ("file", None, "checkpoint_not_found"),
            ("away", None, "outside_root"),
            ("shop", Some("away"), "outside_root"),
            ("linked", Some("v1"), "outside_root"),
            ("..", None, "invalid_name"),
            ("shop", Some("../flat"), "invalid_name"),
            ("shop", Some(".."), "invalid_name"),
            ("/etc", None, "invalid_name"),
        ] {
            assert_eq!(find(name, directory).unwrap_err(), kind, "{name} {directory:?}");
        }
        let catalog = Wanted { name: "shop", directory: Some("v1"), catalog: Some("no"), convention: None };
        assert_eq!(root.find(catalog).unwrap_err().class().kind, "invalid_value");
    }
}
