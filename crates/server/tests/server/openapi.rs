//! The committed description of the API is the one that the server gives.

use std::path::Path;

#[test]
fn the_committed_description_is_up_to_date() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("openapi.json");
    let made = beamline::openapi::json().unwrap();
    if std::env::var_os("UPDATE_OPENAPI").is_some() {
        std::fs::write(&path, &made).unwrap();
    }
    let committed = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        made == committed,
        "openapi.json is out of date: run this test with UPDATE_OPENAPI=1 and commit it"
    );
}
