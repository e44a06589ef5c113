"""How TIGER spells items: the levels of a semantic ID, the convention (preset `tiger` of the server), the tokenizer.

An item is one code per level of the index and a last code that tells items apart whose codes are equal. A history is the codes of
its newest items, nothing between them, and </s>. The decoder starts from <pad> and writes the codes of the next item.
"""

import collections
import json
import os
import string

ROOT = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
PRESETS = os.path.join(ROOT, "crates", "model", "src", "convention", "presets.json")
SPECIAL = ["<pad>", "</s>", "<unk>"]
PAD, END = 0, 1


def told_apart(codes, levels):
    """Semantic IDs: up to `levels` codes, and a last one: 0 for the first item with these codes, 1 for the second."""
    seen, made = collections.Counter(), []
    for code in codes:
        kept = tuple(code[:levels])
        made.append([*kept, seen[kept]])
        seen[kept] += 1
    return made


def all_fields(written):
    """A convention with the fields of its preset filled in."""
    with open(PRESETS, encoding="utf-8") as file:
        return {**json.load(file)[written["preset"]], **written, "catalog_sid_form": "codes"}


def convention_of(sids, max_items):
    """convention.json for these semantic IDs: the preset, and what differs from it."""
    levels = len(sids[0])
    wanted = {
        "levels": levels,
        "level_token_patterns": [f"<{letter}_{{}}>" for letter in string.ascii_lowercase[:levels]],
        # A level has the preset's number of codes, or more if it must.
        "level_code_counts": [max(256, 1 + max(level)) for level in zip(*sids)],
        "max_history_items": max_items,
    }
    preset = all_fields({"preset": "tiger"})
    return {"preset": "tiger", **{field: value for field, value in wanted.items() if preset[field] != value}}


def build_tokenizer(codes):
    """Codes after <pad>, </s> and <unk>; </s> is put behind every text."""
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    import tokens

    tokenizer = tokens.word_level(SPECIAL, codes)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", END)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="</s>")
