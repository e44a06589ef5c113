//! The socket of a connection, with the tasks that hyper does not do:
//!
//! - It reports when the peer does not read.
//! - A peer that has shut down its sending side while a handler works may be waiting for the
//!   answer, or be gone: it gets a moment.
//! - Closing lingers while the peer still sends, so that the peer can read the answer. A socket
//!   that is closed with unread bytes resets the connection, and the answer is lost.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

use super::conn::Conn;

/// How long a handler may run on for a peer that has shut down its sending side.
const HALF_CLOSED_FOR: Duration = Duration::from_secs(1);
/// Longest time that closing waits for the peer to stop sending.
const LINGER_FOR: Duration = Duration::from_secs(3);
/// Most bytes that closing discards.
const LINGER_BYTES: usize = 32 << 20;

/// The socket of a connection.
pub(super) struct Stream {
    tcp: TcpStream,
    conn: Arc<Conn>,
    /// The state last reported to `conn`, so that only changes are reported.
    blocked: bool,
    /// Set when the peer has stopped sending: the moment until which a handler may run on.
    half_closed: Option<Pin<Box<Sleep>>>,
    /// Set while the socket is closing.
    linger: Option<Linger>,
}

struct Linger {
    until: Pin<Box<Sleep>>,
    passed_over: usize,
}

impl Stream {
    pub(super) fn new(tcp: TcpStream, conn: Arc<Conn>) -> Self {
        Self { tcp, conn, blocked: false, half_closed: None, linger: None }
    }

    /// Reports the result of a write.
    fn note(&mut self, result: &Poll<io::Result<usize>>) {
        match result {
            Poll::Pending => {
                self.blocked = true;
                self.conn.write_blocked(Instant::now());
            }
            Poll::Ready(Ok(bytes)) if self.blocked => self.conn.wrote(Instant::now(), *bytes),
            Poll::Ready(_) => {}
        }
    }

    /// Discards arriving bytes until the peer has finished or the wait is over.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let Self { tcp, conn, linger, .. } = self;
        let Some(Linger { until, passed_over }) = linger else { return Poll::Ready(()) };
        let mut scratch = [0; 16 << 10];
        while *passed_over < LINGER_BYTES {
            let mut buf = ReadBuf::new(&mut scratch);
            match Pin::new(&mut *tcp).poll_read(cx, &mut buf) {
                Poll::Ready(Ok(())) if !buf.filled().is_empty() => *passed_over += buf.filled().len(),
                Poll::Ready(_) => return Poll::Ready(()),
                Poll::Pending if *passed_over == 0 && !conn.has_unread_body() => return Poll::Ready(()),
                Poll::Pending => return until.as_mut().poll(cx),
            }
        }
        Poll::Ready(())
    }
}

impl AsyncRead for Stream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.half_closed.is_none() {
            let before = buf.filled().len();
            ready!(Pin::new(&mut this.tcp).poll_read(cx, buf))?;
            if buf.filled().len() > before || buf.remaining() == 0 {
                return Poll::Ready(Ok(()));
            }
            this.half_closed = Some(Box::pin(tokio::time::sleep(HALF_CLOSED_FOR)));
        }
        // Reporting the end while a handler works would drop the handler.
        match &mut this.half_closed {
            Some(over) if this.conn.is_working() => over.as_mut().poll(cx).map(Ok),
            _ => Poll::Ready(Ok(())),
        }
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.tcp).poll_write(cx, bytes);
        self.note(&result);
        result
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        parts: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let result = Pin::new(&mut self.tcp).poll_write_vectored(cx, parts);
        self.note(&result);
        result
    }

    fn is_write_vectored(&self) -> bool {
        self.tcp.is_write_vectored()
    }

    /// hyper flushes once it has written everything.
    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.blocked {
            self.blocked = false;
            self.conn.flushed();
        }
        Pin::new(&mut self.tcp).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.linger.is_none() {
            ready!(Pin::new(&mut this.tcp).poll_shutdown(cx))?;
            let until = Box::pin(tokio::time::sleep(LINGER_FOR));
            this.linger = Some(Linger { until, passed_over: 0 });
        }
        this.poll_linger(cx).map(Ok)
    }
}
