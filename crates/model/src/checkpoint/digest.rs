//! The identity of a checkpoint.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Read;
use std::path::Path;

use sha2::{Digest, Sha256};

use crate::error::ModelError;

/// sha256 over the sorted lines `name sha256(content)` of the files that are there, in hexadecimal.
pub(crate) fn of_files(directory: &Path, names: &[String]) -> Result<String, ModelError> {
    let mut names: Vec<&String> = names.iter().collect();
    names.sort();
    names.dedup();
    let mut lines = String::new();
    for name in names {
        let path = directory.join(name);
        if path.exists() {
            let read = |source| ModelError::Read { path: path.clone(), source };
            let mut file = File::open(&path).map_err(read)?;
            let mut hasher = Sha256::new();
            let mut buffer = vec![0; 1 << 20];
            loop {
                let count = file.read(&mut buffer).map_err(read)?;
                if count == 0 {
                    break;
                }
                hasher.update(&buffer[..count]);
            }
            let _ = writeln!(lines, "{name} {}", hex(&hasher.finalize()));
        }
    }
    Ok(hex(&Sha256::digest(lines.as_bytes())))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().fold(String::with_capacity(2 * bytes.len()), |mut text, byte| {
        let _ = write!(text, "{byte:02x}");
        text
    })
}
