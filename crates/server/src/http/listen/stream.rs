//! The socket of a connection, with what hyper leaves to it.
//!
//! - It reports when the peer does not read.
//! - A peer that has shut its sending side down while a handler works may be waiting for the answer, or be gone: it gets
//!   a moment.
//! - Closing lingers while the peer still sends, so that it can read the answer: a socket that is closed with unread bytes
//!   resets the connection, and the answer is lost.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};
use std::time::{Duration, Instant};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::Sleep;

use super::conn::Conn;

/// How long a handler goes on for a peer that has shut its sending side down.
const HALF_CLOSED_FOR: Duration = Duration::from_secs(1);
/// Closing waits so long for the peer to stop sending,
const LINGER_FOR: Duration = Duration::from_secs(3);
/// and passes over so many bytes.
const LINGER_BYTES: usize = 32 << 20;

/// A socket.
pub(super) struct Stream {
    tcp: TcpStream,
    conn: Arc<Conn>,
    /// Mirrors what `conn` was told, so that it is told changes only.
    blocked: bool,
    /// Set when the peer sends no more: until when a handler may go on.
    half_closed: Option<Pin<Box<Sleep>>>,
    /// Set while closing.
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

    /// Tells how a write went.
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

    /// Passes over what still arrives, until the peer has finished or is no longer waited for.
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
        // An end that is told while a handler works drops the handler.
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

    /// hyper flushes once all that it had to write is written.
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
