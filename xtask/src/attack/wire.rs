//! Requests byte by byte, as only an attacker writes them.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::Result;

/// Longest time in which a connection must be taken.
const CONNECTING: Duration = Duration::from_secs(5);

/// Opens a connection, within [`CONNECTING`].
pub(super) fn connect(address: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect_timeout(&address, CONNECTING)?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

/// As many connections as can be had of `count`, with something sent over each.
pub(super) fn connect_many(address: SocketAddr, count: usize, send: &[u8]) -> Vec<TcpStream> {
    let one = |_| {
        let mut stream = connect(address).ok()?;
        // The server may have closed it already, which is its right.
        let _ = stream.write_all(send);
        Some(stream)
    };
    (0..count).filter_map(one).collect()
}

/// The head of a request with a JSON body.
pub(super) fn head(method: &str, path: &str, media: &str, length: usize) -> String {
    format!(
        "{method} {path} HTTP/1.1\r\nhost: x\r\ncontent-type: {media}\r\ncontent-length: {length}\r\n\r\n"
    )
}

/// A whole request with a JSON body.
pub(super) fn post(path: &str, body: &str) -> String {
    head("POST", path, "application/json", body.len()) + body
}

/// Whether the other side has closed a connection. What it sent before is passed over.
pub(super) fn is_closed(stream: &mut TcpStream) -> bool {
    if stream.set_nonblocking(true).is_err() {
        return true;
    }
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() != ErrorKind::WouldBlock,
        }
    }
}

/// All that comes back until the other side closes, or nothing more comes for `patience`.
pub(super) fn read_all(stream: &mut TcpStream, patience: Duration) -> String {
    let mut bytes = Vec::new();
    let mut buffer = [0; 16 << 10];
    if stream.set_nonblocking(false).is_ok() && stream.set_read_timeout(Some(patience)).is_ok() {
        while let Ok(count) = stream.read(&mut buffer) {
            if count == 0 {
                break;
            }
            bytes.extend_from_slice(&buffer[..count]);
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The status of an answer; 0 if there is none.
pub(super) fn status(answer: &str) -> u16 {
    answer.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3)?.parse().ok()).unwrap_or(0)
}

/// Closes the connection in both directions.
pub(super) fn hang_up(stream: TcpStream) {
    let _ = stream.shutdown(Shutdown::Both);
}
