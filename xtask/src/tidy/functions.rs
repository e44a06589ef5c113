//! Functions fit on a screen.
//!
//! Lines are counted from the one with `fn` to the closing brace, so attributes and documentation are free.
//! Tests are not counted: a long test is a long story, and easy to read.

use syn::visit::{self, Visit};

use super::offence::{Offence, Rule};
use super::rust_file::RustFile;

const MOST_LINES: usize = 70;

pub(super) fn check(file: &RustFile<'_>, offences: &mut Vec<Offence>) {
    Functions { file, offences }.visit_file(&file.syntax);
}

struct Functions<'a, 'b> {
    file: &'a RustFile<'b>,
    offences: &'a mut Vec<Offence>,
}

impl Functions<'_, '_> {
    fn measure(&mut self, signature: &syn::Signature, block: &syn::Block) {
        let first = signature.fn_token.span.start().line;
        let lines = block.brace_token.span.close().end().line + 1 - first;
        if lines > MOST_LINES && !self.file.is_test(first) {
            let advice = format!("cut `{}` into parts: {lines} lines, {MOST_LINES} at most", signature.ident);
            self.offences.push(Offence::new(Rule::LongFunction, self.file.path, first, advice));
        }
    }
}

impl<'ast> Visit<'ast> for Functions<'_, '_> {
    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.measure(&item.sig, &item.block);
        visit::visit_item_fn(self, item);
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        self.measure(&item.sig, &item.block);
        visit::visit_impl_item_fn(self, item);
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        if let Some(block) = &item.default {
            self.measure(&item.sig, block);
        }
        visit::visit_trait_item_fn(self, item);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(text: &str) -> Vec<usize> {
        let mut offences = Vec::new();
        check(&RustFile::parse("src/a.rs", text).unwrap(), &mut offences);
        offences.iter().map(|offence| offence.line).collect()
    }

    /// A function of this many lines.
    fn function(lines: usize) -> String {
        format!("fn a(\n) {{\n{}}}\n", "    b();\n".repeat(lines - 3))
    }

    #[test]
    fn the_line_after_the_last_is_one_too_many() {
        assert_eq!(found(&function(70)), [] as [usize; 0]);
        assert_eq!(found(&format!("/// Documentation is free.\n#[inline]\n{}", function(71))), [3]);
    }

    #[test]
    fn methods_and_defaults_count_and_tests_do_not() {
        let long = function(71);
        assert_eq!(found(&format!("impl A {{\n{long}}}\ntrait B {{\n{long}}}\n")), [2, 75]);
        assert_eq!(
            found(&format!("#[cfg(test)]\nmod tests {{\n{long}}}\n#[test]\n{long}")),
            [] as [usize; 0]
        );
    }

    #[test]
    fn nested_functions_count_for_themselves() {
        assert_eq!(found(&format!("fn outer() {{\n{}}}\n", function(71))), [1, 2]);
    }
}
