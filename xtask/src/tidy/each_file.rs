//! What can be said of each file for itself, by as many threads as there are processors.
//!
//! Invariant: what is found does not depend on the threads. Its order does, so the caller sorts.

use std::num::NonZero;
use std::panic::resume_unwind;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;

use super::offence::{Offence, Rule};
use super::rust_file::RustFile;
use super::{comment_rules, comments, functions, imports, phrases, private};

/// Checks files, each a path and a text.
pub(super) fn check(texts: &[(String, String)]) -> Vec<Offence> {
    let next = AtomicUsize::new(0);
    let work = || {
        let mut offences = Vec::new();
        while let Some((path, text)) = texts.get(next.fetch_add(1, Ordering::Relaxed)) {
            check_text(path, text, &mut offences);
        }
        offences
    };
    let threads = thread::available_parallelism().map_or(1, NonZero::get);
    thread::scope(|scope| {
        let workers: Vec<_> = (0..threads).map(|_| scope.spawn(work)).collect();
        let found =
            workers.into_iter().map(|worker| worker.join().unwrap_or_else(|panic| resume_unwind(panic)));
        found.flatten().collect()
    })
}

fn check_text(path: &str, text: &str, offences: &mut Vec<Offence>) {
    private::check(path, text, offences);
    if path.ends_with(".rs") {
        check_rust(path, text, offences);
    } else if path.ends_with(".md") {
        phrases::check(path, phrases::prose(text), offences);
    } else {
        for comment in comments::of_lines(path, text) {
            phrases::check(path, comment.numbered(), offences);
        }
    }
}

fn check_rust(path: &str, text: &str, offences: &mut Vec<Offence>) {
    let file = match RustFile::parse(path, text) {
        Ok(file) => file,
        Err(error) => {
            offences.push(Offence::new(Rule::Syntax, path, 1, format!("mend the syntax: {error:#}")));
            return;
        }
    };
    let comments = comments::of_rust(&file);
    imports::check(&file, offences);
    functions::check(&file, offences);
    comment_rules::check(&file, &comments, offences);
    for comment in &comments {
        phrases::check(path, comment.numbered(), offences);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_rule_sees_what_was_planted() {
        let mut offences = Vec::new();
        check_rust(
            "crates/catalog/src/a.rs",
            "use tokio::task;\n/// It.\nunsafe fn a() {} // whoever\n",
            &mut offences,
        );
        check_rust("crates/catalog/src/b.rs", "fn (", &mut offences);
        let rules: Vec<Rule> = offences.iter().map(|offence| offence.rule).collect();
        assert_eq!(rules, [Rule::Layers, Rule::Unsafe, Rule::ShortDoc, Rule::Phrases, Rule::Syntax]);
        assert_eq!(offences[2].to_string().split(": ").next(), Some("crates/catalog/src/a.rs:2"));
    }
}
