"""What the scripts of this folder share: the prompts, the trie of a catalog, the clock, and the line they print."""
import json
import pathlib
import statistics
import time

LEVELS = "abc"


def read_prompts(path):
    """The visits of a prompt file, in order."""
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def first_codes(tokenizer):
    """The token id of code 0 of every level; the codes of a level have consecutive ids."""
    return [tokenizer.convert_tokens_to_ids(f"<s_{level}_0>") for level in LEVELS]


def read_trie(checkpoint, tokenizer):
    """Prefix of token ids -> sorted allowed next ids; and path of three token ids -> item id."""
    first = first_codes(tokenizer)
    allowed, items = {}, {}
    with open(pathlib.Path(checkpoint) / "catalog.jsonl", encoding="utf-8") as lines:
        for line in lines:
            item = json.loads(line)
            path = tuple(start + code for start, code in zip(first, item["sid"]))
            items.setdefault(path, item["item_id"])
            for depth in range(len(path)):
                allowed.setdefault(path[:depth], set()).add(path[depth])
    return {prefix: sorted(tokens) for prefix, tokens in allowed.items()}, items


def timed(call):
    """What a call returns, and how many seconds it took."""
    start = time.perf_counter()
    result = call()
    return result, time.perf_counter() - start


def report(peer, visits, beams, prompt_tokens):
    """Prints one JSON line. `visits` are pairs (number of the user's visit, seconds); 0 is a first visit."""
    def median(times):
        return round(statistics.median(times), 2) if times else None

    print(json.dumps({
        "peer": peer,
        "beams": beams,
        "cold_ms": median([seconds * 1e3 for visit, seconds in visits if visit == 0]),
        "warm_ms": median([seconds * 1e3 for visit, seconds in visits if visit > 0]),
        "requests": len(visits),
        "prompt_tokens": prompt_tokens,
    }))
