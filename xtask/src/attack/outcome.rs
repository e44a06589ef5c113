//! What was tried, what happened, and what is wrong with that.

use std::time::Duration;

use anyhow::Result;

use super::bystanders::{Seen, Witness};
use super::list::Attack;

/// What an attack found.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// What happened, in a few words.
    pub(super) happened: String,
    /// What others saw meanwhile, if the server was up all the time.
    pub(super) witness: Option<Witness>,
    /// What is wrong.
    pub(super) faults: Vec<String>,
}

/// What others may lose by an attack.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Loss {
    /// Nothing: every polite request is answered with 200.
    Nothing,
    /// Polite requests may be refused with an answer, as under overload, but never left without one.
    Refusals,
}

impl Outcome {
    /// Notes a fault unless `good`.
    pub(super) fn expect(&mut self, good: bool, fault: impl Into<String>) {
        if !good {
            self.faults.push(fault.into());
        }
    }
}

/// The result of one attack.
pub(super) struct Report {
    name: &'static str,
    outcome: Outcome,
    took: Duration,
}

impl Report {
    /// Judges an outcome by what the attack allows and how slow health checks may be.
    pub(super) fn new(attack: &Attack, outcome: Result<Outcome>, health: Duration, took: Duration) -> Self {
        let mut outcome = outcome.unwrap_or_else(|error| Outcome {
            happened: "could not be carried out".into(),
            faults: vec![format!("{error:#}")],
            witness: None,
        });
        if let Some(Witness { health: checks, polite }) = outcome.witness.clone() {
            let worst = checks.worst();
            outcome.expect(
                checks.failed + checks.refused == 0,
                format!(
                    "{} of {} health checks failed{}",
                    checks.failed + checks.refused,
                    checks.asked(),
                    loss(&checks)
                ),
            );
            outcome.expect(
                worst <= health,
                format!("a health check took {} ms, the bound is {}", worst.as_millis(), health.as_millis()),
            );
            outcome.expect(
                polite.failed == 0,
                format!("{} polite requests had no answer{}", polite.failed, loss(&polite)),
            );
            outcome.expect(
                attack.loss != Loss::Nothing || polite.refused == 0,
                format!(
                    "{} of {} polite requests were refused{}",
                    polite.refused,
                    polite.asked(),
                    loss(&polite)
                ),
            );
        }
        Self { name: attack.name, outcome, took }
    }

    pub(super) fn passed(&self) -> bool {
        self.outcome.faults.is_empty()
    }

    /// The result in a line.
    pub(super) fn line(&self) -> String {
        let verdict = if self.passed() { "passed" } else { "FAILED" };
        let faults = self.outcome.faults.join("; ");
        let colon = if faults.is_empty() { "" } else { ": " };
        format!("{verdict} in {:.1} s{colon}{faults}", self.took.as_secs_f64())
    }
}

/// What the first of the losses was.
fn loss(seen: &Seen) -> String {
    seen.first_loss.as_ref().map_or_else(String::new, |loss| format!(" (first: {loss})"))
}

/// All results as a table.
pub(super) fn table(reports: &[Report]) -> String {
    let mut text = String::from(
        "| attack | what happened | health: asked, worst ms | polite: ok, refused, failed, P50 and P99 ms | verdict |\n\
         | --- | --- | --- | --- | --- |\n",
    );
    for report in reports {
        let (health, polite) = match &report.outcome.witness {
            Some(Witness { health, polite }) => (health_cell(health), polite_cell(polite)),
            None => ("-".into(), "-".into()),
        };
        let verdict = if report.passed() {
            "passed".into()
        } else {
            format!("**{}**", report.outcome.faults.join("; "))
        };
        let happened = &report.outcome.happened;
        text.push_str(&format!("| {} | {happened} | {health} | {polite} | {verdict} |\n", report.name));
    }
    text
}

fn health_cell(seen: &Seen) -> String {
    format!("{}, {:.1}", seen.asked(), seen.worst().as_secs_f64() * 1e3)
}

fn polite_cell(seen: &Seen) -> String {
    let ms = |quantile| seen.quantile(quantile).as_secs_f64() * 1e3;
    format!("{}, {}, {}, {:.0} and {:.0}", seen.answered.len(), seen.refused, seen.failed, ms(0.5), ms(0.99))
}
