//! The work around every handler: a request id, one line in the log, and the request metrics.
//!
//! A client's `x-request-id` is used if it is short and printable; otherwise one is generated. It
//! is in the answer, in its header, and in every log line about the request.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::LazyLock;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use axum::extract::Request;
use axum::http::header::{ALLOW, CONNECTION, RETRY_AFTER};
use axum::http::{HeaderMap, HeaderValue, Method, StatusCode};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use tracing::Instrument;

use super::listen::Client;
use super::reply::{ErrorKind, ErrorMessage};
use super::{head, oip};
use crate::error::Error;
use crate::metrics;

const HEADER: &str = "x-request-id";
/// Longest client's request id that is used, in bytes.
const MAX_ID_BYTES: usize = 128;

/// Most characters of an error's message in a line of the log.
const MAX_LOGGED: usize = 300;
/// The default value of `retry-after`, in seconds.
const TRY_AGAIN: HeaderValue = HeaderValue::from_static("1");

/// Paths that are answered over connections beyond the limit.
const HEALTH: [&str; 5] = ["/livez", "/readyz", "/metrics", "/v2/health/live", "/v2/health/ready"];

/// The id of a request, passed to its handler.
#[derive(Clone, Debug)]
pub struct RequestId(pub String);

/// Wraps every handler with request id, log and metrics.
pub async fn observe(mut request: Request, next: Next) -> Response {
    let id = given(request.headers()).unwrap_or_else(generate);
    let endpoint = endpoint(request.uri().path());
    let protocol = oip::is_protocol(request.uri().path());
    let method = request.method().clone();
    let client = request.extensions().get::<Client>().cloned();
    let head = head::check(request.version(), request.headers());
    let span = tracing::info_span!("request", request_id = %id);
    request.extensions_mut().insert(RequestId(id.clone()));

    let mut watch = Watch { endpoint, started: Instant::now(), over: false };
    async {
        let response = match refuse(client.as_ref(), endpoint, head).await {
            Some(error) => error.into_response(),
            None => name_methods(next.run(request).await, &method),
        };
        let mut response = if protocol { oip::in_protocol(response) } else { response };
        let took = watch.started.elapsed();
        let outcome = response.extensions().get::<ErrorKind>().map_or("ok", |kind| kind.0);
        watch.end(outcome, took);
        let (status, ms) = (response.status().as_u16(), took.as_micros() as f64 / 1e3);
        let error = response.extensions().get::<ErrorMessage>();
        let error = error.map(|message| message.0.chars().take(MAX_LOGGED).collect::<String>());
        let error = error.as_deref();
        if endpoint.starts_with("/v1/") || endpoint.starts_with("/v2/repository/models/") {
            tracing::info!(%method, endpoint, status, outcome, ms, error, "answered");
        } else {
            // Health checks and scrapes would drown the other lines.
            tracing::debug!(%method, endpoint, status, outcome, ms, error, "answered");
        }
        add_headers(&mut response, &id, client.as_ref());
        response
    }
    .instrument(span)
    .await
}

/// Waits a moment for a place if the connection has none. Returns why the request is refused, if it
/// is.
async fn refuse(client: Option<&Client>, endpoint: &str, head: Result<(), Error>) -> Option<Error> {
    if let Some(client) = client
        && !HEALTH.contains(&endpoint)
        && !client.find_place().await
    {
        return Some(Error::TooManyConnections);
    }
    head.err()
}

/// Adds the methods that a path takes to the answer: axum knows them after the handler has
/// answered.
fn name_methods(response: Response, method: &Method) -> Response {
    let ours = response.extensions().get::<ErrorKind>().is_some_and(|kind| kind.0 == "method_not_allowed");
    let Some(allowed) = response.headers().get(ALLOW).filter(|_| ours) else { return response };
    let (allow, allowed) = (allowed.clone(), allowed.to_str().unwrap_or_default().replace(',', ", "));
    let method = method.as_str().chars().take(16).collect();
    let mut named = Error::MethodNotAllowed { method, allowed }.into_response();
    named.headers_mut().insert(ALLOW, allow);
    named
}

/// Adds the headers that every answer has, or every answer of its kind.
fn add_headers(response: &mut Response, id: &str, client: Option<&Client>) {
    let busy = matches!(response.status(), StatusCode::TOO_MANY_REQUESTS | StatusCode::SERVICE_UNAVAILABLE);
    let headers = response.headers_mut();
    if let Ok(value) = HeaderValue::from_str(id) {
        headers.insert(HEADER, value);
    }
    if busy && !headers.contains_key(RETRY_AFTER) {
        headers.insert(RETRY_AFTER, TRY_AGAIN);
    }
    // The rest of a body would be in the way of the next request, so the connection ends. The
    // header tells the client, which would otherwise try to use the connection again. A spare
    // connection serves one answer.
    if client.is_some_and(|client| client.has_unread_body() || client.is_spare()) {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
}

/// Counts a request once: when it is answered, or when the client hung up and its handler was
/// dropped.
struct Watch {
    endpoint: &'static str,
    started: Instant,
    over: bool,
}

impl Watch {
    fn end(&mut self, outcome: &str, took: Duration) {
        self.over = true;
        metrics::request_ended(self.endpoint, outcome.to_owned(), took);
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if !self.over {
            let took = self.started.elapsed();
            tracing::info!(
                endpoint = self.endpoint,
                ms = took.as_micros() as f64 / 1e3,
                "the client hung up"
            );
            self.end("cancelled", took);
        }
    }
}

/// The path as a metric label. Paths that clients make up get no label of their own.
fn endpoint(path: &str) -> &'static str {
    const KNOWN: [&str; 26] = [
        "/v1/recommend",
        "/v1/rank",
        "/v1/warm",
        "/v1/models",
        "/v1/models/{}/load",
        "/v1/models/{}/unload",
        "/v1/models/{}/labels/{}",
        "/v1/models/{}/catalog",
        "/v1/models/{}/catalog/rollback",
        "/v2",
        "/v2/health/live",
        "/v2/health/ready",
        "/v2/models/{}",
        "/v2/models/{}/ready",
        "/v2/models/{}/infer",
        "/v2/models/{}/versions/{}/infer",
        "/v2/models/{}/versions/{}",
        "/v2/models/{}/versions/{}/ready",
        "/v2/repository/index",
        "/v2/repository/models/{}/load",
        "/v2/repository/models/{}/unload",
        "/livez",
        "/readyz",
        "/metrics",
        "/openapi.json",
        "/",
    ];
    KNOWN.into_iter().find(|known| is_like(known, path)).unwrap_or("other")
}

/// Whether a path matches a route; `{}` stands for any component.
fn is_like(route: &str, path: &str) -> bool {
    let (mut route, mut path) = (route.split('/'), path.split('/'));
    loop {
        match (route.next(), path.next()) {
            (None, None) => return true,
            (Some(known), Some(given)) if known == given || known == "{}" => {}
            _ => return false,
        }
    }
}

fn given(headers: &HeaderMap) -> Option<String> {
    let id = headers.get(HEADER)?.to_str().ok()?;
    let fits = !id.is_empty() && id.len() <= MAX_ID_BYTES && id.bytes().all(|byte| byte.is_ascii_graphic());
    fits.then(|| id.to_owned())
}

/// A request id from a number for this process and one for the request.
fn generate() -> String {
    static PROCESS: LazyLock<u64> = LazyLock::new(|| RandomState::new().build_hasher().finish());
    static NEXT: AtomicU64 = AtomicU64::new(0);
    format!("{:016x}-{:08x}", *PROCESS, NEXT.fetch_add(1, Ordering::Relaxed))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_become_routes() {
        assert_eq!(endpoint("/v1/models"), "/v1/models");
        assert_eq!(endpoint("/v1/models/shop/load"), "/v1/models/{}/load");
        assert_eq!(endpoint("/v1/models/shop/labels/stable"), "/v1/models/{}/labels/{}");
        assert_eq!(endpoint("/"), "/");
        for other in ["", "/v1", "/v1/models/", "/v1/models/a/b/load", "/v1/models/shop/load/"] {
            assert_eq!(endpoint(other), "other", "{other}");
        }
    }

    #[test]
    fn ids_are_taken_over_if_they_are_harmless() {
        let id = |text: &[u8]| {
            let mut headers = HeaderMap::new();
            headers.insert(HEADER, HeaderValue::from_bytes(text).unwrap());
            given(&headers)
        };
        assert_eq!(id(b"abc-123"), Some("abc-123".to_owned()));
        assert_eq!(id(b"a b"), None);
        assert_eq!(id("ä".as_bytes()), None);
        assert_eq!(id(&[b'x'; 129]), None);
        assert_ne!(generate(), generate());
    }
}
