//! Answers and errors as responses.

use std::any::Any;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use serde::Serialize;

use crate::api::ErrorBody;
use crate::api::Timings;
use crate::error::Error;

/// The type of the error that a response carries, for the access log and the metrics.
#[derive(Clone, Copy, Debug)]
pub struct ErrorKind(pub &'static str);

/// The message of the error that a response carries, for the access log.
#[derive(Clone, Debug)]
pub struct ErrorMessage(pub String);

impl IntoResponse for Error {
    fn into_response(self) -> Response {
        let class = self.class();
        let status = StatusCode::from_u16(class.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(ErrorBody::from(&self))).into_response();
        if let Some(seconds) = self.retry_after() {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if class.status == 401 {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response.extensions_mut().insert(ErrorKind(class.kind));
        response.extensions_mut().insert(ErrorMessage(self.to_string()));
        response
    }
}

/// An answer with its timings as a header, which browsers and proxies show.
pub fn timed<T: Serialize>(answer: &T, timings: &Timings) -> Response {
    let mut response = Json(answer).into_response();
    let Timings { queue, prefill, decode, total } = timings;
    let text = format!("queue;dur={queue}, prefill;dur={prefill}, decode;dur={decode}, total;dur={total}");
    if let Ok(value) = HeaderValue::from_str(&text) {
        response.headers_mut().insert("server-timing", value);
    }
    response
}

/// The answer of a handler that panicked. The panic is a bug that affects only this request.
pub fn panicked(panic: Box<dyn Any + Send>) -> Response {
    let message = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
    let message = message.or_else(|| panic.downcast_ref::<String>().cloned());
    tracing::error!(panic = message.as_deref().unwrap_or("no message"), "a handler panicked");
    Error::Internal.into_response()
}
