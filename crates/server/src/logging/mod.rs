//! The log: structured, to stderr, so that stdout stays free for results.
//!
//! Invariants: logging never waits and never fails, even if stderr is closed; lines that could not
//! be written are counted in `beamline_log_lines_dropped_total`; no line can imitate another.

mod escape;

use std::io::{self, IsTerminal, Write};
use std::sync::OnceLock;
use std::time::Duration;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::MakeWriter;

use crate::line_writer::{LineWriter, Output, Source};
use crate::settings::{LogFormat, LogSettings};

/// Most bytes of lines that may wait for stderr.
const MAX_WAITING: usize = 1 << 20;
/// How long the process waits for stderr at its end.
const LAST_LINES: Duration = Duration::from_secs(1);

/// The only writer of the process for its only stderr.
static LINES: OnceLock<LineWriter> = OnceLock::new();

/// Why logging could not be started.
#[derive(Debug, thiserror::Error)]
pub enum LoggingError {
    /// The filter cannot be parsed.
    #[error(transparent)]
    Filter(#[from] tracing_subscriber::filter::ParseError),
    /// The thread that writes could not be started.
    #[error("cannot start the thread that writes the log: {0}")]
    Thread(#[from] io::Error),
}

/// Starts logging events of level `default` and above, unless the settings say otherwise. Later
/// calls have no effect.
///
/// # Errors
///
/// When the filter cannot be parsed, or the thread cannot be started.
pub fn start(settings: &LogSettings, default: &str) -> Result<(), LoggingError> {
    let filter = EnvFilter::builder().parse(settings.filter.as_deref().unwrap_or(default))?;
    if LINES.get().is_none() {
        // A second start, for example in tests, finds the writer of the first one.
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

/// Number of log lines that were not written.
pub fn dropped_lines() -> u64 {
    LINES.get().map_or(0, LineWriter::dropped)
}

/// Waits a moment for stderr to take the remaining lines. Called before the process ends.
pub fn flush() {
    if let Some(lines) = LINES.get() {
        lines.flush(LAST_LINES);
    }
}

/// Writes a last message for people to stderr. It is lost if stderr has no reader. It may quote
/// files and clients, so control characters are escaped, except line ends.
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

    // A message here would have no reader. The metric counts.
    fn failing(&mut self, _: &io::Error) {}

    fn kept(&mut self, _: &io::Error) {}
}

/// Turns the output of a subscriber for one event into a line.
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
