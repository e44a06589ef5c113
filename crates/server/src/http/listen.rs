//! Connections, and how they end.
//!
//! Each connection is a task. The head of a request must arrive in time, there is a limit to connections, and on
//! shutdown connections finish the request at hand and close. A connection that its client closes is dropped with the
//! handler that runs on it.

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, mpsc, watch};

use crate::settings::HttpSettings;

/// After an accept that failed, of file handles say, trying at once would only burn the processor.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(50);

/// Connections that are open, and a way to end them.
pub struct Connections {
    /// Set to true when they should end.
    ending: watch::Sender<bool>,
    /// Closed when the last one has ended.
    open: mpsc::Receiver<()>,
    /// Held by every connection.
    alive: mpsc::Sender<()>,
}

impl Default for Connections {
    fn default() -> Self {
        let (alive, open) = mpsc::channel(1);
        Self { ending: watch::Sender::new(false), open, alive }
    }
}

impl Connections {
    /// Accepts connections until `stop` is over.
    pub async fn accept(
        &self,
        listener: TcpListener,
        router: Router,
        settings: &HttpSettings,
        stop: impl Future<Output = ()>,
    ) {
        let places = Arc::new(Semaphore::new(settings.max_connections.min(Semaphore::MAX_PERMITS)));
        let mut stop = pin!(stop);
        loop {
            let next = async {
                let place = Arc::clone(&places).acquire_owned().await.ok();
                (listener.accept().await, place)
            };
            let (accepted, place) = tokio::select! {
                () = &mut stop => return,
                next = next => next,
            };
            match accepted {
                Ok((stream, _)) => {
                    let connection =
                        serve(stream, router.clone(), settings.read_timeout, self.ending.subscribe());
                    let alive = self.alive.clone();
                    tokio::spawn(async move {
                        connection.await;
                        drop((alive, place));
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(PAUSE_AFTER_ERROR).await;
                }
            }
        }
    }

    /// Lets connections finish what they are at, and waits for the last of them.
    pub async fn end(self) {
        let Self { ending, mut open, alive } = self;
        ending.send_replace(true);
        drop(alive);
        // Nothing is ever sent: this is over when all senders are gone.
        let _ = open.recv().await;
    }
}

async fn serve(stream: TcpStream, router: Router, read_timeout: Duration, mut ending: watch::Receiver<bool>) {
    // Answers are written at once; waiting for more to send would only delay them.
    let _ = stream.set_nodelay(true);
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(read_timeout)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let mut connection = pin!(connection);
    let result = tokio::select! {
        result = connection.as_mut() => result,
        () = wait(&mut ending) => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = result {
        // Clients that hang up or send nonsense are no business of ours.
        tracing::debug!(%error, "a connection ended early");
    }
}

/// Until connections should end.
async fn wait(ending: &mut watch::Receiver<bool>) {
    // The guard in the result must not be held any longer. An error means that nobody is left to say so.
    let _ = ending.wait_for(|ending| *ending).await.map(|guard| *guard);
}
