//! Time against the length of the context, cold and again: section `contexts`.
//!
//! The second request has the same context, so that all whole pages but the last are found; it shows
//! what a visit costs that adds next to nothing.

use anyhow::Result;

use super::load::{Exchanges, closed};
use super::record::Record;
use super::server::Server;
use super::workload::{Ask, Prompt, Workload};

/// Measures contexts of `tokens` tokens.
///
/// # Errors
///
/// When requests fail.
pub(super) fn measure(
    server: &Server,
    workload: &Workload,
    prompts: &[Prompt],
    tokens: usize,
    beams: usize,
) -> Result<Vec<Record>> {
    let tenant = format!("contexts-{tokens}");
    let body = |prompt: &Prompt| {
        // The last tokens: a prompt ends with the token after which generation begins.
        let ids = &prompt.token_ids[prompt.token_ids.len() - tokens..];
        Ask { tenant: &tenant, user: &prompt.user, beams }.tokens(ids)
    };
    let bodies: Vec<Vec<u8>> = prompts.iter().map(body).collect();
    // The first of all is left out of the figures.
    let mut cold = closed(server, &bodies, 1)?;
    cold.all.remove(0);
    let again: Exchanges = closed(server, &bodies, 1)?;
    Ok(vec![
        Record::of(workload.shape.name, "contexts", "cold", beams, 1, &cold),
        Record::of(workload.shape.name, "contexts", "again", beams, 1, &again),
    ])
}
