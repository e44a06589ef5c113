//! One function per route: read, ask the service, write. The comments are the documentation in
//! `/openapi.json`.

use axum::Json;
use axum::extract::{Extension, Request, State};
use axum::http::{Method, header};
use axum::response::{IntoResponse, Response};
use serde_json::json;

use super::middleware::RequestId;
use super::{SharedApp, body, reply};
use crate::api::{
    ErrorBody, Health, RankRequest, RankResponse, RecommendRequest, RecommendResponse, WarmRequest,
    WarmResponse,
};
use crate::error::Error;
use crate::{metrics as metering, openapi as description};

/// Recommend items to a user.
#[utoipa::path(
    post, path = "/v1/recommend", tag = "recommendation", request_body = RecommendRequest,
    responses(
        (status = 200, description = "A slate, best item first. It may be shorter than asked; `reason` says why.",
         body = RecommendResponse),
        (status = 400, description = "Not JSON, or not this request.", body = ErrorBody),
        (status = 404, description = "No such model.", body = ErrorBody),
        (status = 408, description = "The body did not arrive in time.", body = ErrorBody),
        (status = 413, description = "The body is too large.", body = ErrorBody),
        (status = 415, description = "The body is not declared to be JSON.", body = ErrorBody),
        (status = 422, description = "A value means nothing or is over its limit, or no history item is known.",
         body = ErrorBody),
        (status = 429, description = "Too many requests; `retry-after` says when to try again.", body = ErrorBody),
        (status = 500, description = "A bug.", body = ErrorBody),
        (status = 503, description = "Loading, shutting down or unhealthy.", body = ErrorBody),
        (status = 504, description = "The deadline came first.", body = ErrorBody),
    )
)]
pub async fn recommend(
    State(app): State<SharedApp>,
    Extension(RequestId(id)): Extension<RequestId>,
    request: Request,
) -> Result<Response, Error> {
    app.registry()?;
    let (request, _held) = body::read_held::<RecommendRequest>(&app, request).await?;
    // Only after the body has arrived: a client that sends slowly must not hold a place.
    let _place = app.take_place()?;
    let answer = answer(&app, request, id).await?;
    Ok(reply::timed(&answer, &answer.timings_ms))
}

/// Answers a request for items that was read. Logs and counts the answer.
pub(super) async fn answer(
    app: &SharedApp,
    mut request: RecommendRequest,
    id: String,
) -> Result<RecommendResponse, Error> {
    // From here on, the request belongs to this version and this catalog.
    let service = app.registry()?.resolve(request.model.take().as_deref())?;
    let logged = app.request_log.get().map(|log| (log, log.asked(&request)));
    let answer = service.recommend(request, id).await?;
    if let Some((log, pending)) = logged {
        log.answered(pending, &answer);
    }
    metering::answered(&answer.timings_ms, answer.items.len());
    Ok(answer)
}

/// Predict what a user would do with given items.
///
/// A model that ranks predicts every task. A model of semantic IDs predicts the exact
/// log-probability of each item.
#[utoipa::path(
    post, path = "/v1/rank", tag = "recommendation", request_body = RankRequest,
    responses(
        (status = 200, description = "Predictions for every candidate that the catalog has.", body = RankResponse),
        (status = 400, description = "Not JSON, or not this request.", body = ErrorBody),
        (status = 404, description = "No such model.", body = ErrorBody),
        (status = 413, description = "The body is too large.", body = ErrorBody),
        (status = 422, description = "A value means nothing or is over its limit, something that the model reads is missing, or no \
            item is known.", body = ErrorBody),
        (status = 429, description = "Too many requests; `retry-after` says when to try again.", body = ErrorBody),
        (status = 503, description = "Loading, shutting down or unhealthy.", body = ErrorBody),
        (status = 504, description = "The deadline came first.", body = ErrorBody),
    )
)]
pub async fn rank(
    State(app): State<SharedApp>,
    Extension(RequestId(id)): Extension<RequestId>,
    request: Request,
) -> Result<Response, Error> {
    let registry = app.registry()?;
    let (mut request, _held) = body::read_held::<RankRequest>(&app, request).await?;
    // Only after the body has arrived: a client that sends slowly must not hold a place.
    let _place = app.take_place()?;
    // From here on, the request belongs to this version and this catalog.
    let service = registry.resolve(request.model.take().as_deref())?;
    let answer = service.rank(request, id).await?;
    metering::answered(&answer.timings_ms, answer.candidates.len());
    Ok(reply::timed(&answer, &answer.timings_ms))
}

/// Compute a user's context and keep it, so that the next request finds it.
#[utoipa::path(
    post, path = "/v1/warm", tag = "recommendation", request_body = WarmRequest,
    responses(
        (status = 200, description = "The context is cached.", body = WarmResponse),
        (status = 400, description = "Not JSON, or not this request.", body = ErrorBody),
        (status = 404, description = "No such model.", body = ErrorBody),
        (status = 422, description = "A value means nothing or is over its limit, or no history item is known.",
         body = ErrorBody),
        (status = 429, description = "Too many requests; `retry-after` says when to try again.", body = ErrorBody),
        (status = 503, description = "Loading, shutting down or unhealthy.", body = ErrorBody),
        (status = 504, description = "The deadline came first.", body = ErrorBody),
    )
)]
pub async fn warm(
    State(app): State<SharedApp>,
    Extension(RequestId(id)): Extension<RequestId>,
    request: Request,
) -> Result<Response, Error> {
    let registry = app.registry()?;
    let (mut request, _held) = body::read_held::<WarmRequest>(&app, request).await?;
    // Only after the body has arrived: a client that sends slowly must not hold a place.
    let _place = app.take_place()?;
    // From here on, the request belongs to this version and this catalog.
    let service = registry.resolve(request.model.take().as_deref())?;
    let answer = service.warm(request, id).await?;
    metering::answered(&answer.timings_ms, 0);
    Ok(reply::timed(&answer, &answer.timings_ms))
}

/// Whether the process is alive: its engine's loop is running. Restart it if not.
#[utoipa::path(
    get, path = "/livez", tag = "health",
    responses((status = 200, description = "Yes.", body = Health), (status = 503, description = "The engine hangs or is dead.", body = ErrorBody))
)]
pub async fn livez(State(app): State<SharedApp>) -> Result<Json<Health>, Error> {
    // While loading there is no engine that could hang.
    if let Ok(registry) = app.registry()
        && !app.is_draining()
        && registry.heartbeat_age() > app.settings.liveness_timeout
    {
        return Err(Error::Unhealthy);
    }
    Ok(Json(Health::but_for(Vec::new())))
}

/// Whether requests are taken: some version is loaded and its engine is alive, and the server is
/// not shutting down.
///
/// The status is `degraded` while versions of the state directory could not be restored; `missing`
/// lists them.
#[utoipa::path(
    get, path = "/readyz", tag = "health",
    responses((status = 200, description = "Yes.", body = Health), (status = 503, description = "Loading, nothing is loaded, no engine is alive, or shutting down.", body = ErrorBody))
)]
pub async fn readyz(State(app): State<SharedApp>) -> Result<Json<Health>, Error> {
    if app.is_draining() {
        return Err(Error::Draining);
    }
    let registry = app.registry()?;
    let served = registry.served();
    if served.is_empty() {
        registry.resolve(None)?;
        return Err(Error::NoModel);
    }
    if served.iter().all(|served| served.heartbeat_age() > app.settings.liveness_timeout) {
        return Err(Error::Unhealthy);
    }
    Ok(Json(Health::but_for(registry.missing_versions())))
}

/// Metrics in Prometheus' text format.
#[utoipa::path(
    get, path = "/metrics", tag = "health",
    responses((status = 200, description = "Prometheus text format.", body = String, content_type = "text/plain"))
)]
pub async fn metrics(State(app): State<SharedApp>) -> Response {
    if let Ok(registry) = app.registry() {
        metering::publish(registry, !app.is_draining());
    }
    metering::publish_process(app.request_log.get());
    ([(header::CONTENT_TYPE, "text/plain; version=0.0.4; charset=utf-8")], app.metrics.render())
        .into_response()
}

/// This API description, as an OpenAPI document.
#[utoipa::path(get, path = "/openapi.json", tag = "meta", responses((status = 200, description = "OpenAPI document.")))]
pub async fn openapi() -> Result<Response, Error> {
    let text = description::json().map_err(Error::internal)?;
    Ok(([(header::CONTENT_TYPE, "application/json")], text).into_response())
}

/// Points to the description, the models and the health checks.
pub async fn index() -> Json<serde_json::Value> {
    Json(json!({
        "service": "beamline",
        "version": env!("CARGO_PKG_VERSION"),
        "recommend": "POST /v1/recommend",
        "rank": "POST /v1/rank",
        "warm": "POST /v1/warm",
        "models": "/v1/models",
        "health": ["/livez", "/readyz"],
        "metrics": "/metrics",
        "openapi": "/openapi.json"
    }))
}

/// Answers a path that does not exist.
pub async fn not_found() -> Error {
    Error::NotFound
}

/// Answers a method that the path does not take. The middleware adds the methods that it does take.
pub async fn method_not_allowed(method: Method) -> Error {
    Error::MethodNotAllowed { method: method.as_str().chars().take(16).collect(), allowed: String::new() }
}
