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
    if !is_json(&request) {
        return Err(Error::UnsupportedMediaType);
    }
    let limit = app.settings.max_body_bytes;
    let declared = request
        .headers()
        .get(header::CONTENT_LENGTH)
        .and_then(|value| value.to_str().ok()?.parse::<u64>().ok());
    if declared.is_some_and(|length| length > limit as u64) {
        return Err(Error::BodyTooLarge { limit });
    }
    let mut request = request;
    DefaultBodyLimit::max(limit).apply(&mut request);
    let body = tokio::time::timeout(app.settings.read_timeout, Bytes::from_request(request, &())).await;
    let body = body.map_err(|_| Error::RequestTimeout)?.map_err(|rejection| match rejection.status() {
        StatusCode::PAYLOAD_TOO_LARGE => Error::BodyTooLarge { limit },
        _ => Error::InvalidRequest { message: "the body could not be read to its end".into(), param: None },
    })?;
    api::parse(&body)
}

fn is_json(request: &Request) -> bool {
    let Some(value) = request.headers().get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok())
    else {
        return false;
    };
    let media = value.split(';').next().unwrap_or_default().trim().to_ascii_lowercase();
    media == "application/json" || (media.starts_with("application/") && media.ends_with("+json"))
}
