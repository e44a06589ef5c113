//! The description of the API that clients generate code from, made from the types and handlers themselves.
//!
//! A copy is committed as `openapi.json` beside the manifest; a test keeps it up to date.

use utoipa::OpenApi;

use crate::http::handlers;

#[derive(OpenApi)]
#[openapi(
    info(
        title = "beamline",
        description = "Serving engine for generative recommenders: send a user's history, get items, ranked."
    ),
    paths(
        handlers::recommend,
        handlers::warm,
        handlers::models,
        handlers::livez,
        handlers::readyz,
        handlers::metrics,
        handlers::openapi
    )
)]
struct Api;

/// The description as JSON, pretty-printed, with a line end.
///
/// # Errors
///
/// When it cannot be written as JSON, which a test rules out.
pub fn json() -> Result<String, serde_json::Error> {
    Ok(Api::openapi().to_pretty_json()? + "\n")
}
