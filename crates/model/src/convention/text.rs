//! Prompts that a request gives as text.

use super::Convention;

/// Why a text cannot be a prompt. To be read after the name of the field that holds it.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PromptError {
    /// It has more bytes than the tokens of a context can hold.
    #[error("has {bytes} bytes; a context of {limit} tokens holds at most {most}")]
    TooLong {
        /// Of the text.
        bytes: usize,
        /// Tokens that a context may have.
        limit: usize,
        /// Bytes that this number of tokens can hold.
        most: usize,
    },
    /// It holds a token that the model does not have.
    #[error("holds {text:?}, which is token {id} of the tokenizer; the model has {rows} tokens")]
    BeyondVocabulary {
        /// The token's text.
        text: String,
        /// The token's id.
        id: u32,
        /// Rows of the embedding.
        rows: usize,
    },
    /// Nothing of it means anything to the model.
    #[error(
        "holds no word that the tokenizer of this model knows; write semantic-ID tokens, or send `history`"
    )]
    OnlyUnknown,
    /// The tokenizer fails.
    #[error("cannot be tokenised")]
    Failed,
}

impl Convention {
    /// Tokens of a request's text, for a context of at most `limit` of them.
    ///
    /// # Errors
    ///
    /// When there are surely more, or the model cannot read them.
    pub fn tokens_of(&self, text: &str, limit: usize) -> Result<Vec<u32>, PromptError> {
        let most = self.bytes_of(limit);
        if text.len() > most {
            return Err(PromptError::TooLong { bytes: text.len(), limit, most });
        }
        let tokens = self.tokenize(text).map_err(|_| PromptError::Failed)?;
        if let Some(error) = self.beyond_vocabulary(&tokens) {
            return Err(error);
        }
        if self.is_only_unknown(&tokens)? { Err(PromptError::OnlyUnknown) } else { Ok(tokens) }
    }

    /// Whether all tokens are those of unknown words, except the tokens that the tokenizer puts around
    /// every text.
    fn is_only_unknown(&self, tokens: &[u32]) -> Result<bool, PromptError> {
        let Some(unknown) = self.unknown.filter(|unknown| tokens.contains(unknown)) else { return Ok(false) };
        let around = self.tokenize("").map_err(|_| PromptError::Failed)?.len();
        let known = tokens.iter().filter(|token| **token != unknown).count();
        Ok(known <= around)
    }

    /// Upper bound on the bytes of a text of this number of tokens. Texts of blanks and of unknown words
    /// may exceed it. Normalizers may shorten what is written in another form, so each token counts
    /// twice the longest one, and a few bytes for blanks.
    fn bytes_of(&self, tokens: usize) -> usize {
        const BLANKS: usize = 8;
        tokens.saturating_mul(self.longest.saturating_mul(2).saturating_add(BLANKS))
    }

    /// The first token that the model does not have.
    pub(super) fn beyond_vocabulary(&self, tokens: &[u32]) -> Option<PromptError> {
        let id = *tokens.iter().find(|token| **token as usize >= self.vocab_size)?;
        let text = self.tokenizer.id_to_token(id).unwrap_or_default();
        Some(PromptError::BeyondVocabulary { text, id, rows: self.vocab_size })
    }
}
