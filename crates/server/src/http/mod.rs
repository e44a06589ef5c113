//! HTTP: routes, bodies, request ids, connections, draining.
//!
//! | module | one idea |
//! | --- | --- |
//! | [`handlers`] | one function per route: read, ask the service, write |
//! | [`models`] | the routes that list and change models |
//! | [`catalogs`] | the routes that show and change catalogs |
//! | [`oip`] | the Open Inference Protocol over the same registry |
//! | [`infer`] | its inference: a request for items in a tensor |
//! | [`admin`] | who may change them |
//! | [`body`] | bodies are read with limits and in time, and errors say what is wrong |
//! | [`body_budget`] | how many bytes of them are in memory |
//! | [`pace`] | the least pace of a transfer |
//! | [`head`] | what the head of a request must say one way only |
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

/// Requests that may be on their way to the engine or from it, beyond those that it holds.
const SPARE_REQUESTS: usize = 64;

/// What handlers share.
#[derive(Debug)]
pub struct App {
    /// Limits and times.
    pub settings: HttpSettings,
    /// Renders the metrics.
    pub metrics: PrometheusHandle,
    /// Where answers are logged, if they are.
    pub request_log: OnceLock<RequestLog>,
    /// What changes need.
    pub admin_key: Option<AdminKey>,
    /// Largest catalog that is read.
    pub max_catalog_bytes: usize,
    registry: OnceLock<Arc<Registry>>,
    draining: AtomicBool,
    /// Bytes of requests in memory.
    pub(super) bodies: BodyBudget,
    /// Bytes of catalogs that arrive or are being built.
    pub(super) uploads: BodyBudget,
    /// Requests that were read and are not answered. Beyond that, new ones are refused.
    requests: Semaphore,
}

/// Shared by all handlers.
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

    /// What was to be loaded at the start is loaded and has answered a probe.
    pub fn set_ready(&self, registry: Arc<Registry>) {
        // It is called once; a second registry would not be used.
        let _ = self.registry.set(registry);
    }

    /// From now on /readyz says no.
    pub fn set_draining(&self) {
        self.draining.store(true, Ordering::Relaxed);
    }

    /// Whether the server is going down.
    pub fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Relaxed)
    }

    /// The models, once there are any.
    ///
    /// # Errors
    ///
    /// [`Error::Loading`] before.
    pub fn registry(&self) -> Result<&Arc<Registry>, Error> {
        self.registry.get().ok_or(Error::Loading)
    }

    /// A place for one request.
    ///
    /// # Errors
    ///
    /// [`Error::Overloaded`] when there is none.
    pub fn take_place(&self) -> Result<tokio::sync::SemaphorePermit<'_>, Error> {
        self.requests.try_acquire().map_err(|_| Error::Overloaded)
    }
}

/// All routes.
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

/// The routes of a listener for health checks and metrics alone.
pub fn health_router(app: SharedApp) -> Router {
    let routes = health_routes()
        .fallback(handlers::not_found)
        .method_not_allowed_fallback(handlers::method_not_allowed);
    with_layers(routes.with_state(app))
}

/// What is answered even where there is no place for anything else: [`middleware`] has the same list.
fn health_routes() -> Router<SharedApp> {
    Router::new()
        .route("/livez", get(handlers::livez))
        .route("/readyz", get(handlers::readyz))
        .route("/metrics", get(handlers::metrics))
        .route("/v2/health/live", get(oip::live))
        .route("/v2/health/ready", get(oip::ready))
}

/// What happens around every handler. Panics of handlers are caught inside, so that they are logged and counted like
/// other errors, and those of what logs and counts are caught outside: no panic costs a client its answer.
fn with_layers(routes: Router) -> Router {
    let routes = routes.layer(CatchPanicLayer::custom(reply::panicked));
    // Around the router as a whole, because it is the router that adds `allow` to an answer.
    Router::new()
        .fallback_service(routes)
        .layer(axum::middleware::from_fn(middleware::observe))
        .layer(CatchPanicLayer::custom(reply::panicked))
}
