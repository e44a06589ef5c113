//! The routes that show and change catalogs.
//!
//! The model in the path is written as in a request: `name`, `name@label` or `name@version`. The
//! change applies to the version to which it points when the change begins.

use axum::Json;
use axum::extract::rejection::PathRejection;
use axum::extract::{Path, Request, State};
use axum::http::HeaderMap;

use super::body::{self, Received};
use super::models::{change, component};
use super::{SharedApp, admin};
use crate::api::{self, CatalogList, CatalogPatch, CatalogVersionRequest, ErrorBody};
use crate::error::Error;
use crate::registry::Registry;

type Name = Result<Path<String>, PathRejection>;

/// List the catalogs of a version: the one that serves, and earlier ones that are kept for a
/// rollback.
#[utoipa::path(
    get, path = "/v1/models/{name}/catalog", tag = "catalogs", operation_id = "list_catalogs",
    params(("name" = String, Path, description = "The model, `name@label` or `name@version`.")),
    responses(
        (status = 200, description = "All that are kept.", body = CatalogList),
        (status = 404, description = "No such model.", body = ErrorBody),
    )
)]
pub async fn list(State(app): State<SharedApp>, path: Name) -> Result<Json<CatalogList>, Error> {
    app.registry()?.catalogs(&component(path)?).map(Json)
}

/// Replace the catalog of a version.
///
/// The body is JSON lines, one item per line as in catalog.jsonl, sent as `application/x-ndjson`.
/// The new catalog is checked and probed beside the old one; requests in flight keep the old one.
#[utoipa::path(
    put, path = "/v1/models/{name}/catalog", tag = "catalogs", operation_id = "replace_catalog",
    request_body(content = String, content_type = "application/x-ndjson"),
    params(("name" = String, Path, description = "The model, `name@label` or `name@version`.")),
    security(("admin_key" = [])),
    responses(
        (status = 200, description = "New requests get this catalog.", body = CatalogList),
        (status = 401, description = "No admin key, or a wrong one.", body = ErrorBody),
        (status = 403, description = "Changes are disabled.", body = ErrorBody),
        (status = 404, description = "No such model.", body = ErrorBody),
        (status = 413, description = "Larger than --max-catalog-bytes.", body = ErrorBody),
        (status = 415, description = "The body is declared to be something else, or is compressed.", body = ErrorBody),
        (status = 422, description = "Not a catalog of this model; the message names the lines.", body = ErrorBody),
        (status = 429, description = "Other catalogs are arriving; `retry-after` says when to try again.", body = ErrorBody),
    )
)]
pub async fn replace(
    State(app): State<SharedApp>,
    path: Name,
    headers: HeaderMap,
    request: Request,
) -> Result<Json<CatalogList>, Error> {
    admin::check(&app, &headers)?;
    let name = component(path)?;
    app.registry()?.resolve(Some(&name))?;
    let Received { bytes, held } = body::read_lines(&app, request).await?;
    let replace = move |registry: &Registry| {
        let _held = held;
        registry.replace_catalog(&name, &bytes)
    };
    change(&app, replace).await.map(Json)
}

/// Add, remove and retag items of a version's catalog.
#[utoipa::path(
    patch, path = "/v1/models/{name}/catalog", tag = "catalogs", operation_id = "patch_catalog", request_body = CatalogPatch,
    params(("name" = String, Path, description = "The model, `name@label` or `name@version`.")),
    security(("admin_key" = [])),
    responses(
        (status = 200, description = "New requests get this catalog.", body = CatalogList),
        (status = 401, description = "No admin key, or a wrong one.", body = ErrorBody),
        (status = 403, description = "Changes are disabled.", body = ErrorBody),
        (status = 404, description = "No such model.", body = ErrorBody),
        (status = 413, description = "Larger than --max-catalog-bytes.", body = ErrorBody),
        (status = 415, description = "The body is declared to be something else, or is compressed.", body = ErrorBody),
        (status = 422, description = "An item is not there, or is none of this model.", body = ErrorBody),
        (status = 429, description = "Other catalogs are arriving; `retry-after` says when to try again.", body = ErrorBody),
    )
)]
pub async fn patch(
    State(app): State<SharedApp>,
    path: Name,
    headers: HeaderMap,
    request: Request,
) -> Result<Json<CatalogList>, Error> {
    admin::check(&app, &headers)?;
    let name = component(path)?;
    let Received { bytes, held } = body::read_catalog_change(&app, request).await?;
    let patch = move |registry: &Registry| {
        let _held = held;
        let patch: CatalogPatch = api::parse(&bytes)?;
        drop(bytes);
        registry.patch_catalog(&name, &patch)
    };
    change(&app, patch).await.map(Json)
}

/// Go back to an earlier catalog that is kept.
#[utoipa::path(
    post, path = "/v1/models/{name}/catalog/rollback", tag = "catalogs", operation_id = "roll_back_catalog", request_body = CatalogVersionRequest,
    params(("name" = String, Path, description = "The model, `name@label` or `name@version`.")),
    security(("admin_key" = [])),
    responses(
        (status = 200, description = "New requests get this catalog.", body = CatalogList),
        (status = 401, description = "No admin key, or a wrong one.", body = ErrorBody),
        (status = 403, description = "Changes are disabled.", body = ErrorBody),
        (status = 404, description = "No such model, or no such catalog is kept.", body = ErrorBody),
    )
)]
pub async fn roll_back(
    State(app): State<SharedApp>,
    path: Name,
    headers: HeaderMap,
    request: Request,
) -> Result<Json<CatalogList>, Error> {
    admin::check(&app, &headers)?;
    let name = component(path)?;
    let CatalogVersionRequest { version } = body::read(&app, request).await?;
    change(&app, move |registry| registry.roll_back_catalog(&name, &version)).await.map(Json)
}
