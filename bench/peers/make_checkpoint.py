"""Writes a random Qwen3 checkpoint with a vocabulary of semantic IDs, its tokenizer and a catalog.

An item is spelt <|sid_begin|><s_a_i><s_b_j><s_c_k><|sid_end|>, as OpenOneRec spells it. Random weights are right for timing
and meaningless for quality. `--shape` picks a workload:

  S   6 layers x 256, 3 x 256 codes, 20 000 items        6.3 M parameters (CPU)
  M  12 layers x 768, 3 x 1024 codes, 200 000 items       87 M parameters (CPU, GPU)
  L  Qwen3-1.7B with 3 x 8192 codes, 1 500 000 items     the shape of OneRec-1.7B (GPU)
"""
import argparse
import json
import pathlib

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from common import LEVELS

SHAPES = {
    "S": dict(layers=6, hidden=256, heads=4, kv_heads=2, head_dim=64, ffn=1024, codes=256, items=20_000),
    "M": dict(layers=12, hidden=768, heads=12, kv_heads=4, head_dim=64, ffn=2304, codes=1024, items=200_000),
    "L": dict(layers=28, hidden=2048, heads=16, kv_heads=8, head_dim=128, ffn=6144, codes=8192, items=1_500_000),
}
SPECIAL_TOKENS = ["<pad>", "<unk>", "<|im_start|>", "<|im_end|>", "<|sid_begin|>", "<|sid_end|>"]
# The vocabulary of OneRec-1.7B.
VOCABULARY_OF_L = 176_384


def write_tokenizer(out, codes):
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(SPECIAL_TOKENS)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([AddedToken(f"<s_{level}_{code}>", special=False, normalized=False)
                          for level in LEVELS for code in range(codes)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="<|im_end|>"
    ).save_pretrained(out)


def write_model(out, name, shape, dtype, seed):
    torch.manual_seed(seed)
    multiple_of_64 = (len(SPECIAL_TOKENS) + len(LEVELS) * shape["codes"] + 63) // 64 * 64
    config = Qwen3Config(
        vocab_size=VOCABULARY_OF_L if name == "L" else multiple_of_64,
        hidden_size=shape["hidden"], intermediate_size=shape["ffn"], num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"], num_key_value_heads=shape["kv_heads"], head_dim=shape["head_dim"],
        max_position_embeddings=16384, tie_word_embeddings=name == "L", rope_theta=1e6,
        eos_token_id=3, pad_token_id=0, bos_token_id=None)
    torch.set_default_dtype(getattr(torch, dtype))
    Qwen3ForCausalLM(config).save_pretrained(out, safe_serialization=True)


def write_catalog(out, shape, seed):
    """Distinct semantic IDs. The first code follows a power law, as clusters of real items do."""
    random = np.random.default_rng(seed)
    weights = 1.0 / np.arange(1, shape["codes"] + 1) ** 0.7
    weights /= weights.sum()
    sids = {}
    while len(sids) < shape["items"]:
        count = shape["items"] - len(sids)
        levels = [random.choice(shape["codes"], count, p=weights)]
        levels += [random.integers(shape["codes"], size=count) for _ in LEVELS[1:]]
        for sid in zip(*(level.tolist() for level in levels)):
            sids.setdefault(sid)
    with open(out / "catalog.jsonl", "w", encoding="utf-8") as lines:
        for number, sid in enumerate(sids):
            lines.write(json.dumps({"item_id": f"item-{number:07d}", "sid": list(sid)}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=pathlib.Path)
    parser.add_argument("--shape", choices=SHAPES, default="S")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shape = SHAPES[options.shape]
    options.out.mkdir(parents=True, exist_ok=True)
    write_tokenizer(options.out, shape["codes"])
    write_model(options.out, options.shape, shape, options.dtype, options.seed)
    # The catalog comes last, so that a directory with a catalog is complete.
    write_catalog(options.out, shape, options.seed)


if __name__ == "__main__":
    main()
