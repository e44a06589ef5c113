//! First and later visits of the same users, on the prompts that every engine gets: sections `visits`
//! and `beams`.
//!
//! Cold means that no page of the context is cached: every pass has a tenant of its own, and contexts
//! are never shared between tenants. Warm means that the same user's first visit was the last thing
//! computed for that user. Both are checked against the cached tokens that the answers report.

use anyhow::{Result, ensure};

use super::load::{Exchanges, closed};
use super::record::Record;
use super::server::Server;
use super::workload::{Ask, Workload};

/// Measures cold and warm visits at one beam width, `passes` times all prompts.
///
/// # Errors
///
/// When requests fail, or a visit was not as cold or as warm as it should be.
pub(super) fn measure(
    server: &Server,
    workload: &Workload,
    section: &str,
    beams: usize,
    passes: usize,
    run: &str,
) -> Result<Vec<Record>> {
    let bodies = |pass: &str, visit: usize| -> Vec<Vec<u8>> {
        let tenant = format!("{section}-{run}-{beams}-{pass}");
        let prompts = workload.prompts.iter().filter(|prompt| prompt.visit == visit);
        let body = |user: &str, history: &[String]| Ask { tenant: &tenant, user, beams }.history(history);
        prompts.map(|prompt| body(&prompt.user, &prompt.history)).collect()
    };
    // Buffers grow to their size at the first request of a width.
    closed(server, &bodies("first", 0)[..1], 1)?;
    let mut exchanges = [Vec::new(), Vec::new()];
    let mut seconds = [0.0; 2];
    for pass in 0..passes {
        for visit in 0..2 {
            let done = closed(server, &bodies(&pass.to_string(), visit), 1)?;
            exchanges[visit].extend(done.all);
            seconds[visit] += done.seconds;
        }
    }
    let mut records = Vec::new();
    for ((visit, all), seconds) in ["cold", "warm"].into_iter().zip(exchanges).zip(seconds) {
        let exchanges = Exchanges { all, seconds };
        let record = Record::of(workload.shape.name, section, visit, beams, 1, &exchanges);
        ensure!(record.refused == 0, "{} requests were refused", record.refused);
        check(visit, &exchanges)?;
        records.push(record);
    }
    Ok(records)
}

/// Whether visits were as cold or as warm as they are called.
fn check(visit: &str, exchanges: &Exchanges) -> Result<()> {
    for slate in exchanges.slates() {
        let usage = slate.usage;
        match visit {
            "cold" => ensure!(usage.cached_tokens == 0, "a cold visit found {} tokens", usage.cached_tokens),
            // A first visit of n items leaves 5 n + 1 tokens; whole pages of 32 are found again.
            _ => ensure!(
                2 * usage.cached_tokens > usage.context_tokens,
                "a warm visit found {} of {} tokens",
                usage.cached_tokens,
                usage.context_tokens
            ),
        }
    }
    Ok(())
}

/// Whether a history and its token ids are the same request to the server.
///
/// # Errors
///
/// When they are not.
pub(super) fn check_spelling(server: &Server, workload: &Workload) -> Result<()> {
    let prompt = &workload.prompts[0];
    let ask = |tenant| Ask { tenant, user: &prompt.user, beams: 8 };
    let bodies = [ask("spelling-a").history(&prompt.history), ask("spelling-b").tokens(&prompt.token_ids)];
    let answers = closed(server, &bodies, 1)?;
    let slates: Vec<_> = answers.slates().collect();
    ensure!(slates.len() == 2, "a history or its tokens were refused");
    ensure!(
        slates[0].items == slates[1].items
            && slates[0].usage.context_tokens == slates[1].usage.context_tokens
            && slates[0].usage.context_tokens as usize == prompt.token_ids.len(),
        "a history and its tokens give different slates: convention.json does not fit the prompts"
    );
    Ok(())
}
