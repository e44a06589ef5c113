//! Reading a body: declared as JSON, within the limit, in time and at a least pace, and the right shape.
//!
//! A length that is declared too large is refused before a byte is read. What is read counts against a budget
//! ([`super::body_budget`]), and it is read before the request takes a place in the engine: a client that sends slowly
//! costs a connection and nothing else.

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

/// JSON of this size is parsed on a thread that serves nobody else meanwhile.
const LARGE: usize = 128 << 10;

/// A body and the room that it holds.
#[derive(Debug)]
pub struct Received {
    /// The bytes.
    pub bytes: Vec<u8>,
    /// To be kept for as long as what was read is in use.
    pub held: Held,
}

/// Reads a request of type `T`.
///
/// # Errors
///
/// When the body is none.
pub async fn read<T: DeserializeOwned + Send + 'static>(app: &App, request: Request) -> Result<T, Error> {
    read_held(app, request).await.map(|(value, _)| value)
}

/// As [`read`], for a request that stays in memory for a while: with the room that it holds.
///
/// # Errors
///
/// When the body is none.
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
/// When it is too large, or does not arrive.
pub async fn read_any(app: &App, request: Request) -> Result<Received, Error> {
    receive(app, request).await
}

/// Reads a change of a catalog as JSON, and leaves it to the caller to parse: it may be large.
///
/// # Errors
///
/// When the body is none.
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
/// When the body is none.
pub async fn read_lines(app: &App, request: Request) -> Result<Received, Error> {
    const LINES: [&str; 4] =
        ["application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"];
    if !media(&request).is_some_and(|media| LINES.contains(&media.as_str())) {
        return Err(Error::NotLines);
    }
    upload(app, request).await
}

/// A body of an ordinary request, within the read time-out.
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

/// A catalog. It may take as long as it keeps the least pace. All catalogs that arrive at a time share the room of one of
/// the largest; a declared length is reserved before a byte is read.
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

/// Why a body was not read to its end.
enum Stopped {
    NoRoom,
    Failed(Error),
}

/// The declared length, if there is one. What can be refused unread is.
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

/// Reads a body to its end. Room is taken as bytes arrive: a client that declares much and sends little holds little.
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
        // Trailers say nothing here.
        let Ok(data) = frame.into_data() else { continue };
        pace.moved(Instant::now(), data.len() as u64);
        let needed = bytes.len() + data.len();
        if needed > limit {
            return Err(Stopped::Failed(Error::BodyTooLarge { limit }));
        }
        if needed > bytes.capacity() {
            // Doubling, but not beyond what can come.
            let capacity = needed.max(bytes.capacity() * 2).min(declared.unwrap_or(limit).max(needed));
            held.cover(capacity).map_err(|_| Stopped::NoRoom)?;
            bytes.reserve_exact(capacity - bytes.len());
        }
        bytes.extend_from_slice(&data);
    }
}

/// Parses JSON. What takes long is done where nobody else is served.
async fn parse<T: DeserializeOwned + Send + 'static>(bytes: Vec<u8>) -> Result<T, Error> {
    if bytes.len() < LARGE {
        return api::parse(&bytes);
    }
    let parsing = tokio::task::spawn_blocking(move || api::parse(&bytes));
    parsing.await.map_err(Error::internal)?
}

/// What the body is declared to be.
fn media(request: &Request) -> Option<String> {
    let value = request.headers().get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

fn is_json(media: &str) -> bool {
    media == "application/json" || (media.starts_with("application/") && media.ends_with("+json"))
}
