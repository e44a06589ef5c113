//! The routes that list and change models.
//!
//! Changes wait for disks and for requests in flight, so they run on threads that may block. They
//! are carried out to their end even if the client hangs up.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::HeaderMap;

use super::{SharedApp, admin, body};
use crate::api::{ErrorBody, LabelDeleted, LoadRequest, ModelInfo, ModelList, ModelState, VersionRequest};
use crate::error::Error;
use crate::registry::Registry;
use crate::registry::root::Wanted;

/// List the models: every loaded version, its labels and the memory it takes.
#[utoipa::path(
    get, path = "/v1/models", tag = "models", operation_id = "list_models",
    responses((status = 200, description = "All of them.", body = ModelList), (status = 503, description = "Still loading.", body = ErrorBody))
)]
pub async fn list(State(app): State<SharedApp>) -> Result<Json<ModelList>, Error> {
    let state = if app.is_draining() { ModelState::Draining } else { ModelState::Ready };
    Ok(Json(app.registry()?.list(state)))
}

/// Load a checkpoint from under the model root, check it, warm it up, and only then let it serve
/// requests.
///
/// The answer comes when the version takes requests. If the checkpoint cannot be served, nothing
/// changes.
#[utoipa::path(
    post, path = "/v1/models/{name}/load", tag = "models", operation_id = "load_model", request_body = LoadRequest,
    params(("name" = String, Path, description = "The model, and its directory under the model root.")),
    security(("admin_key" = [])),
    responses(
        (status = 200, description = "The version takes requests.", body = ModelInfo),
        (status = 401, description = "No admin key, or a wrong one.", body = ErrorBody),
        (status = 403, description = "Changes are disabled, or the checkpoint leads out of the root.", body = ErrorBody),
        (status = 404, description = "No such checkpoint.", body = ErrorBody),
        (status = 409, description = "It is loaded, another is being loaded, or it does not fit the memory.", body = ErrorBody),
        (status = 422, description = "The checkpoint or its catalog cannot be served; the type and the message say why.",
         body = ErrorBody),
        (status = 503, description = "Starting or shutting down.", body = ErrorBody),
    )
)]
pub async fn load(
    State(app): State<SharedApp>,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    request: Request,
) -> Result<Json<ModelInfo>, Error> {
    admin::check(&app, &headers)?;
    let name = component(path)?;
    let LoadRequest { directory, label, catalog, convention } = body::read(&app, request).await?;
    let load = move |registry: &Registry| {
        let wanted = Wanted {
            name: &name,
            directory: directory.as_deref(),
            catalog: catalog.as_deref(),
            convention: convention.as_deref(),
        };
        registry.load(wanted, label.as_deref())
    };
    change(&app, load).await.map(Json)
}

/// Unload a version, and free its memory once the requests that began on it have ended.
#[utoipa::path(
    post, path = "/v1/models/{name}/unload", tag = "models", operation_id = "unload_model", request_body = VersionRequest,
    params(("name" = String, Path, description = "The model.")),
    security(("admin_key" = [])),
    responses(
        (status = 200, description = "Its memory is free.", body = ModelInfo),
        (status = 401, description = "No admin key, or a wrong one.", body = ErrorBody),
        (status = 403, description = "Changes are disabled.", body = ErrorBody),
        (status = 404, description = "No such model or version.", body = ErrorBody),
        (status = 409, description = "A label points at it.", body = ErrorBody),
    )
)]
pub async fn unload(
    State(app): State<SharedApp>,
    path: Result<Path<String>, PathRejection>,
    headers: HeaderMap,
    request: Request,
) -> Result<Json<ModelInfo>, Error> {
    admin::check(&app, &headers)?;
    let name = component(path)?;
    let VersionRequest { version } = body::read(&app, request).await?;
    change(&app, move |registry| registry.unload(&name, &version)).await.map(Json)
}

/// Point a label at a loaded version. This is how to switch versions and how to roll back.
#[utoipa::path(
    put, path = "/v1/models/{name}/labels/{label}", tag = "models", operation_id = "set_label", request_body = VersionRequest,
    params(
        ("name" = String, Path, description = "The model."),
        ("label" = String, Path, description = "The label; `stable` is what requests get that name none."),
    ),
    security(("admin_key" = [])),
    responses(
        (status = 200, description = "New requests get this version.", body = ModelInfo),
        (status = 401, description = "No admin key, or a wrong one.", body = ErrorBody),
        (status = 403, description = "Changes are disabled.", body = ErrorBody),
        (status = 404, description = "No such model or version.", body = ErrorBody),
        (status = 422, description = "Not a label.", body = ErrorBody),
    )
)]
pub async fn set_label(
    State(app): State<SharedApp>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
    request: Request,
) -> Result<Json<ModelInfo>, Error> {
    admin::check(&app, &headers)?;
    let (name, label) = component(path)?;
    let VersionRequest { version } = body::read(&app, request).await?;
    change(&app, move |registry| registry.set_label(&name, &label, &version)).await.map(Json)
}

/// Delete a label, so that its version can be unloaded.
#[utoipa::path(
    delete, path = "/v1/models/{name}/labels/{label}", tag = "models", operation_id = "remove_label",
    params(
        ("name" = String, Path, description = "The model."),
        ("label" = String, Path, description = "The label."),
    ),
    security(("admin_key" = [])),
    responses(
        (status = 200, description = "It is gone.", body = LabelDeleted),
        (status = 401, description = "No admin key, or a wrong one.", body = ErrorBody),
        (status = 403, description = "Changes are disabled.", body = ErrorBody),
        (status = 404, description = "No such model or label.", body = ErrorBody),
    )
)]
pub async fn remove_label(
    State(app): State<SharedApp>,
    path: Result<Path<(String, String)>, PathRejection>,
    headers: HeaderMap,
) -> Result<Json<LabelDeleted>, Error> {
    admin::check(&app, &headers)?;
    let (name, label) = component(path)?;
    let remove = move |registry: &Registry| {
        registry.remove_label(&name, &label)?;
        Ok(LabelDeleted { name, label, durable: registry.is_durable() })
    };
    change(&app, remove).await.map(Json)
}

/// Carries out a change on a thread that may block.
pub(super) async fn change<T: Send + 'static>(
    app: &SharedApp,
    work: impl FnOnce(&Registry) -> Result<T, Error> + Send + 'static,
) -> Result<T, Error> {
    if app.is_draining() {
        return Err(Error::Draining);
    }
    let registry = app.registry()?.clone();
    let span = tracing::Span::current();
    let done = tokio::task::spawn_blocking(move || span.in_scope(|| work(&registry)));
    done.await.map_err(Error::internal)?
}

/// A component of the path. A path that is not text names nothing.
pub(super) fn component<T>(path: Result<Path<T>, PathRejection>) -> Result<T, Error> {
    path.map(|Path(component)| component).map_err(|_| Error::NotFound)
}
