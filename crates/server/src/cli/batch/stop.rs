//! SIGTERM and SIGINT: stop answering and keep the finished work.

use std::io;
use std::time::Duration;

use tokio::runtime::Runtime as Tokio;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

/// After this time, or a second signal, the process exits at once: it may be blocked reading from a
/// pipe. At most the work after the last checkpoint is lost.
const PATIENCE: Duration = Duration::from_secs(10);

/// Records whether a signal came.
pub(super) struct Stop {
    code: watch::Sender<Option<u8>>,
}

impl Stop {
    /// Leaves signals alone: they end the process, as they do by default.
    pub(super) fn never() -> Self {
        Self { code: watch::Sender::new(None) }
    }

    /// From now on, signals are only recorded.
    pub(super) fn on_signals(tokio: &Tokio) -> io::Result<Self> {
        let _guard = tokio.enter();
        let mut terminate = signal(SignalKind::terminate())?;
        let mut interrupt = signal(SignalKind::interrupt())?;
        let stop = Self::never();
        let code = stop.code.clone();
        tokio.spawn(async move {
            let mut next = async || {
                tokio::select! {
                    _ = terminate.recv() => SignalKind::terminate(),
                    _ = interrupt.recv() => SignalKind::interrupt(),
                }
            };
            // The exit code as shells report it.
            let exit = 128_i32.saturating_add(next().await.as_raw_value());
            code.send_replace(Some(u8::try_from(exit).unwrap_or(u8::MAX)));
            let _ = tokio::time::timeout(PATIENCE, next()).await;
            std::process::exit(exit);
        });
        Ok(stop)
    }

    /// The exit code, if a signal came.
    pub(super) fn code(&self) -> Option<u8> {
        *self.code.borrow()
    }

    /// Waits until a signal comes.
    pub(super) async fn wait(&self) {
        // The guard in the result must not be held. The sender is in `self`, so it cannot go away.
        let _ = self.code.subscribe().wait_for(Option::is_some).await.map(|code| *code);
    }
}
