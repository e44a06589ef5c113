//! Connections, and how they end.
//!
//! | module | one idea |
//! | --- | --- |
//! | [`serve`] | one connection, from its first request to its end |
//! | [`conn`] | the state of a connection, and whether it may be closed to make room |
//! | [`table`] | all connections: which get a place, and which give one up |
//! | [`stream`] | the socket: peers that do not read, half-closed peers, a close that keeps the answer |
//!
//! Each connection is a task. The head of a request must arrive in time and bodies at a minimum
//! pace, and answers must be read at a minimum pace. The number of connections is limited, with
//! spare places for health checks. On shutdown, connections finish the current request and close. A
//! connection that its client closes is dropped together with its running handler.

mod conn;
mod serve;
mod stream;
pub(crate) mod table;

use std::future::Future;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use socket2::{SockRef, TcpKeepalive};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

pub use serve::Client;
use table::{Place, Table};

use crate::settings::HttpSettings;

/// Pause after a failed accept, for want of file handles for example: trying at once would only
/// burn CPU time. Several tries may pass before enough idle connections have closed, and a health
/// check waits for all of them.
const PAUSE_AFTER_ERROR: Duration = Duration::from_millis(10);
/// Failed accepts are logged at most once in this time.
const LOG_ERRORS_EVERY: Duration = Duration::from_secs(10);
/// Number of tries to find a place for a new connection.
const TRIES: u32 = 20;
/// Pause between two tries.
const TRY_EVERY: Duration = Duration::from_millis(5);
/// How often all connections are checked for peers that do not read.
const LOOK_EVERY: Duration = Duration::from_millis(100);
/// Silence after which the system probes a peer.
const KEEPALIVE_AFTER: Duration = Duration::from_secs(60);
/// Interval of further probes. The system gives up after a few.
const KEEPALIVE_EVERY: Duration = Duration::from_secs(15);

/// The open connections, and a way to end them.
pub struct Connections {
    /// Set to true when the connections should end.
    ending: watch::Sender<bool>,
    /// Closed when the last connection has ended.
    open: mpsc::Receiver<()>,
    /// A sender for each connection to hold.
    alive: mpsc::Sender<()>,
    /// Ends the task that checks the connections.
    over: Arc<AtomicBool>,
}

impl Default for Connections {
    fn default() -> Self {
        let (alive, open) = mpsc::channel(1);
        Self { ending: watch::Sender::new(false), open, alive, over: Arc::default() }
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
        let table = Arc::new(Table::new(settings.max_connections, settings.write_pace));
        tokio::spawn(look_through(Arc::clone(&table), self.ending.subscribe(), Arc::clone(&self.over)));
        let mut last_logged: Option<Instant> = None;
        let mut stop = pin!(stop);
        loop {
            let accepted = tokio::select! {
                () = &mut stop => return,
                accepted = listener.accept() => accepted,
            };
            match accepted {
                Ok((stream, _)) => {
                    // Without a place the connection is closed at once, so that its client does not
                    // wait for a timeout.
                    if let Some(place) = find_place(&table).await {
                        self.spawn(stream, place, router.clone(), settings.read_timeout);
                    }
                }
                Err(error) => {
                    if last_logged.is_none_or(|at| at.elapsed() >= LOG_ERRORS_EVERY) {
                        tracing::warn!(%error, "cannot accept connections; closing idle ones to make room");
                        last_logged = Some(Instant::now());
                    }
                    table.make_room(Instant::now());
                    tokio::time::sleep(PAUSE_AFTER_ERROR).await;
                }
            }
        }
    }

    fn spawn(&self, stream: TcpStream, place: Place, router: Router, head_timeout: Duration) {
        // Keep-alive notices a peer whose machine is gone, even if there is nothing to send.
        let keepalive = TcpKeepalive::new().with_time(KEEPALIVE_AFTER).with_interval(KEEPALIVE_EVERY);
        let _ = SockRef::from(&stream).set_tcp_keepalive(&keepalive);
        let (alive, ending) = (self.alive.clone(), self.ending.subscribe());
        tokio::spawn(async move {
            serve::serve(stream, router, &place, head_timeout, ending).await;
            drop((alive, place));
        });
    }

    /// Lets connections finish their current request, and waits for the last of them.
    pub async fn end(self) {
        let Self { ending, mut open, alive, over } = self;
        ending.send_replace(true);
        drop(alive);
        // Nothing is ever sent: this ends when all senders are gone.
        let _ = open.recv().await;
        over.store(true, Ordering::Relaxed);
    }
}

/// A place for a new connection. In a burst, each connection needs a moment to send its request
/// before it counts as idle, and the next ones wait for that.
async fn find_place(table: &Arc<Table>) -> Option<Place> {
    for _ in 0..TRIES {
        let place = table.admit(Instant::now());
        if place.is_some() {
            return place;
        }
        tokio::time::sleep(TRY_EVERY).await;
    }
    None
}

/// Closes connections whose peers do not read, and idle ones while the server drains.
async fn look_through(table: Arc<Table>, ending: watch::Receiver<bool>, over: Arc<AtomicBool>) {
    while !over.load(Ordering::Relaxed) {
        tokio::time::sleep(LOOK_EVERY).await;
        let draining = *ending.borrow();
        table.close_those_over(Instant::now(), draining);
    }
}
