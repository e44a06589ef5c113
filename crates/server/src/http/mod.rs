//! HTTP: routes, bodies, request ids, connections, draining.
//!
//! | module | one idea |
//! | --- | --- |
//! | [`handlers`] | one function per route: read, ask the service, write |
//! | [`models`] | the routes that list and change models |
//! | [`catalogs`] | the routes that show and change catalogs |
//! | [`oip`] | the Open Inference Protocol over the same registry |
//! | [`infer`] | inference of that protocol: a request for items in a tensor |
//! | [`admin`] | which clients may change models and catalogs |
//! | [`body`] | bodies are read with limits and in time, and errors say what is wrong |
//! | [`body_budget`] | the bytes of bodies in memory are bounded |
//! | [`pace`] | the minimum pace of a transfer |
//! | [`head`] | headers that a request must state only once |
//! | [`middleware`] | request ids, the access log, request metrics, panics |
//! | [`reply`] | answers and errors as responses |
//! | [`listen`] | connections, and how they end |
//!
//! Invariant: a client that hangs up drops its handler, and with it its request in the engine.

pub mod admin;
pub mod body;
pub mod body_budget;
pub mod catalogs;
pub mod handlers;
pub mod head;
pub mod infer;
pub mod listen;
pub mod middleware;
pub mod models;
pub mod oip;
pub mod pace;
pub mod reply;
#[cfg(test)]
mod tests;

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use axum::Router;
use axum::routing::{get, post, put};
use metrics_exporter_prometheus::PrometheusHandle;
use tokio::sync::Semaphore;
use tower_http::catch_panic::CatchPanicLayer;

use body_budget::BodyBudget;

use crate::error::Error;
use crate::registry::Registry;
use crate::request_log::RequestLog;
use crate::settings::{AdminKey, AdminSettings, HttpSettings};

/// Requests that may be on their way to or from the engine, in addition to those that it holds.
const SPARE_REQUESTS: usize = 64;

/// The state that all handlers share.
#[derive(Debug)]
pub struct App {
    /// Limits and times.
    pub settings: HttpSettings,
    /// Renders the metrics as text.
    pub metrics: PrometheusHandle,
    /// The log of answers, if it is enabled.
    pub request_log: OnceLock<RequestLog>,
    /// The key that changes need, if there is one.
    pub admin_key: Option<AdminKey>,
    /// Size of the largest catalog that is read, in bytes.
    pub max_catalog_bytes: usize,
    registry: OnceLock<Arc<Registry>>,
    draining: AtomicBool,
    /// Budget for the bodies of requests in memory.
    pub(super) bodies: BodyBudget,
    /// Budget for catalogs that arrive or are being built.
    pub(super) uploads: BodyBudget,
    /// Places for requests that were read and not answered. Without a free place, new ones are
    /// refused.
    requests: Semaphore,
}

/// The state, shared by all handlers.
pub type SharedApp = Arc<App>;

impl App {
    /// An app that is still loading, for an engine that holds at most `requests` requests.
    pub fn new(
        settings: HttpSettings,
        admin: &AdminSettings,
        metrics: PrometheusHandle,
        requests: usize,
    ) -> Self {
        let permits = requests.saturating_add(SPARE_REQUESTS).min(Semaphore::MAX_PERMITS);
        Self {
            bodies: BodyBudget::new(settings.max_body_memory),
            uploads: BodyBudget::new(admin.max_catalog_bytes),
            settings,
            metrics,
            request_log: OnceLock::new(),
            admin_key: admin.key.clone(),
            max_catalog_bytes: admin.max_catalog_bytes,
            registry: OnceLock::new(),
            draining: AtomicBool::new(false),
            requests: Semaphore::new(permits),
        }
    }

    /// Records that the models of the start are loaded and have answered a probe.
    pub fn set_ready(&self, registry: Arc<Registry>) {
        // This is called once; a second registry would be dropped.
        let _ = self.registry.set(registry);
    }

    /// From now on, /readyz reports that the server is not ready.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether the server is shutting down.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// The registry of models, once loading is done.
    ///
    /// # Errors
    ///
    /// [`Error::Loading`] before that.
    pub fn registry(&self) -> Result<&Arc<Registry>, Error> {
        self.registry.get().ok_or(Error::Loading)
    }

    /// Takes a place for one request.
    ///
    /// # Errors
    ///
    /// [`Error::Overloaded`] when there is none.
    pub fn take_place(&self) -> Result<tokio::sync::SemaphorePermit<'_>, Error> {
        self.requests.try_acquire().map_err(|_| Error::Overloaded)
    }
}

/// All routes of the server.
pub fn router(app: SharedApp) -> Router {
    let routes = health_routes()
        .route("/v1/recommend", post(handlers::recommend))
        .route("/v1/rank", post(handlers::rank))
        .route("/v1/warm", post(handlers::warm))
        .route("/v1/models", get(models::list))
        .route("/v1/models/{name}/load", post(models::load))
        .route("/v1/models/{name}/unload", post(models::unload))
        .route("/v1/models/{name}/labels/{label}", put(models::set_label).delete(models::remove_label))
        .route("/v1/models/{name}/catalog", get(catalogs::list).put(catalogs::replace).patch(catalogs::patch))
        .route("/v1/models/{name}/catalog/rollback", post(catalogs::roll_back))
        .route("/v2", get(oip::server))
        .route("/v2/models/{name}", get(oip::model))
        .route("/v2/models/{name}/ready", get(oip::model_ready))
        .route("/v2/models/{name}/infer", post(infer::infer))
        .route("/v2/models/{name}/versions/{version}/infer", post(infer::infer_version))
        .route("/v2/models/{name}/versions/{version}", get(oip::version))
        .route("/v2/models/{name}/versions/{version}/ready", get(oip::version_ready))
        .route("/v2/repository/index", post(oip::index))
        .route("/v2/repository/models/{name}/load", post(oip::load))
        .route("/v2/repository/models/{name}/unload", post(oip::unload))
        .route("/openapi.json", get(handlers::openapi))
        .route("/", get(handlers::index))
        .fallback(handlers::not_found)
        .method_not_allowed_fallback(handlers::method_not_allowed);
    with_layers(routes.with_state(app))
}

/// The routes of a listener that only serves health checks and metrics.
pub fn health_router(app: SharedApp) -> Router {
    let routes = health_routes()
        .fallback(handlers::not_found)
        .method_not_allowed_fallback(handlers::method_not_allowed);
    with_layers(routes.with_state(app))
}

/// Routes that are answered even when there is no place for other requests. [`middleware`] has the
/// same list.
fn health_routes() -> Router<SharedApp> {
    Router::new()
        .route("/livez", get(handlers::livez))
        .route("/readyz", get(handlers::readyz))
        .route("/metrics", get(handlers::metrics))
        .route("/v2/health/live", get(oip::live))
        .route("/v2/health/ready", get(oip::ready))
}

/// Adds the layers around every handler. Panics of handlers are caught inside, so that they are
/// logged and counted like other errors. Panics of the logging and counting are caught outside. So
/// no panic costs a client its answer.
fn with_layers(routes: Router) -> Router {
    let routes = routes.layer(CatchPanicLayer::custom(reply::panicked));
    // Around the router as a whole, because the router itself adds `allow` to an answer.
    Router::new()
        .fallback_service(routes)
        .layer(axum::middleware::from_fn(middleware::observe))
        .layer(CatchPanicLayer::custom(reply::panicked))
}
