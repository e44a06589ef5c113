//! The log: structured, to stderr, so that stdout stays free for results.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::settings::{LogFormat, LogSettings};

/// Starts logging, of `default` and above unless the settings say otherwise. Later calls have no effect.
///
/// # Errors
///
/// When the filter cannot be understood.
pub fn start(settings: &LogSettings, default: &str) -> Result<(), tracing_subscriber::filter::ParseError> {
    let filter = EnvFilter::builder().parse(settings.filter.as_deref().unwrap_or(default))?;
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let colours = std::io::stderr().is_terminal();
    // A second start, in tests say, finds the first one's logger in place.
    let _ = match settings.format {
        LogFormat::Text => builder.with_target(false).with_ansi(colours).try_init(),
        LogFormat::Json => builder.json().flatten_event(true).try_init(),
    };
    Ok(())
}
