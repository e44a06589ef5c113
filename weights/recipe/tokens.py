"""How items become token ids: the tokenizer of a convention, and the token stream of a history.

Shared by the trainers of this folder. Knows convention.json and catalog.jsonl, nothing of models; transformers and tokenizers are
imported when a tokenizer is built, so that the rest can be read and tested without them.
"""

import json
import re


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def token_text(token):
    return token["text"] if token else None


def check_convention(convention):
    """The recipe trains on the stream prefix + item + item + ...; refuse what that stream cannot express."""
    if convention["model"] != "decoder":
        raise SystemExit("this recipe trains decoder-only models")
    if token_text(convention["generation_begin"]) != token_text(convention["item_begin_token"]):
        raise SystemExit("generation_begin must be the item_begin_token (or both null): generation has to start like any item of a history")
    for field in ("item_separator", "prompt_suffix"):
        if convention[field]:
            raise SystemExit(f"{field} must be empty for this recipe")
    if convention["tail_tokens"]:
        raise SystemExit("tail_tokens must be empty for this recipe: its models generate the semantic ID and nothing else")
    if re.sub(r"<\|[^|]+\|>", "", convention["prompt_prefix"]):
        raise SystemExit("prompt_prefix may hold special tokens such as <|bos|> only")


def sid_tokens(convention, sid):
    """A catalog's semantic ID as token strings."""
    if convention["catalog_sid_form"] == "tokens":
        return list(sid)
    return [pattern.format(code) for pattern, code in zip(convention["level_token_patterns"], sid)]


def code_tokens(convention, catalog):
    """The tokens of all codes, level by level in code order."""
    codes = []
    used = [set(level) for level in zip(*(sid_tokens(convention, item["sid"]) for item in catalog))]
    for level, (pattern, count) in enumerate(zip(convention["level_token_patterns"], convention["level_code_counts"])):
        tokens = [pattern.format(code) for code in range(count)]
        if unknown := used[level] - set(tokens):
            raise SystemExit(f"level {level}: the catalog uses {sorted(unknown)[:3]}, outside {pattern} x {count}")
        codes += tokens if convention["codes_with_tokens"] == "all" else [t for t in tokens if t in used[level]]
    return codes


def word_level(special, codes):
    """A tokenizer with a WordLevel base of special tokens, and one added, non-special token per code.

    WordLevel needs no training and no text corpus: the vocabulary *is* the codebooks. Anything else in a prompt becomes <unk>."""
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({token: number for number, token in enumerate(special)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in codes])
    return tokenizer


def build_tokenizer(convention, catalog):
    """The tokenizer of a decoder: special tokens, then the codes."""
    from transformers import PreTrainedTokenizerFast

    special = ["<pad>", "<unk>", "<|endoftext|>"] + re.findall(r"<\|[^|]+\|>", convention["prompt_prefix"])
    special += [token_text(convention[field]) for field in ("item_begin_token", "item_end_token") if convention[field]]
    tokenizer = word_level(list(dict.fromkeys(special)), code_tokens(convention, catalog))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", unk_token="<unk>", eos_token="<|endoftext|>")

    for field in ("item_begin_token", "item_end_token", "generation_begin"):
        token = convention[field]
        if token and token["id"] != fast.convert_tokens_to_ids(token["text"]):
            raise SystemExit(f"{field}: the tokenizer gives {token['text']} the id {fast.convert_tokens_to_ids(token['text'])}, write that")
    for field in ("vocab_size", "tokenizer_size"):
        if convention[field] != len(fast):
            raise SystemExit(f"{field}: the tokenizer has {len(fast)} tokens, convention.json says {convention[field]}")
    return fast


class Writer:
    """Turns item ids into the token ids of a history, and says which of them are semantic-ID tokens (the ones that are learned)."""

    def __init__(self, tokenizer, convention, catalog):
        begin, end = convention["item_begin_token"], convention["item_end_token"]
        before, after = ([begin["id"]] if begin else []), ([end["id"]] if end else [])
        self.prefix = tokenizer(convention["prompt_prefix"], add_special_tokens=convention["add_special_tokens"])["input_ids"]
        self.item = {}
        for entry in catalog:
            self.item[entry["item_id"]] = before + tokenizer.convert_tokens_to_ids(sid_tokens(convention, entry["sid"])) + after
        levels = convention["levels"]
        self.level = [-1] * len(before) + list(range(levels)) + [-1] * len(after)

    def write(self, items):
        ids, levels = list(self.prefix), [-1] * len(self.prefix)
        for item in items:
            ids += self.item[item]
            levels += self.level
        return ids, levels
