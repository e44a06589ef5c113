//! Conventions of published model families, by name.
//!
//! The presets are data, in `presets.json` beside this file, because the parity tool of `weights/tools`
//! reads them too.
//!
//! Sources: OpenOneRec (Kuaishou-OneRec/OpenOneRec), OneReason (arXiv 2606.06260), OneRec-Think
//! (wangshy31/OneRec-Think), MiniOneRec (AkaliKong/MiniOneRec), LC-Rec (arXiv 2311.09049,
//! RUCAIBox/LC-Rec). Prompts are data that the checkpoints were trained on, so they are kept to the
//! letter. Where a family has many prompts, the preset has the first of its main task; override
//! `prompt_prefix` and `prompt_suffix` for another.
//!
//! - `openonerec`: video recommendation without thinking; the empty think block is part of the prompt.
//! - `onereason`: one begin token per domain and no end token. Its prompts are not published with the
//!   paper, so there is no text around the history; give `prompt_prefix` and `prompt_suffix`, or send
//!   prompts.
//! - `onerec-think`: begin and end markers are generated with the SID.
//! - `minionerec`: plain text without a chat template; a newline and the end token are generated and scored.
//! - `lc-rec`: LC-Rec, and LETTER on the same backbone. It is decoded with an exact trie here; the
//!   authors allow every code of a level.
//! - `tiger`: TIGER (arXiv 2305.05065) as T5. It has three levels of 256 codes, and a last one that
//!   distinguishes items of equal codes. The encoder reads the codes of the last 20 items; nothing is
//!   generated after them.
//! - `letter`: LETTER (arXiv 2405.07314, HonghuiBao2000/LETTER) on T5. Four levels; the end token is
//!   generated and scored.

use serde_json::{Map, Value};

const PRESETS: &str = include_str!("presets.json");

/// Names of all presets.
pub fn names() -> Vec<&'static str> {
    vec!["openonerec", "onereason", "onerec-think", "minionerec", "lc-rec", "tiger", "letter"]
}

/// The fields of a preset.
pub(super) fn find(name: &str) -> Option<Value> {
    let mut presets: Map<String, Value> = serde_json::from_str(PRESETS).ok()?;
    presets.remove(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_holds_what_the_list_names() {
        let presets: Map<String, Value> = serde_json::from_str(PRESETS).unwrap();
        let mut names = names();
        names.sort_unstable();
        assert_eq!(presets.keys().collect::<Vec<_>>(), names);
    }
}
