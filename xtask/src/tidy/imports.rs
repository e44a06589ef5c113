//! Modules name nothing that the table of layers forbids, and unsafe code stays in its folders.
//!
//! A line counts once per forbidden thing. Tests may know everything.

use std::collections::BTreeSet;

use super::layers::{LAYERS, Layer, UNSAFE};
use super::offence::{Offence, Rule};
use super::rust_file::{Kind, RustFile};
use super::rust_paths::paths_in;
use super::tree::Tree;

pub(super) fn check(file: &RustFile<'_>, offences: &mut Vec<Offence>) {
    check_layers(file, LAYERS, offences);
    check_unsafe(file, UNSAFE, offences);
}

/// Every path of the tables must exist.
pub(super) fn check_tables(tree: &Tree, offences: &mut Vec<Offence>) {
    let paths = LAYERS.iter().flat_map(|layer| layer.paths).chain(UNSAFE);
    let missing: BTreeSet<&&str> = paths.filter(|path| !tree.has(path)).collect();
    for path in missing {
        let advice = format!("name the place of today: {path} does not exist");
        offences.push(Offence::new(Rule::Layers, "xtask/src/tidy/layers.rs", 1, advice));
    }
}

fn check_layers(file: &RustFile<'_>, layers: &[Layer], offences: &mut Vec<Offence>) {
    let layers: Vec<&Layer> = layers.iter().filter(|layer| is_within(file.path, layer.paths)).collect();
    if layers.is_empty() {
        return;
    }
    let mut found = BTreeSet::new();
    for (line, path) in paths_in(file) {
        if file.is_test(line) {
            continue;
        }
        for layer in &layers {
            for &forbidden in layer.forbidden {
                if path == forbidden
                    || path.strip_prefix(forbidden).is_some_and(|rest| rest.starts_with("::"))
                {
                    found.insert((line, forbidden, layer.instead));
                }
            }
        }
    }
    for (line, forbidden, instead) in found {
        let advice = format!("do not name {forbidden}: {instead}");
        offences.push(Offence::new(Rule::Layers, file.path, line, advice));
    }
}

fn check_unsafe(file: &RustFile<'_>, allowed: &[&str], offences: &mut Vec<Offence>) {
    if is_within(file.path, allowed) {
        return;
    }
    let names = file.tokens.iter().filter(|token| token.kind == Kind::Name);
    for token in names.filter(|token| file.source(token) == "unsafe") {
        let advice = "do it without `unsafe`, or move it to a folder that layers.rs lists";
        offences.push(Offence::new(Rule::Unsafe, file.path, file.line(token.place.start), advice));
    }
}

fn is_within(path: &str, places: &[&str]) -> bool {
    places
        .iter()
        .any(|place| path.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/')))
}

#[cfg(test)]
mod tests {
    use super::*;

    const TABLE: &[Layer] = &[Layer {
        paths: &["crates/server/src/service", "crates/server/src/error.rs"],
        forbidden: &["tokio", "crate::http", "beamline_model::cuda"],
        instead: "ask",
    }];

    fn found(path: &str, text: &str) -> Vec<usize> {
        let mut offences = Vec::new();
        check_layers(&RustFile::parse(path, text).unwrap(), TABLE, &mut offences);
        offences.iter().map(|offence| offence.line).collect()
    }

    #[test]
    fn planted_imports_are_found_in_every_form() {
        for planted in [
            "use tokio::sync::Notify;",
            "use crate::http::reply;",
            "use crate::{api, http::{self, reply}};",
            "use super::http::reply;",
            "use super::super::super::http;",
            "use beamline_model::{cpu::Cpu, cuda::{device::Device, beams}};",
            "use ::tokio::spawn as go;",
            "fn a(b: &tokio::sync::Notify) {}",
            "#[tokio::main]\nasync fn main() {}",
            "fn a() { let b: u8 = vec![tokio::spawn(1)]; }",
            "macro_rules! m { () => { $crate::http::reply() } }",
        ] {
            let places = found("crates/server/src/service/search/rows.rs", planted);
            let expected = usize::from(!planted.contains("use super::http"));
            assert_eq!(places.len(), expected, "{planted}: {places:?}");
        }
        assert_eq!(found("crates/server/src/service/mod.rs", "use super::http::reply;"), [1]);
        assert_eq!(found("crates/server/src/error.rs", "\nuse crate::{\n    api::A,\n    http::B,\n};"), [4]);
    }

    #[test]
    fn what_is_allowed_is_left_alone() {
        for text in [
            "use beamline_model::step::Plan;",
            "use beamline_model::{cpu::Cpu, step::cuda::X as cuda};",
            "// use tokio::sync::Notify;\nconst A: &str = \"tokio::spawn\";",
            "#[cfg(test)]\nmod tests {\n    use tokio::test;\n}",
            "use crate::https::reply;",
            "fn a() { tokio.b(); let http: u8 = 1; self.http::<u8>(); }",
        ] {
            assert_eq!(found("crates/server/src/service/mod.rs", text), [] as [usize; 0], "{text}");
        }
        assert_eq!(found("crates/server/src/runtime/mod.rs", "use tokio::sync::Notify;"), [] as [usize; 0]);
        assert_eq!(found("crates/server/src/services.rs", "use tokio::sync::Notify;"), [] as [usize; 0]);
    }

    #[test]
    fn unsafe_code_is_found_outside_its_folders() {
        let text = "/// Not unsafe.\nfn a() { \"unsafe\"; }\nunsafe fn b() {}\nfn c() { unsafe { b() } }\n";
        let file = RustFile::parse("crates/a/src/b.rs", text).unwrap();
        let mut offences = Vec::new();
        check_unsafe(&file, &["crates/a/src/b"], &mut offences);
        assert_eq!(offences.iter().map(|offence| offence.line).collect::<Vec<_>>(), [3, 4]);
        check_unsafe(&file, &["crates/a/src"], &mut offences);
        assert_eq!(offences.len(), 2);
    }

    #[test]
    fn the_tables_name_places_that_exist() {
        let mut offences = Vec::new();
        check_tables(&Tree::of_names(&["README.md"]), &mut offences);
        assert!(offences.iter().any(|offence| offence.advice.contains("crates/compute/src/cpu ")));
        offences.clear();
        check_tables(&Tree::open(&crate::root()).unwrap(), &mut offences);
        assert_eq!(offences, []);
    }
}
