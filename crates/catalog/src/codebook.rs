//! The parts that a catalog really uses, per level, with their symbols. They translate SIDs while
//! reading, and restore a leaf's SID as the file wrote it.

use hashbrown::HashMap;

use crate::{RecordProblem, SidPart, SymbolTable};

/// Maps parts to symbols and back while a catalog is read. Asks the symbol table once per distinct
/// part.
#[derive(Debug, Default)]
pub(crate) struct CodebookBuilder {
    levels: Vec<LevelBuilder>,
    tokens: Option<bool>,
}

#[derive(Debug, Default)]
struct LevelBuilder {
    symbols: HashMap<SidPart, u32>,
    parts: HashMap<u32, SidPart>,
}

impl CodebookBuilder {
    /// Replaces the contents of `path` by the symbols of `sid`.
    pub(crate) fn translate(
        &mut self,
        sid: &[SidPart],
        table: &dyn SymbolTable,
        path: &mut Vec<u32>,
    ) -> Result<(), RecordProblem> {
        self.check_form(sid)?;
        if self.levels.len() < sid.len() {
            self.levels.resize_with(sid.len(), LevelBuilder::default);
        }
        path.clear();
        for (level, (codes, part)) in self.levels.iter_mut().zip(sid).enumerate() {
            path.push(codes.symbol(level, part, table)?);
        }
        self.tokens = self.tokens.or_else(|| sid.first().map(is_token));
        Ok(())
    }

    /// Refuses a SID in another form than the catalog's first good record: codes or token strings.
    fn check_form(&self, sid: &[SidPart]) -> Result<(), RecordProblem> {
        let Some(tokens) = self.tokens.or_else(|| sid.first().map(is_token)) else { return Ok(()) };
        match sid.iter().enumerate().find(|(_, part)| is_token(part) != tokens) {
            Some((level, part)) => Err(RecordProblem::MixedForms {
                level,
                part: part.clone(),
                expected: if tokens { "token strings" } else { "integer codes" },
            }),
            None => Ok(()),
        }
    }

    pub(crate) fn finish(self) -> Codebook {
        let level = |level: LevelBuilder| {
            let num_codes = level.symbols.len();
            let mut parts = level.parts;
            parts.retain(|&symbol, part| *part != SidPart::Code(symbol));
            parts.shrink_to_fit();
            LevelCodes { parts, num_codes }
        };
        Codebook { levels: self.levels.into_iter().map(level).collect() }
    }
}

impl LevelBuilder {
    fn symbol(
        &mut self,
        level: usize,
        part: &SidPart,
        table: &dyn SymbolTable,
    ) -> Result<u32, RecordProblem> {
        if let Some(&symbol) = self.symbols.get(part) {
            return Ok(symbol);
        }
        let Some(symbol) = table.symbol(level, part) else {
            let advice = table.advice(level, part);
            return Err(RecordProblem::UnknownCode { level, part: part.clone(), advice });
        };
        if let Some(other) = self.parts.get(&symbol) {
            return Err(RecordProblem::AmbiguousCode {
                level,
                part: part.clone(),
                other: other.clone(),
                symbol,
            });
        }
        self.parts.insert(symbol, part.clone());
        self.symbols.insert(part.clone(), symbol);
        Ok(symbol)
    }
}

fn is_token(part: &SidPart) -> bool {
    matches!(part, SidPart::Token(_))
}

/// Maps symbols back to the parts as written.
#[derive(Debug)]
pub(crate) struct Codebook {
    levels: Vec<LevelCodes>,
}

#[derive(Debug)]
struct LevelCodes {
    /// Maps a symbol to its part, unless the part is the symbol as a code.
    parts: HashMap<u32, SidPart>,
    num_codes: usize,
}

impl Codebook {
    /// The part that was written for `symbol` at `level`.
    pub(crate) fn part(&self, level: usize, symbol: u32) -> SidPart {
        self.levels[level].parts.get(&symbol).cloned().unwrap_or(SidPart::Code(symbol))
    }

    /// Number of distinct parts at `level`.
    pub(crate) fn num_codes(&self, level: usize) -> usize {
        self.levels[level].num_codes
    }

    pub(crate) fn memory_bytes(&self) -> usize {
        let text = |part: &SidPart| match part {
            SidPart::Code(_) => 0,
            SidPart::Token(text) => text.len(),
        };
        self.levels
            .iter()
            .map(|level| level.parts.allocation_size() + level.parts.values().map(text).sum::<usize>())
            .sum()
    }
}
