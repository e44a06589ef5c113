//! Reading a body: declared as JSON, within the limit, in time, at a minimum pace, and of the right
//! shape.
//!
//! A body whose declared length is too large is refused before a byte is read. The bytes that are
//! read count against a budget ([`super::body_budget`]). A body is read before the request takes a
//! place in the engine: a client that sends slowly costs only a connection.

use std::time::Instant;

use axum::body::Body;
use axum::extract::Request;
use axum::http::header;
use http_body_util::BodyExt;
use serde::de::DeserializeOwned;

use super::App;
use super::body_budget::Held;
use super::pace::Pace;
use crate::api;
use crate::error::Error;

/// JSON of at least this many bytes is parsed on a thread that may block.
const LARGE: usize = 128 << 10;

/// A body and the memory budget that it holds.
#[derive(Debug)]
pub struct Received {
    /// The bytes of the body.
    pub bytes: Vec<u8>,
    /// The held budget. Keep it for as long as the body is in use.
    pub held: Held,
}

/// Reads a request of type `T`.
///
/// # Errors
///
/// When the body is not such a request.
pub async fn read<T: DeserializeOwned + Send + 'static>(app: &App, request: Request) -> Result<T, Error> {
    read_held(app, request).await.map(|(value, _)| value)
}

/// Like [`read`], for a request that stays in memory for a while: returns the held budget, too.
///
/// # Errors
///
/// When the body is not such a request.
pub async fn read_held<T: DeserializeOwned + Send + 'static>(
    app: &App,
    request: Request,
) -> Result<(T, Held), Error> {
    if !media(&request).is_some_and(|media| is_json(&media)) {
        return Err(Error::UnsupportedMediaType);
    }
    let Received { bytes, held } = receive(app, request).await?;
    Ok((parse(bytes).await?, held))
}

/// Reads a body of any type, which may be empty.
///
/// # Errors
///
/// When it is too large, or does not arrive in time.
pub async fn read_any(app: &App, request: Request) -> Result<Received, Error> {
    receive(app, request).await
}

/// Reads a catalog change that is declared as JSON. The caller parses it, because it may be large.
///
/// # Errors
///
/// When the body is not declared as JSON, is too large, or does not arrive.
pub async fn read_catalog_change(app: &App, request: Request) -> Result<Received, Error> {
    if !media(&request).is_some_and(|media| is_json(&media)) {
        return Err(Error::UnsupportedMediaType);
    }
    upload(app, request).await
}

/// Reads the lines of a catalog.
///
/// # Errors
///
/// When the body is not declared as JSON lines, is too large, or does not arrive.
pub async fn read_lines(app: &App, request: Request) -> Result<Received, Error> {
    const LINES: [&str; 4] =
        ["application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"];
    if !media(&request).is_some_and(|media| LINES.contains(&media.as_str())) {
        return Err(Error::NotLines);
    }
    upload(app, request).await
}

/// Reads the body of an ordinary request, within the read timeout.
async fn receive(app: &App, request: Request) -> Result<Received, Error> {
    let limit = app.settings.max_body_bytes;
    let declared = check(&request, limit)?;
    let reading = collect(app, request.into_body(), limit, declared, app.bodies.hold());
    match tokio::time::timeout(app.settings.read_timeout, reading).await {
        Err(_) => Err(Error::RequestTimeout),
        Ok(Err(Stopped::NoRoom)) => Err(Error::Overloaded),
        Ok(Err(Stopped::Failed(error))) => Err(error),
        Ok(Ok(received)) => Ok(received),
    }
}

/// Reads a catalog. It may take any time at the minimum pace. All catalogs that arrive at the same
/// time share the budget of one catalog of the largest size. A declared length is reserved before a
/// byte is read.
async fn upload(app: &App, request: Request) -> Result<Received, Error> {
    let limit = app.max_catalog_bytes;
    let declared = check(&request, limit)?;
    let mut held = app.uploads.hold();
    held.cover(declared.unwrap_or(0)).map_err(|_| Error::UploadsBusy)?;
    match collect(app, request.into_body(), limit, declared, held).await {
        Err(Stopped::NoRoom) => Err(Error::UploadsBusy),
        Err(Stopped::Failed(error)) => Err(error),
        Ok(received) => Ok(received),
    }
}

/// The reason why a body was not read to its end.
enum Stopped {
    NoRoom,
    Failed(Error),
}

/// The declared length, if there is one. Refuses a request that can be refused unread.
fn check(request: &Request, limit: usize) -> Result<Option<usize>, Error> {
    let mut encodings = request.headers().get_all(header::CONTENT_ENCODING).iter();
    if let Some(encoding) = encodings.find(|value| !value.as_bytes().eq_ignore_ascii_case(b"identity")) {
        return Err(Error::UnsupportedEncoding(encoding.to_str().unwrap_or("?").chars().take(32).collect()));
    }
    let length = request.headers().get(header::CONTENT_LENGTH);
    match length.and_then(|value| value.to_str().ok()?.parse::<u64>().ok()) {
        Some(length) if length > limit as u64 => Err(Error::BodyTooLarge { limit }),
        Some(length) => Ok(usize::try_from(length).ok()),
        None => Ok(None),
    }
}

/// Reads a body to its end. Budget is taken as bytes arrive: a client that declares much and sends
/// little holds little.
async fn collect(
    app: &App,
    mut body: Body,
    limit: usize,
    declared: Option<usize>,
    mut held: Held,
) -> Result<Received, Stopped> {
    let mut bytes = Vec::new();
    let mut pace = Pace::new(app.settings.body_pace, Instant::now());
    loop {
        let frame = tokio::time::timeout_at(pace.deadline().into(), body.frame()).await;
        let frame = match frame.map_err(|_| Stopped::Failed(Error::RequestTimeout))? {
            None => return Ok(Received { bytes, held }),
            Some(frame) => frame.map_err(|_| {
                let message = "the body could not be read to its end: send all of it, as declared";
                Stopped::Failed(Error::InvalidRequest { message: message.into(), param: None })
            })?,
        };
        // Trailers carry no meaning here.
        let Ok(data) = frame.into_data() else { continue };
        pace.moved(Instant::now(), data.len() as u64);
        let needed = bytes.len() + data.len();
        if needed > limit {
            return Err(Stopped::Failed(Error::BodyTooLarge { limit }));
        }
        if needed > bytes.capacity() {
            // Double the capacity, but not beyond what can still come.
            let capacity = needed.max(bytes.capacity() * 2).min(declared.unwrap_or(limit).max(needed));
            held.cover(capacity).map_err(|_| Stopped::NoRoom)?;
            bytes.reserve_exact(capacity - bytes.len());
        }
        bytes.extend_from_slice(&data);
    }
}

/// Parses JSON. Large JSON is parsed on a thread that may block.
async fn parse<T: DeserializeOwned + Send + 'static>(bytes: Vec<u8>) -> Result<T, Error> {
    if bytes.len() < LARGE {
        return api::parse(&bytes);
    }
    let parsing = tokio::task::spawn_blocking(move || api::parse(&bytes));
    parsing.await.map_err(Error::internal)?
}

/// The declared media type of the body.
fn media(request: &Request) -> Option<String> {
    let value = request.headers().get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

fn is_json(media: &str) -> bool {
    media == "application/json" || (media.starts_with("application/") && media.ends_with("+json"))
}
