//! The health, metadata and repository routes of the Open Inference Protocol, version 2, over the
//! same registry as `/v1`.
//!
//! They are for tools and clients of this protocol. Inference is in [`super::infer`]. Errors have
//! the protocol's form, `{"error": "..."}`, with the statuses of `/v1`. Bodies need no content
//! type, and may be left out.
//!
//! Invariant: a change of models needs the same key as under `/v1`, and does the same checks.

use std::collections::BTreeMap;

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::{HeaderMap, StatusCode, header};
use axum::response::{IntoResponse, Response};
use beamline_wording::did_you_mean;
use serde::Deserialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::models::{change, component};
use super::reply::ErrorMessage;
use super::{SharedApp, admin, body, infer};
use crate::api::{self, ModelState};
use crate::error::Error;
use crate::registry::Registry;
use crate::registry::root::Wanted;
use crate::service::Service;

/// Whether a path belongs to the protocol.
pub(super) fn is_protocol(path: &str) -> bool {
    path == "/v2" || path.starts_with("/v2/")
}

/// Turns an error into the protocol's form. Other answers stay as they are.
pub(super) fn in_protocol(response: Response) -> Response {
    let Some(ErrorMessage(message)) = response.extensions().get() else { return response };
    let body = Json(json!({"error": message})).into_response().into_body();
    let (mut head, _) = response.into_parts();
    // The length belongs to the other form.
    head.headers.remove(header::CONTENT_LENGTH);
    Response::from_parts(head, body)
}

type Answer = Result<Json<Value>, Error>;

/// The body of a repository index request.
#[derive(Debug, Default, Deserialize)]
struct Wish {
    #[serde(default)]
    ready: bool,
}

/// The body of a load or unload request.
#[derive(Debug, Default, Deserialize)]
struct Change {
    #[serde(default)]
    parameters: Parameters,
}

/// The protocol leaves parameters free. Parameters that would have no effect are refused by name.
#[derive(Debug, Default, Deserialize)]
struct Parameters {
    directory: Option<String>,
    label: Option<String>,
    catalog: Option<String>,
    convention: Option<String>,
    version: Option<String>,
    /// Settings of the model in the form of another server; empty ones change nothing.
    #[serde(default)]
    config: Value,
    /// Ignored: no model depends on another.
    #[serde(default, rename = "unload_dependents")]
    _unload_dependents: Value,
    #[serde(flatten)]
    others: BTreeMap<String, Value>,
}

impl Parameters {
    /// Refuses parameters that would have no effect.
    fn check(&self) -> Result<(), Error> {
        const KNOWN: [&str; 5] = ["directory", "label", "catalog", "convention", "version"];
        if let Some(name) = self.others.keys().next() {
            let name: String = name.chars().take(64).collect();
            let message = format!(
                "parameter `{name}` has no meaning here{}; the parameters are {}",
                did_you_mean(&name, KNOWN),
                KNOWN.join(", ")
            );
            return Err(Error::InvalidRequest { message, param: Some(name) });
        }
        let is_empty = match &self.config {
            Value::Null => true,
            Value::Object(fields) => fields.is_empty(),
            Value::String(text) => matches!(text.trim(), "" | "{}"),
            _ => false,
        };
        if is_empty {
            return Ok(());
        }
        let message =
            "parameter `config`: a model is set up by the files of its checkpoint; leave it out".into();
        Err(Error::InvalidRequest { message, param: Some("config".into()) })
    }
}

/// Describe the server.
#[utoipa::path(
    get, path = "/v2", tag = "open inference protocol", operation_id = "protocol_server",
    responses((status = 200, description = "Name, version and extensions of the server."))
)]
pub async fn server() -> Json<Value> {
    Json(json!({
        "name": "beamline",
        "version": env!("CARGO_PKG_VERSION"),
        "extensions": ["model_repository", "binary_tensor_data"]
    }))
}

/// Whether the process is alive, like `/livez`.
#[utoipa::path(
    get, path = "/v2/health/live", tag = "open inference protocol", operation_id = "protocol_live",
    responses((status = 200, description = "Alive."), (status = 503, description = "Not alive."))
)]
pub async fn live(state: State<SharedApp>) -> Response {
    health("live", super::handlers::livez(state).await.is_ok())
}

/// Whether requests are taken, like `/readyz`.
#[utoipa::path(
    get, path = "/v2/health/ready", tag = "open inference protocol", operation_id = "protocol_ready",
    responses((status = 200, description = "Ready."), (status = 503, description = "Not ready."))
)]
pub async fn ready(state: State<SharedApp>) -> Response {
    health("ready", super::handlers::readyz(state).await.is_ok())
}

fn health(what: &str, good: bool) -> Response {
    let status = if good { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(json!({what: good}))).into_response()
}

/// Describe a model: the version to which its label `stable` points.
#[utoipa::path(
    get, path = "/v2/models/{name}", tag = "open inference protocol", operation_id = "protocol_model",
    params(("name" = String, Path, description = "The model.")),
    responses((status = 200, description = "Its versions and platform."), (status = 404, description = "Not loaded."))
)]
pub async fn model(State(app): State<SharedApp>, path: Result<Path<String>, PathRejection>) -> Answer {
    describe(&app, &component(path)?)
}

/// Describe a version of a model.
#[utoipa::path(
    get, path = "/v2/models/{name}/versions/{version}", tag = "open inference protocol", operation_id = "protocol_version",
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
    get, path = "/v2/models/{name}/ready", tag = "open inference protocol", operation_id = "protocol_model_ready",
    params(("name" = String, Path, description = "The model.")),
    responses((status = 200, description = "It does."), (status = 404, description = "Not loaded."))
)]
pub async fn model_ready(State(app): State<SharedApp>, path: Result<Path<String>, PathRejection>) -> Answer {
    is_ready(&app, &component(path)?)
}

/// Whether a version takes requests.
#[utoipa::path(
    get, path = "/v2/models/{name}/versions/{version}/ready", tag = "open inference protocol", operation_id = "protocol_version_ready",
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

/// List all loaded versions and the one being loaded; with `{"ready": true}`, only those that take
/// requests.
#[utoipa::path(
    post, path = "/v2/repository/index", tag = "open inference protocol", operation_id = "protocol_index",
    responses((status = 200, description = "Name, version and state of each."))
)]
pub async fn index(State(app): State<SharedApp>, request: Request) -> Answer {
    let Wish { ready } = read(&app, request).await?;
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

/// Like `/v1/models/{name}/load`, with its fields as parameters. A checkpoint that is already
/// loaded stays as it is.
#[utoipa::path(
    post, path = "/v2/repository/models/{name}/load", tag = "open inference protocol", operation_id = "protocol_load",
    params(("name" = String, Path, description = "The model, and its directory under the model root.")),
    security(("admin_key" = [])),
    responses(
        (status = 200, description = "It takes requests. `durable` says whether it will after a restart."),
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
    let Parameters { directory, label, catalog, convention, version, .. } = parameters(&app, request).await?;
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
    changed(&app, load).await
}

/// Unload a model. Without the parameter `version`, unloads all versions and their labels. With it,
/// unloads that version; no label may point at it.
#[utoipa::path(
    post, path = "/v2/repository/models/{name}/unload", tag = "open inference protocol", operation_id = "protocol_unload",
    params(("name" = String, Path, description = "The model.")),
    security(("admin_key" = [])),
    responses(
        (status = 200, description = "Its memory is free. `durable` says whether that will be so after a restart."),
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
    let Parameters { directory, label, catalog, convention, version, .. } = parameters(&app, request).await?;
    if directory.or(label).or(catalog).or(convention).is_some() {
        return Err(unexpected("parameters"));
    }
    let unload = move |registry: &Registry| match version {
        Some(version) => registry.unload(&name, &version).map(drop),
        None => registry.unload_all(&name),
    };
    changed(&app, unload).await
}

/// Carries out a change, and answers, as `/v1` does, whether it survives a restart. The protocol
/// requires no fields and allows any.
async fn changed(
    app: &SharedApp,
    work: impl FnOnce(&Registry) -> Result<(), Error> + Send + 'static,
) -> Answer {
    let durable = move |registry: &Registry| work(registry).map(|()| registry.is_durable());
    Ok(Json(json!({"durable": change(app, durable).await?})))
}

/// Reads a body. The protocol lets clients leave it out, and needs no content type.
async fn read<T: DeserializeOwned + Default>(app: &SharedApp, request: Request) -> Result<T, Error> {
    let body = body::read_any(app, request).await?.bytes;
    if body.trim_ascii().is_empty() { Ok(T::default()) } else { api::parse(&body) }
}

async fn parameters(app: &SharedApp, request: Request) -> Result<Parameters, Error> {
    let Change { parameters } = read(app, request).await?;
    parameters.check()?;
    Ok(parameters)
}

fn unexpected(param: &'static str) -> Error {
    Error::InvalidValue { param, message: "has no meaning here".into() }
}

fn find(app: &SharedApp, reference: &str) -> Result<Service, Error> {
    app.registry()?.resolve(Some(reference))
}

fn is_ready(app: &SharedApp, reference: &str) -> Answer {
    let service = find(app, reference)?;
    if app.is_draining() {
        return Err(Error::Draining);
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
        "inputs": [{"name": infer::INPUT, "datatype": "BYTES", "shape": [1]}],
        "outputs": [{"name": infer::OUTPUT, "datatype": "BYTES", "shape": [1]}]
    })))
}
