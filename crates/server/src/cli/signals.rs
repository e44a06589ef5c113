//! Signals of a server: some end it, others make it reopen its logs.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};

/// SIGTERM, SIGINT and SIGQUIT: finish the current requests and end.
pub(super) struct Stop([Signal; 3]);

impl Stop {
    pub(super) fn new() -> io::Result<Self> {
        let [terminate, interrupt, quit] =
            [SignalKind::terminate(), SignalKind::interrupt(), SignalKind::quit()].map(signal);
        Ok(Self([terminate?, interrupt?, quit?]))
    }

    /// Waits for the next of these signals. One that came before the wait is not lost.
    pub(super) async fn next(&mut self) {
        let [terminate, interrupt, quit] = &mut self.0;
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
            _ = quit.recv() => {}
        }
    }
}

/// SIGHUP and SIGUSR1: reopen logs, as after a rotation. Neither ends a server.
pub(super) struct Reopen([Signal; 2]);

impl Reopen {
    pub(super) fn new() -> io::Result<Self> {
        let [hang_up, user] = [SignalKind::hangup(), SignalKind::user_defined1()].map(signal);
        Ok(Self([hang_up?, user?]))
    }

    /// Waits for the next of these signals.
    pub(super) async fn next(&mut self) {
        let [hang_up, user] = &mut self.0;
        tokio::select! {
            _ = hang_up.recv() => {}
            _ = user.recv() => {}
        }
    }
}
