//! The log: structured, to stderr, so that stdout stays free for results.
//!
//! Invariants: logging never waits and never fails, even where stderr is gone; lines that could not be written
//! are counted in `beamline_log_lines_dropped_total`; no line can imitate another.

mod escape;

use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::line_writer::{LineWriter, Output, Source};
use crate::settings::{LogFormat, LogSettings};

/// Bytes of lines that may wait for stderr.
const MAX_WAITING: usize = 1 << 20;
/// How long the end of the process waits for stderr.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The process has one stderr, so it has one writer for it.
static LINES: OnceLock<LineWriter> = OnceLock::new();

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The filter cannot be understood.
    #[error(transparent)]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// There is no thread that could write.
    #[error("cannot start the thread that writes the log: {0}")]
    Thread(#[from] io::Error),
}

/// Starts logging, of `default` and above unless the settings say otherwise. Later calls have no effect.
///
/// # Errors
///
/// When the filter cannot be understood, or no thread can be started.
pub fn start(settings: &LogSettings, default: &str) -> Result<(), LoggingError> {
    let filter = EnvFilter::builder().parse(settings.filter.as_deref().unwrap_or(default))?;
    if LINES.get().is_none() {
        // A second start, in tests say, finds the first one's writer in place.
        let _ = LINES.set(LineWriter::start("beamline-log", MAX_WAITING, Stderr)?);
    }
    let colours = io::stderr().is_terminal();
    let colours = colours && settings.format == LogFormat::Text;
    let builder = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(Lines { colours })
        // A failure to log must not become a message on the stderr that just failed.
        .log_internal_errors(false);
    let _ = match settings.format {
        LogFormat::Text => builder.with_target(false).with_ansi(colours).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let thread = thread.name().unwrap_or("unnamed");
        tracing::error!(thread, panic = %panic, "a thread panicked");
    }));
    Ok(())
}

/// Log lines that were not written.
pub fn dropped_lines() -> u64 {
    LINES.get().map_or(0, LineWriter::dropped)
}

/// Waits a moment for stderr to take what is left. The process is about to end.
pub fn flush() {
    if let Some(lines) = LINES.get() {
        lines.flush(LAST_LINES);
    }
}

/// Writes a last message for a person to stderr. It is lost if nobody reads there. It may quote files and clients, so
/// control characters are spelled out, except the ends of its lines.
pub fn last_words(text: &str) {
    let text = text.lines().flat_map(|line| escape::line(line.as_bytes(), false)).collect::<Vec<u8>>();
    match LINES.get() {
        Some(lines) => {
            lines.push(text);
            lines.flush(LAST_LINES);
        }
        None => {
            let _ = io::stderr().write_all(&text);
        }
    }
}

/// Standard error as an output of lines.
struct Stderr;

impl Source for Stderr {
    fn open(&mut self) -> io::Result<Output> {
        Ok(Output { writer: Box::new(io::stderr()), torn: false })
    }

    // Nothing that could be said would be read. The metric counts.
    fn failing(&mut self, _: &io::Error) {}

    fn kept(&mut self, _: &io::Error) {}
}

/// Makes a line of what a subscriber writes for one event.
#[derive(Clone, Copy)]
struct Lines {
    colours: bool,
}

impl<'a> MakeWriter<'a> for Lines {
    type Writer = Self;

    fn make_writer(&'a self) -> Self {
        *self
    }
}

impl Write for Lines {
    /// An event arrives as one write.
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        if let Some(lines) = LINES.get() {
            lines.push(escape::line(event, self.colours));
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
