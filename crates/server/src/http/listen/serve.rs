//! One connection, from its first request to its end.

use std::pin::{Pin, pin};
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use axum::Router;
use axum::body::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpStream;
use tokio::sync::watch;

use super::conn::Conn;
use super::stream::Stream;
use super::table::{Place, Table};

/// Largest head of a request, and most bytes that are read ahead of a body.
const MAX_HEAD_BYTES: usize = 64 << 10;
/// Time within which a spare connection must send its head.
const SPARE_HEAD: Duration = Duration::from_secs(2);

/// Number of tries of a spare connection to get a place.
const TRIES: u32 = 8;
/// Pause between two tries.
const TRY_EVERY: Duration = Duration::from_millis(40);

/// The connection that a request came over, for handlers.
#[derive(Clone, Debug)]
pub struct Client {
    conn: Arc<Conn>,
    table: Arc<Table>,
}

impl Client {
    /// Whether the connection is beyond the limit, so that only health checks are answered.
    pub fn is_spare(&self) -> bool {
        self.conn.is_spare()
    }

    /// Whether any part of the request's body was left unread. The connection cannot take another
    /// request then.
    pub fn has_unread_body(&self) -> bool {
        self.conn.has_unread_body()
    }

    /// Waits a moment for a place within the limit, if the connection has none. Returns whether it
    /// has one.
    pub async fn find_place(&self) -> bool {
        if self.table.promote(&self.conn, Instant::now()) {
            return true;
        }
        let Some(_turn) = self.table.wait() else { return false };
        for _ in 0..TRIES {
            tokio::time::sleep(TRY_EVERY).await;
            if self.table.promote(&self.conn, Instant::now()) {
                return true;
            }
        }
        false
    }
}

/// Serves a connection until it ends, is asked to close, or the server drains.
pub(super) async fn serve(
    tcp: TcpStream,
    router: Router,
    place: &Place,
    head_timeout: Duration,
    mut ending: watch::Receiver<bool>,
) {
    let (conn, table) = (&place.conn, &place.table);
    // Answers are written at once; waiting for more bytes would only delay them.
    let _ = tcp.set_nodelay(true);
    let router = TowerToHyperService::new(router);
    let service = service_fn(|request: Request<Incoming>| {
        let at_hand = AtHand::new(conn, !request.body().is_end_stream());
        let mut request = request.map(|body| Tracked { body, conn: Arc::clone(conn) });
        request.extensions_mut().insert(Client { conn: Arc::clone(conn), table: Arc::clone(table) });
        let answer = router.call(request);
        async move {
            // Requests that one client sends together take turns with those of others.
            tokio::task::yield_now().await;
            let answer = answer.await;
            drop(at_hand);
            answer
        }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(if conn.is_spare() { head_timeout.min(SPARE_HEAD) } else { head_timeout })
        .max_buf_size(MAX_HEAD_BYTES)
        .serve_connection(TokioIo::new(Stream::new(tcp, Arc::clone(conn))), service);
    let mut connection = pin!(connection);
    let mut draining = false;
    loop {
        // In this order: a request that has arrived keeps its connection from being closed as idle.
        tokio::select! {
            biased;
            result = connection.as_mut() => {
                if let Err(error) = result {
                    // A client that hangs up or sends nonsense is not an error of the server.
                    tracing::debug!(%error, "a connection ended early");
                }
                return;
            }
            () = conn.closed() => {
                tracing::debug!("closed a connection that was idle or did not read");
                return;
            }
            () = wait(&mut ending), if !draining => {
                draining = true;
                connection.as_mut().graceful_shutdown();
            }
        }
    }
}

/// Waits until the connections should end.
pub(super) async fn wait(ending: &mut watch::Receiver<bool>) {
    // The guard in the result must not be held any longer. An error means that the sender is gone.
    let _ = ending.wait_for(|ending| *ending).await.map(|guard| *guard);
}

/// The current request of a connection, from its head to its answer.
struct AtHand(Arc<Conn>);

impl AtHand {
    fn new(conn: &Arc<Conn>, has_body: bool) -> Self {
        conn.request_began(Instant::now(), has_body);
        Self(Arc::clone(conn))
    }
}

impl Drop for AtHand {
    fn drop(&mut self) {
        self.0.request_ended(Instant::now());
    }
}

/// A body that reports to its connection when it was read to its end.
struct Tracked {
    body: Incoming,
    conn: Arc<Conn>,
}

impl Body for Tracked {
    type Data = Bytes;
    type Error = hyper::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, hyper::Error>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        if frame.is_none() || self.body.is_end_stream() {
            self.conn.body_ended(Instant::now());
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}
