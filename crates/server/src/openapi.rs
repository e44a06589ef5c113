//! The description of the API that clients generate code from, made from the types and handlers themselves.
//!
//! A copy is committed as `openapi.json` beside the manifest; a test keeps it up to date.

use utoipa::openapi::security::{Http, HttpAuthScheme, SecurityScheme};
use utoipa::{Modify, OpenApi};

use crate::http::{catalogs, handlers, models, oip};

#[derive(OpenApi)]
#[openapi(
    info(
        title = "beamline",
        description = "Serving engine for generative recommenders: send a user's history, get items, ranked."
    ),
    paths(
        handlers::recommend,
        handlers::rank,
        handlers::warm,
        models::list,
        models::load,
        models::unload,
        models::set_label,
        models::remove_label,
        catalogs::list,
        catalogs::replace,
        catalogs::patch,
        catalogs::roll_back,
        oip::server,
        oip::live,
        oip::ready,
        oip::model,
        oip::model_ready,
        oip::version,
        oip::version_ready,
        oip::index,
        oip::load,
        oip::unload,
        handlers::livez,
        handlers::readyz,
        handlers::metrics,
        handlers::openapi
    ),
    modifiers(&AdminScheme)
)]
struct Api;

/// Says how the admin key is sent.
struct AdminScheme;

impl Modify for AdminScheme {
    fn modify(&self, openapi: &mut utoipa::openapi::OpenApi) {
        let mut http = Http::new(HttpAuthScheme::Bearer);
        http.description = Some(
            "The admin key. A server without one takes changes only while it listens on a loopback address."
                .into(),
        );
        let components = openapi.components.get_or_insert_default();
        components.add_security_scheme("admin_key", SecurityScheme::Http(http));
    }
}

/// The description as JSON, pretty-printed, with a line end.
///
/// # Errors
///
/// When it cannot be written as JSON, which a test rules out.
pub fn json() -> Result<String, serde_json::Error> {
    Ok(Api::openapi().to_pretty_json()? + "\n")
}
