//! Which lines of a file are built for tests only: what stands below `#[cfg(test)]` or `#[test]`.
//!
//! What this must not know: rules.

use std::ops::RangeInclusive;

use proc_macro2::{TokenStream, TokenTree};
use syn::spanned::Spanned;
use syn::visit::{self, Visit};

/// The lines of a file that are built for tests only.
pub(super) fn of(file: &syn::File) -> Vec<RangeInclusive<usize>> {
    let mut finder = TestFinder::default();
    finder.visit_file(file);
    finder.0
}

/// The lines of everything below `#[cfg(test)]` or `#[test]`.
#[derive(Default)]
struct TestFinder(Vec<RangeInclusive<usize>>);

impl TestFinder {
    fn look(&mut self, attributes: &[syn::Attribute], spanned: &impl Spanned) -> bool {
        let found = attributes.iter().any(is_for_tests);
        if found {
            let span = spanned.span();
            self.0.push(span.start().line..=span.end().line);
        }
        found
    }
}

impl<'ast> Visit<'ast> for TestFinder {
    fn visit_item_mod(&mut self, item: &'ast syn::ItemMod) {
        if !self.look(&item.attrs, item) {
            visit::visit_item_mod(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        if !self.look(&item.attrs, item) {
            visit::visit_item_fn(self, item);
        }
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        if !self.look(&item.attrs, item) {
            visit::visit_item_impl(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        if !self.look(&item.attrs, item) {
            visit::visit_impl_item_fn(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast syn::ItemUse) {
        self.look(&item.attrs, item);
    }
}

fn is_for_tests(attribute: &syn::Attribute) -> bool {
    match &attribute.meta {
        syn::Meta::Path(path) => path.is_ident("test"),
        syn::Meta::List(list) => list.path.is_ident("cfg") && demands_tests(list.tokens.clone()),
        syn::Meta::NameValue(_) => false,
    }
}

/// Whether the condition of a `cfg` holds in tests only: `test`, or `all(test, ..)`.
fn demands_tests(condition: TokenStream) -> bool {
    let tokens: Vec<TokenTree> = condition.into_iter().collect();
    match tokens.as_slice() {
        [TokenTree::Ident(name)] => name == "test",
        [TokenTree::Ident(name), TokenTree::Group(all)] if name == "all" => {
            let conditions: Vec<TokenTree> = all.stream().into_iter().collect();
            conditions
                .split(|token| matches!(token, TokenTree::Punct(comma) if comma.as_char() == ','))
                .any(|condition| demands_tests(condition.iter().cloned().collect()))
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_tests_are_told() {
        let text = "fn a() {}\n#[cfg(test)]\nmod tests {\n    fn b() {}\n}\n#[test]\nfn c() {}\n\
                    #[cfg(not(test))]\nfn d() {}\n#[cfg(all(test, unix))]\nuse x::y;\n#[cfg(any(test, unix))]\nfn e() {}\n";
        let lines = of(&syn::parse_file(text).unwrap());
        let tests: Vec<usize> =
            (1..=13).filter(|&line| lines.iter().any(|lines| lines.contains(&line))).collect();
        assert_eq!(tests, [2, 3, 4, 5, 6, 7, 10, 11]);
    }
}
