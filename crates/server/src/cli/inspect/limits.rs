//! `beamline inspect --limits`: the server's limits, and the flags that change them.

use beamline_catalog::CatalogLimits;
use beamline_model::loaded::PAGE_SIZE;

use crate::cli::output;
use crate::service::{MAX_CANDIDATES, MICRO_BATCH};
use crate::settings::{ByteSize, Settings};

/// All limits as a table.
pub(super) fn table(settings: &Settings) -> String {
    let mut rows = requests(settings);
    rows.extend(server(settings));
    rows.extend(fixed());
    output::table(&["limit", "value", "changed by"], &[false, true, false], &rows)
}

fn row(what: &str, value: impl ToString, flag: &str) -> Vec<String> {
    vec![what.to_owned(), value.to_string(), flag.to_owned()]
}

fn requests(settings: &Settings) -> Vec<Vec<String>> {
    let (limits, engine) = (&settings.limits, &settings.engine);
    let milliseconds = |time: std::time::Duration| format!("{} ms", time.as_millis());
    vec![
        row("items of an answer", limits.max_num_items, "--max-num-items"),
        row("beams", limits.max_beam_width, "--max-beam-width"),
        row("items of a history", limits.max_history_items, "--max-history-items"),
        row("tokens of a context, or fewer by the model", engine.max_context, "--max-context"),
        row("entries of a filter's list", limits.max_list_items, "--max-list-items"),
        row("bytes of an id, tag or name", limits.max_string_bytes, "--max-string-bytes"),
        row("size of a prompt", ByteSize(limits.max_prompt_bytes), "--max-prompt-bytes"),
        row("time of a request", milliseconds(limits.max_timeout), "--max-timeout-ms"),
    ]
}

fn server(settings: &Settings) -> Vec<Vec<String>> {
    let (http, engine, admin) = (&settings.http, &settings.engine, &settings.admin);
    vec![
        row("size of a body", ByteSize(http.max_body_bytes), "--max-body-bytes"),
        row("connections", http.max_connections, "--max-connections"),
        row("requests computed at a time", engine.max_running, "--max-running"),
        row("requests that wait", engine.max_queued, "--max-queued"),
        row("context tokens of a step", engine.max_step_tokens, "--max-step-tokens"),
        row("size of a catalog over HTTP", ByteSize(admin.max_catalog_bytes), "--max-catalog-bytes"),
        row("earlier catalogs that are kept", admin.keep_catalogs, "--keep-catalogs"),
    ]
}

fn fixed() -> Vec<Vec<String>> {
    let catalog = CatalogLimits::default();
    vec![
        row("candidates of a ranking", MAX_CANDIDATES, ""),
        row("candidates computed at a time", MICRO_BATCH, ""),
        row("context tokens of a page", PAGE_SIZE, ""),
        row("items of a catalog", catalog.max_items, ""),
        row("levels of a semantic ID", catalog.max_depth, ""),
        row("bytes of an item id in a catalog", catalog.max_item_id_bytes, ""),
        row("tags of an item", catalog.max_tags_per_item, ""),
        row("bytes of a tag", catalog.max_tag_bytes, ""),
        row("size of a title", ByteSize(catalog.max_title_bytes), ""),
        row("size of a line of a catalog", ByteSize(catalog.max_line_bytes), ""),
    ]
}
