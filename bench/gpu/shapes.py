"""The models that are measured, as numbers: what config.json of a Qwen3 decoder says, and how it spells semantic IDs.

Everything else in this folder takes its sizes from here. Knows nothing of tensors.
"""
from dataclasses import dataclass, replace

TEXT_VOCABULARY = 151_936  # rows of Qwen3's embedding; semantic tokens follow them


@dataclass(frozen=True)
class Shape:
    """A decoder. Sizes are counts of values; `levels` codebooks of `codebook` tokens each end the vocabulary."""

    name: str
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    tied: bool
    text_vocabulary: int = TEXT_VOCABULARY
    levels: int = 3
    codebook: int = 8192
    rope_theta: float = 1e6
    epsilon: float = 1e-6

    @property
    def vocabulary(self):
        return self.text_vocabulary + self.levels * self.codebook

    @property
    def queries(self):
        """Width of all query heads together."""
        return self.heads * self.head_dim

    @property
    def keys(self):
        """Width of all key heads together; that of the values is the same."""
        return self.kv_heads * self.head_dim

    @property
    def group(self):
        """Query heads that share a key head."""
        return self.heads // self.kv_heads

    def first_token(self, level):
        """Token of code 0 of a level."""
        return self.text_vocabulary + level * self.codebook


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("qwen3-0.6b", 1024, 28, 16, 8, 128, 3072, True),
        Shape("qwen3-1.7b", 2048, 28, 16, 8, 128, 6144, True),
        Shape("qwen3-8b", 4096, 36, 32, 8, 128, 12288, False),
        # For tests and for --cpu.
        Shape("tiny", 32, 3, 4, 2, 16, 64, True, text_vocabulary=40, codebook=16),
    )
}


def shape_named(name, levels=None, codebook=None):
    """The shape of that name, with other codebooks if asked for."""
    changes = {key: value for key, value in (("levels", levels), ("codebook", codebook)) if value is not None}
    return replace(SHAPES[name], **changes)
