//! Reading a body: declared as JSON, within the limit, in time, and the right shape.
//!
//! A length that is declared too large is refused before a byte is read.

use axum::body::Bytes;
use axum::extract::{DefaultBodyLimit, FromRequest, Request};
use axum::http::{StatusCode, header};
use serde::de::DeserializeOwned;

use super::App;
use crate::api;
use crate::error::Error;

/// Reads a request of type `T`.
///
/// # Errors
///
/// When the body is none.
pub async fn read<T: DeserializeOwned>(app: &App, request: Request) -> Result<T, Error> {
    read_up_to(app, request, app.settings.max_body_bytes).await
}

/// As [`read`], with a limit of its own.
///
/// # Errors
///
/// When the body is none.
pub async fn read_up_to<T: DeserializeOwned>(app: &App, request: Request, limit: usize) -> Result<T, Error> {
    if !media(&request).is_some_and(|media| is_json(&media)) {
        return Err(Error::UnsupportedMediaType);
    }
    api::parse(&bytes(app, request, limit).await?)
}

/// As [`read`], of a body that may be left out.
///
/// # Errors
///
/// When the body is something else.
pub async fn read_if_any<T: DeserializeOwned + Default>(app: &App, request: Request) -> Result<T, Error> {
    let json = media(&request).is_some_and(|media| is_json(&media));
    match bytes(app, request, app.settings.max_body_bytes).await? {
        body if body.is_empty() => Ok(T::default()),
        _ if !json => Err(Error::UnsupportedMediaType),
        body => api::parse(&body),
    }
}

/// Reads the lines of a catalog.
///
/// # Errors
///
/// When the body is none.
pub async fn read_lines(app: &App, request: Request) -> Result<Bytes, Error> {
    const LINES: [&str; 4] =
        ["application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonlines"];
    if !media(&request).is_some_and(|media| LINES.contains(&media.as_str())) {
        return Err(Error::NotLines);
    }
    bytes(app, request, app.max_catalog_bytes).await
}

async fn bytes(app: &App, mut request: Request, limit: usize) -> Result<Bytes, Error> {
    let declared = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|length| length > limit as u64) {
        return Err(Error::BodyTooLarge { limit });
    }
    DefaultBodyLimit::max(limit).apply(&mut request);
    let body = tokio::time::timeout(app.settings.read_timeout, Bytes::from_request(request, &())).await;
    body.map_err(|_| Error::RequestTimeout)?.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Error::BodyTooLarge { limit },
        _ => Error::InvalidRequest { message: "the body could not be read to its end".into(), param: None },
    })
}

/// What the body is declared to be.
fn media(request: &Request) -> Option<String> {
    let value = request.headers().get(header::CONTENT_TYPE)?.to_str().ok()?;
    Some(value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase())
}

fn is_json(media: &str) -> bool {
    media == "application/json" || (media.starts_with("application/") && media.ends_with("+json"))
}
