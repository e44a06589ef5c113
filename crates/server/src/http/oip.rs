//! The health, metadata and repository routes of the Open Inference Protocol, version 2, over the same registry as `/v1`.
//!
//! For tools that know how to look after servers of this protocol. Inference is not among them: a request for items has no
//! tensors, see `/v1/recommend`. Errors have the protocol's form, `{"error": "..."}`, with the statuses of `/v1`.
//!
//! Invariant: what changes models needs the same key as under `/v1`, and does the same checks.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use serde::Deserialize;
use serde_json::{Value, json};

use super::models::{change, component};
use super::reply::ErrorKind;
use super::{SharedApp, admin, body};
use crate::api::ModelState;
use crate::error::Error;
use crate::registry::Registry;
use crate::registry::root::Wanted;
use crate::service::Service;

/// An error in the protocol's form.
pub struct Failed(Error);

impl From<Error> for Failed {
    fn from(error: Error) -> Self {
        Self(error)
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> Response {
        let class = self.0.class();
        let status = StatusCode::from_u16(class.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let mut response = (status, Json(json!({"error": self.0.to_string()}))).into_response();
        response.extensions_mut().insert(ErrorKind(class.kind));
        response
    }
}

type Answer = Result<Json<Value>, Failed>;

/// What a repository index may ask.
#[derive(Debug, Default, Deserialize)]
struct Wish {
    #[serde(default)]
    ready: bool,
}

/// What a load or unload may say.
#[derive(Debug, Default, Deserialize)]
struct Change {
    #[serde(default)]
    parameters: Parameters,
}

/// Parameters of the protocol are free; others than these are an error here.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Parameters {
    directory: Option<String>,
    label: Option<String>,
    catalog: Option<String>,
    convention: Option<String>,
    version: Option<String>,
}

/// The server.
#[utoipa::path(
    get, path = "/v2", tag = "open inference protocol",
    responses((status = 200, description = "Name, version and extensions of the server."))
)]
pub async fn server() -> Json<Value> {
    Json(json!({
        "name": "beamline",
        "version": env!("CARGO_PKG_VERSION"),
        "extensions": ["model_repository"]
    }))
}

/// As `/livez`.
#[utoipa::path(
    get, path = "/v2/health/live", tag = "open inference protocol",
    responses((status = 200, description = "Alive."), (status = 503, description = "Not alive."))
)]
pub async fn live(state: State<SharedApp>) -> Response {
    health("live", super::handlers::livez(state).await.is_ok())
}

/// As `/readyz`.
#[utoipa::path(
    get, path = "/v2/health/ready", tag = "open inference protocol",
    responses((status = 200, description = "Ready."), (status = 503, description = "Not ready."))
)]
pub async fn ready(state: State<SharedApp>) -> Response {
    health("ready", super::handlers::readyz(state).await.is_ok())
}

fn health(what: &str, good: bool) -> Response {
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({what: good}))).into_response()
}

/// A model, by the version that its label `stable` points at.
#[utoipa::path(
    get, path = "/v2/models/{name}", tag = "open inference protocol",
    params(("name" = String, Path, description = "The model.")),
    responses((status = 200, description = "Its versions and platform."), (status = 404, description = "Not loaded."))
)]
pub async fn model(State(app): State<SharedApp>, path: Result<Path<String>, PathRejection>) -> Answer {
    describe(&app, &component(path)?)
}

/// A version of a model.
#[utoipa::path(
    get, path = "/v2/models/{name}/versions/{version}", tag = "open inference protocol",
    params(
        ("name" = String, Path, description = "The model."),
        ("version" = String, Path, description = "The version, or a label."),
    ),
    responses((status = 200, description = "Its platform."), (status = 404, description = "Not loaded."))
)]
pub async fn version(
    State(app): State<SharedApp>,
    path: Result<Path<(String, String)>, PathRejection>,
) -> Answer {
    let (name, version) = component(path)?;
    describe(&app, &format!("{name}@{version}"))
}

/// Whether a model takes requests.
#[utoipa::path(
    get, path = "/v2/models/{name}/ready", tag = "open inference protocol",
    params(("name" = String, Path, description = "The model.")),
    responses((status = 200, description = "It does."), (status = 404, description = "Not loaded."))
)]
pub async fn model_ready(State(app): State<SharedApp>, path: Result<Path<String>, PathRejection>) -> Answer {
    is_ready(&app, &component(path)?)
}

/// Whether a version takes requests.
#[utoipa::path(
    get, path = "/v2/models/{name}/versions/{version}/ready", tag = "open inference protocol",
    params(
        ("name" = String, Path, description = "The model."),
        ("version" = String, Path, description = "The version, or a label."),
    ),
    responses((status = 200, description = "It does."), (status = 404, description = "Not loaded."))
)]
pub async fn version_ready(
    State(app): State<SharedApp>,
    path: Result<Path<(String, String)>, PathRejection>,
) -> Answer {
    let (name, version) = component(path)?;
    is_ready(&app, &format!("{name}@{version}"))
}

/// All loaded versions, and what is being loaded; with `{"ready": true}` only what takes requests.
#[utoipa::path(
    post, path = "/v2/repository/index", tag = "open inference protocol",
    responses((status = 200, description = "Name, version and state of each."))
)]
pub async fn index(State(app): State<SharedApp>, request: Request) -> Answer {
    let Wish { ready } = body::read_if_any(&app, request).await?;
    let list = app.registry()?.list(ModelState::Ready);
    if ready && app.is_draining() {
        return Ok(Json(json!([])));
    }
    let loading = list.loading.into_iter().filter(|_| !ready);
    let loading = loading.map(|name| json!({"name": name, "version": "", "state": "LOADING", "reason": ""}));
    let (state, reason) = if app.is_draining() { ("UNAVAILABLE", "shutting down") } else { ("READY", "") };
    let models = list
        .models
        .into_iter()
        .map(|model| json!({"name": model.name, "version": model.version, "state": state, "reason": reason}));
    Ok(Json(models.chain(loading).collect()))
}

/// As `/v1/models/{name}/load`, whose fields are parameters here. A checkpoint that is loaded is left as it is.
#[utoipa::path(
    post, path = "/v2/repository/models/{name}/load", tag = "open inference protocol",
    params(("name" = String, Path, description = "The model, and its directory under the model root.")),
    security(("admin_key" = [])),
    responses(
        (status = 200, description = "It takes requests."),
        (status = 401, description = "No admin key, or a wrong one."),
        (status = 403, description = "Changes are disabled."),
        (status = 404, description = "No such checkpoint."),
        (status = 409, description = "Another is being loaded, or it does not fit the memory."),
        (status = 422, description = "The checkpoint cannot be served."),
    )
)]
pub async fn load(
    State(app): State<SharedApp>,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    request: Request,
) -> Answer {
    admin::check(&app, &headers)?;
    let name = component(path)?;
    let Parameters { directory, label, catalog, convention, version } = parameters(&app, request).await?;
    if version.is_some() {
        return Err(unexpected("version"));
    }
    let load = move |registry: &Registry| {
        let wanted = Wanted {
            name: &name,
            directory: directory.as_deref(),
            catalog: catalog.as_deref(),
            convention: convention.as_deref(),
        };
        match registry.load(wanted, label.as_deref()) {
            Err(Error::AlreadyLoaded(version)) => match &label {
                Some(label) => registry.set_label(&name, label, &version).map(drop),
                None => Ok(()),
            },
            loaded => loaded.map(drop),
        }
    };
    change(&app, load).await?;
    Ok(Json(json!({})))
}

/// Take a model out of service: all its versions, labels or not; or with the parameter `version` that one, which no label may
/// point at.
#[utoipa::path(
    post, path = "/v2/repository/models/{name}/unload", tag = "open inference protocol",
    params(("name" = String, Path, description = "The model.")),
    security(("admin_key" = [])),
    responses(
        (status = 200, description = "Its memory is free."),
        (status = 401, description = "No admin key, or a wrong one."),
        (status = 403, description = "Changes are disabled."),
        (status = 404, description = "Not loaded."),
        (status = 409, description = "A label points at the version."),
    )
)]
pub async fn unload(
    State(app): State<SharedApp>,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    request: Request,
) -> Answer {
    admin::check(&app, &headers)?;
    let name = component(path)?;
    let Parameters { directory, label, catalog, convention, version } = parameters(&app, request).await?;
    if directory.or(label).or(catalog).or(convention).is_some() {
        return Err(unexpected("parameters"));
    }
    let unload = move |registry: &Registry| match version {
        Some(version) => registry.unload(&name, &version).map(drop),
        None => registry.unload_all(&name),
    };
    change(&app, unload).await?;
    Ok(Json(json!({})))
}

/// The protocol lets the body be left out.
async fn parameters(app: &SharedApp, request: Request) -> Result<Parameters, Failed> {
    let Change { parameters } = body::read_if_any(app, request).await?;
    Ok(parameters)
}

fn unexpected(param: &'static str) -> Failed {
    Failed(Error::InvalidValue { param, message: "has no meaning here".into() })
}

fn find(app: &SharedApp, reference: &str) -> Result<Service, Failed> {
    Ok(app.registry()?.resolve(Some(reference))?)
}

fn is_ready(app: &SharedApp, reference: &str) -> Answer {
    let service = find(app, reference)?;
    if app.is_draining() {
        return Err(Error::Draining.into());
    }
    Ok(Json(json!({"name": service.served().name, "ready": true})))
}

fn describe(app: &SharedApp, reference: &str) -> Answer {
    let service = find(app, reference)?;
    let served = service.served();
    let models = app.registry()?.list(ModelState::Ready).models;
    let versions: Vec<String> =
        models.into_iter().filter(|model| model.name == served.name).map(|model| model.version).collect();
    Ok(Json(json!({
        "name": served.name,
        "versions": versions,
        "platform": format!("beamline_{}", served.family.architecture()),
        "inputs": [],
        "outputs": []
    })))
}
