//! The weight files of a checkpoint of any family.

use std::collections::BTreeMap;

use beamline_model::checkpoint::Examined;
use beamline_model::escaped::Escaped;

use super::Findings;
use crate::settings::ByteSize;

/// Adds the contents of the files, and what is wrong with them.
pub(super) fn describe<C>(examined: Examined<C>, list: bool, findings: &mut Findings) {
    let Examined { tensors, digest, problems, notes, .. } = examined;
    if let Some(tensors) = &tensors {
        findings.line("weights", format!("{} in {}", ByteSize(tensors.bytes()), tensors.files().join(", ")));
        findings
            .line("parameters", format!("{} in {} tensors", tensors.parameters(), tensors.entries().len()));
        let mut types: BTreeMap<String, (usize, usize)> = BTreeMap::new();
        for entry in tensors.entries().values() {
            let count = types.entry(format!("{:?}", entry.dtype)).or_default();
            count.0 += 1;
            count.1 += entry.shape.iter().product::<usize>();
        }
        for (name, (tensors, values)) in types {
            findings.line("", format!("{name}: {tensors} tensors, {values} values"));
        }
        if list {
            for (name, entry) in tensors.entries() {
                findings.line("", format!("{} {:?} {:?}", Escaped(name), entry.shape, entry.dtype));
            }
        }
    }
    if let Some(digest) = digest {
        findings.line("sha256", digest);
    }
    problems.iter().for_each(|problem| findings.model_error(problem));
    findings.notes(&notes);
}
