//! Open files: raises the system's limit as far as possible, and keeps connections below it.

use tracing::warn;

use crate::http::listen::table::SPARES;

/// Number of files that a server opens besides connections: logs, checkpoints being loaded, files
/// of threads.
const OWN_FILES: usize = 64;

/// Raises the limit of open files. Returns the number of connections that it allows, `wanted` at
/// most.
pub(super) fn raise_limit(wanted: usize) -> usize {
    // If the system refuses, the limit stays as it is.
    let raised = rlimit::increase_nofile_limit(u64::MAX);
    let raised = raised.or_else(|_| rlimit::getrlimit(rlimit::Resource::NOFILE).map(|(soft, _)| soft));
    let Ok(files) = raised else { return wanted };
    let fit = connections_for(usize::try_from(files).unwrap_or(usize::MAX));
    if fit < wanted {
        warn!(
            open_files = files,
            max_connections = wanted,
            connections = fit,
            "the system allows too few open files for all connections: raise its limit (ulimit -n)"
        );
    }
    fit.min(wanted)
}

fn connections_for(files: usize) -> usize {
    files.saturating_sub(OWN_FILES + SPARES).max(files / 4).max(1)
}

#[cfg(test)]
mod tests {
    use super::connections_for;

    #[test]
    fn connections_leave_files_for_the_rest() {
        assert_eq!(connections_for(65_536), 65_536 - 192);
        assert_eq!(connections_for(256), 64);
        assert_eq!(connections_for(64), 16);
        assert_eq!(connections_for(0), 1);
    }
}
