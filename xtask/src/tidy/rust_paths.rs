//! The Rust paths that a file names, as they are from the root of their crate on.
//!
//! Tokens are read, not only `use`: a full path in an expression or in a macro counts as well. `crate`,
//! `self` and `super` are resolved from the place of the file; modules within a file are taken for the file
//! itself.
//!
//! What this must not know: what may be named.

use super::rust_file::{Kind, RustFile};

/// Words that a path with `::` at its beginning may follow, and that are no part of it.
const KEYWORDS: [&str; 12] =
    ["break", "dyn", "else", "for", "if", "impl", "in", "match", "mut", "return", "use", "while"];

/// Paths of two names and more, each with the line of its last name.
pub(super) fn paths_in(file: &RustFile<'_>) -> Vec<(usize, String)> {
    let module = module_of(file.path);
    let tokens = &file.tokens;
    let is = |at: usize, source: &str| tokens.get(at).is_some_and(|token| file.source(token) == source);
    let mut found = Vec::new();
    // What was said before the braces of a `use` that are open, and how deep each of them is.
    let mut prefixes: Vec<(usize, Vec<&str>)> = Vec::new();
    let (mut at, mut depth) = (0, 0_usize);
    while let Some(token) = tokens.get(at) {
        at += 1;
        match token.kind {
            Kind::Open => depth += 1,
            Kind::Close => {
                prefixes.pop_if(|(inside, _)| *inside == depth);
                depth = depth.saturating_sub(1);
            }
            Kind::Name if KEYWORDS.contains(&file.source(token)) => {}
            Kind::Name => {
                let prefix = prefixes.last().filter(|(inside, _)| *inside == depth);
                if prefix.is_some() && file.source(token) == "as" {
                    at += 1;
                    continue;
                }
                let mut path = prefix.map(|(_, prefix)| prefix.clone()).unwrap_or_default();
                let mut last = token;
                path.push(file.source(token));
                while is(at, ":") && is(at + 1, ":") {
                    let Some(next) = tokens.get(at + 2).filter(|next| next.kind == Kind::Name) else { break };
                    path.push(file.source(next));
                    last = next;
                    at += 3;
                }
                if is(at, ":") && is(at + 1, ":") && is(at + 2, "{") {
                    prefixes.push((depth + 1, path));
                } else if path.len() > 1 {
                    found.push((file.line(last.place.start), resolve(&module, &path)));
                }
            }
            Kind::Doc | Kind::Other => {}
        }
    }
    found
}

/// The module that a file holds, from `crate` on.
fn module_of(path: &str) -> Vec<&str> {
    let below = path.split_once("/src/").map_or(path, |(_, below)| below);
    let below = below.strip_suffix(".rs").unwrap_or(below);
    let mut module = vec!["crate"];
    module.extend(below.split('/'));
    module.pop_if(|last| matches!(*last, "mod" | "lib" | "main"));
    module
}

/// A path as it is from the root of its crate on.
fn resolve(module: &[&str], path: &[&str]) -> String {
    if !matches!(path.first(), Some(&"self" | &"super")) {
        return path.join("::");
    }
    let mut base = module.to_vec();
    let mut rest = path;
    while let Some((&first, others)) = rest.split_first() {
        match first {
            "self" => {}
            "super" => _ = base.pop(),
            _ => break,
        }
        rest = others;
    }
    base.extend_from_slice(rest);
    base.join("::")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        let file = RustFile::parse(path, text).unwrap();
        paths_in(&file).into_iter().map(|(_, path)| path).collect()
    }

    #[test]
    fn trees_of_imports_are_cut_into_paths() {
        let text = "use a::{b::{c, d as e}, self, f as g};\nuse h::*;\nfn i() { j::k(l); let m: N = 1; return ::o::p; }\n";
        assert_eq!(found("src/a.rs", text), ["a::b::c", "a::b::d", "a::self", "a::f", "j::k", "o::p"]);
    }

    #[test]
    fn relative_paths_begin_at_the_root_of_the_crate() {
        let relative = |path| found(path, "use super::b;\nuse self::c;\nuse super::super::d::e;\n");
        assert_eq!(relative("crates/x/src/y/z.rs"), ["crate::y::b", "crate::y::z::c", "crate::d::e"]);
        assert_eq!(relative("crates/x/src/y/z/mod.rs"), ["crate::y::b", "crate::y::z::c", "crate::d::e"]);
    }
}
