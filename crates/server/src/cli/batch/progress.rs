//! A progress bar with rate and remaining time on a terminal; invisible elsewhere.

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::path::Path;

use indicatif::{ProgressBar, ProgressStyle};

use super::input::Input;
use super::is_dash;

/// A progress bar for an input.
pub(super) fn bar(path: &Path, input: &Input) -> anyhow::Result<ProgressBar> {
    let total = match input.len() {
        Some(rows) => Some(rows),
        None if is_dash(path) => None,
        None => count_lines(path)?,
    };
    styled(total)
}

/// A progress bar for a file of lines.
pub(in crate::cli) fn lines_bar(path: &Path) -> anyhow::Result<ProgressBar> {
    styled(count_lines(path)?)
}

fn styled(total: Option<u64>) -> anyhow::Result<ProgressBar> {
    let Some(total) = total else {
        let style = ProgressStyle::with_template("{spinner} {human_pos} requests, {per_sec}, {elapsed}")?;
        return Ok(ProgressBar::new_spinner().with_style(style));
    };
    let style =
        ProgressStyle::with_template("{bar:40} {human_pos}/{human_len} requests, {per_sec}, {eta} left")?;
    Ok(ProgressBar::new(total).with_style(style))
}

/// Counts the lines of a file. `None` for other things, such as a pipe, which counting would empty.
fn count_lines(path: &Path) -> io::Result<Option<u64>> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Ok(None);
    }
    let mut reader = BufReader::with_capacity(1 << 20, file);
    let (mut lines, mut open) = (0, false);
    loop {
        let chunk = reader.fill_buf()?;
        if chunk.is_empty() {
            return Ok(Some(lines + u64::from(open)));
        }
        lines += chunk.iter().filter(|byte| **byte == b'\n').count() as u64;
        open = chunk.last() != Some(&b'\n');
        let length = chunk.len();
        reader.consume(length);
    }
}
