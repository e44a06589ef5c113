#!/usr/bin/env python3
"""Does the server give the answers that transformers gives? A parity check for model authors.

Runs a checkpoint directory (config.json, safetensors, tokenizer, catalog.jsonl, convention.json) through transformers' own
`generate` in float32: beam search over an exact trie of the catalog with `prefix_allowed_tokens_fn`, and writes its answers:

    hf_reference.py DIR --requests requests.jsonl --out answers.jsonl

With --server it also asks a running `beamline serve --checkpoint DIR` the same questions and compares items and scores; the exit
status is 1 if any user differs by more than the tolerance:

    hf_reference.py DIR --requests requests.jsonl --out answers.jsonl --server http://127.0.0.1:8080

The convention is that of convention.json, presets and defaults included, or what --convention names, as for the server.

Requests, one a line: {"id", "user_id", "history": [item ids, or {"item_id": ...} objects, oldest first]}; other fields are
ignored. Answers, one a line: {"id", "user_id", "context_tokens", "truncated", "unknown_items", "paths", "scores", "items",
"wall_s"}: paths are token strings best first (lead and tail tokens included), scores are sums of full-vocabulary
log-probabilities, items lists per path the item ids that share it, in catalog order. Decoder-only checkpoints.

What has to be switched off for `generate` to be an exact constrained beam search, and is switched off here:
  sampling and penalties of generation_config.json, which would be picked up silently;
  length normalisation (length_penalty=0), so that a score is the plain sum;
  the end-of-sequence token: a tail token that happens to be EOS would end a hypothesis early, so none is declared and
    max_new_tokens fixes the length.
Beams that no catalog path fills carry scores of -1e9 or -inf inside `generate`; they are dropped from the answers.
Float32 rounding moves scores by about 1e-5, so neighbours closer than that may change places between two correct implementations.
"""

import argparse
import json
import os
import sys
import time
import urllib.request

PRESETS = os.path.join(
    os.path.dirname(os.path.abspath(__file__)), "..", "..", "crates", "model", "src", "convention", "presets.json"
)
# What the server takes where convention.json says nothing.
DEFAULTS = {
    "model": "decoder",
    "item_begin_token": None,
    "item_end_token": None,
    "item_separator": "",
    "prompt_prefix": "",
    "prompt_suffix": "",
    "generation_begin": None,
    "add_special_tokens": False,
    "lead_tokens": [],
    "tail_tokens": [],
    "max_history_items": None,
}


def read_lines(path):
    with open(path, encoding="utf-8-sig") as file:
        return [json.loads(line) for line in file if line.strip()]


def item_id(value):
    """An id is text; a whole number is its digits."""
    return str(value) if isinstance(value, int) else value


def text_of(token):
    """A token is its text, or {"text", "id"}."""
    return token["text"] if isinstance(token, dict) else token or ""


def convention_fields(directory, named=None):
    """The fields of a convention, a preset's and the defaults filled in. `named`: a file or a preset instead of
    convention.json."""
    presets = {}
    if os.path.isfile(PRESETS):
        with open(PRESETS, encoding="utf-8") as file:
            presets = json.load(file)
    if named in presets:
        fields = {"preset": named}
    else:
        with open(named or os.path.join(directory, "convention.json"), encoding="utf-8-sig") as file:
            fields = json.load(file)
    name = fields.pop("preset", None)
    if name is not None and name not in presets:
        known = ", ".join(presets) or f"none: {os.path.normpath(PRESETS)} is not there; run the tool from a clone"
        raise SystemExit(f"unknown preset {name!r}; known are {known}")
    return {**DEFAULTS, **presets.get(name, {}), **fields}


class Convention:
    """convention.json applied: items as text, prompts as text."""

    def __init__(self, directory, named=None):
        self.fields = convention_fields(directory, named)
        if self.fields["model"] != "decoder":
            raise SystemExit("decoder-only checkpoints only")
        self.steps = len(self.fields["lead_tokens"]) + self.fields["levels"] + len(self.fields["tail_tokens"])

    def sid_tokens(self, sid):
        if all(isinstance(code, str) for code in sid):
            return list(sid)
        return [pattern.format(code) for pattern, code in zip(self.fields["level_token_patterns"], sid)]

    def fixed(self, kind, tokenizer):
        """Ids of the lead or tail tokens."""
        return [token_id(token, tokenizer) for token in self.fields[f"{kind}_tokens"]]

    def newest(self, items):
        """The items that the model was trained to look at."""
        most = self.fields["max_history_items"]
        return items[-most:] if most else items

    def prompt(self, sids):
        f = self.fields
        items = [text_of(f["item_begin_token"]) + "".join(self.sid_tokens(sid)) + text_of(f["item_end_token"]) for sid in sids]
        return f["prompt_prefix"] + f["item_separator"].join(items) + f["prompt_suffix"] + text_of(f["generation_begin"])


def token_id(token, tokenizer):
    """The id of a single token. A newline has another name in byte-level tokenizers, so what it is tokenised to counts."""
    text = text_of(token)
    found = tokenizer.get_vocab().get(text)
    if found is None:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        found = ids[0] if len(ids) == 1 and tokenizer.decode(ids) == text else None
    if found is None:
        raise SystemExit(f"{text!r} is not a single token of the tokenizer")
    if isinstance(token, dict) and token.get("id", found) != found:
        raise SystemExit(f"{text!r} has id {found} in the tokenizer, not {token['id']}")
    return found


def exact_trie(paths):
    """Allowed next tokens of every prefix of every path."""
    allowed = {}
    for path in paths:
        for k, token in enumerate(path):
            allowed.setdefault(path[:k], set()).add(token)
    return {prefix: sorted(tokens) for prefix, tokens in allowed.items()}


class Reference:
    def __init__(self, directory, beam_width, threads, convention=None):
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        self.torch = torch
        self.width = beam_width
        self.convention = Convention(directory, convention)
        self.tokenizer = AutoTokenizer.from_pretrained(directory)
        self.model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
        neutral = {"eos_token_id": None, "bos_token_id": None, "pad_token_id": 0}
        self.model.generation_config = GenerationConfig(**neutral)
        self.generation = GenerationConfig(
            num_beams=beam_width,
            num_return_sequences=beam_width,
            do_sample=False,
            length_penalty=0.0,
            early_stopping=False,
            max_new_tokens=self.convention.steps,
            return_dict_in_generate=True,
            output_scores=True,
            **neutral,
        )
        lead, tail = (self.convention.fixed(kind, self.tokenizer) for kind in ("lead", "tail"))
        self.sid_of, self.items_of = {}, {}
        for item in read_lines(os.path.join(directory, "catalog.jsonl")):
            name, tokens = item_id(item["item_id"]), self.convention.sid_tokens(item["sid"])
            ids = self.tokenizer.convert_tokens_to_ids(tokens)
            if None in ids or self.tokenizer.unk_token_id in ids:
                raise SystemExit(f"{name}: the tokenizer lacks one of {tokens}")
            self.sid_of[name] = item["sid"]
            self.items_of.setdefault(tuple(lead + ids + tail), []).append(name)
        self.allowed = exact_trie(self.items_of)

    def prompt_ids(self, history):
        text = self.convention.prompt([self.sid_of[item] for item in history])
        return self.tokenizer(text, add_special_tokens=self.convention.fields["add_special_tokens"])["input_ids"]

    def answer(self, request):
        history = [item_id(event["item_id"] if isinstance(event, dict) else event) for event in request["history"]]
        known = [item for item in history if item in self.sid_of]
        room = self.model.config.max_position_embeddings - self.convention.steps
        kept = self.convention.newest(known)
        while len(ids := self.prompt_ids(kept)) > room:
            kept = kept[1:]
        length = len(ids)

        def allowed(_, sequence):
            # Beams outside the catalog exist only with score -inf; they need some token, any will do.
            return self.allowed.get(tuple(sequence[length:].tolist()), [0])

        start = time.perf_counter()
        out = self.model.generate(
            self.torch.tensor([ids]),
            attention_mask=self.torch.ones(1, length, dtype=self.torch.long),
            generation_config=self.generation,
            prefix_allowed_tokens_fn=allowed,
        )
        wall = time.perf_counter() - start
        found = []
        for path, score in zip(out.sequences[:, length:].tolist(), out.sequences_scores.tolist()):
            if score > -1e6:
                assert tuple(path) in self.items_of, f"{path} is not in the catalog"
                found.append((tuple(path), score))
        assert len({path for path, _ in found}) == len(found)
        return {
            "id": request.get("id"),
            "user_id": request.get("user_id"),
            "context_tokens": length,
            "truncated": len(kept) < len(known),
            "unknown_items": [item for item in history if item not in self.sid_of],
            "paths": [self.tokenizer.convert_ids_to_tokens(list(path)) for path, _ in found],
            "scores": [score for _, score in found],
            "items": [self.items_of[path] for path, _ in found],
            "wall_s": round(wall, 4),
        }


def ask_server(url, request, beam_width):
    body = {
        "user_id": request.get("user_id"),
        "history": [event if isinstance(event, dict) else {"item_id": item_id(event)} for event in request["history"]],
        "num_items": beam_width,
        "beam_width": beam_width,
        "normalization": "full_vocab",
    }
    call = urllib.request.Request(
        url.rstrip("/") + "/v1/recommend", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(call, timeout=60) as reply:
        return json.load(reply)["items"]


def compare(answer, served, tolerance):
    """What is wrong with the served list, as a list of sentences; empty if it agrees.

    Compared are scores and membership, not positions inside a near tie: an item whose score is within the tolerance of the
    last one kept may be on one side of the cut here and on the other side there.
    """
    complaints = []
    expected = {item: score for items, score in zip(answer["items"], answer["scores"]) for item in items}
    reference_end = answer["scores"][-1] if answer["scores"] else 0.0
    if not served:
        return ["the server returned nothing"] if expected else []
    served_end = served[-1]["score"]
    for one, other in zip(served, served[1:]):
        if other["score"] > one["score"]:
            complaints.append(f"{other['item_id']} is listed after {one['item_id']}, which scores less")
    for item in served:
        score = expected.get(item["item_id"])
        if score is None and item["score"] > reference_end + tolerance:
            complaints.append(f"{item['item_id']} ({item['score']:.6f}) is not in the reference list")
        elif score is not None and abs(score - item["score"]) > tolerance:
            complaints.append(f"{item['item_id']}: score {item['score']:.6f}, reference {score:.6f}")
    listed = {item["item_id"] for item in served}
    for items, score in zip(answer["items"], answer["scores"]):
        # A collision policy may list one item of a path or all.
        if score > served_end + tolerance and not listed & set(items):
            complaints.append(f"{items[0]} ({score:.6f}) is missing")
    return complaints


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--requests", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--convention", help="a file or a preset (default: convention.json of the checkpoint)")
    parser.add_argument("--beam-width", type=int, default=50)
    parser.add_argument("--limit", type=int, help="first requests of the file only")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--server", help="a running server to compare with, e.g. http://127.0.0.1:8080")
    parser.add_argument(
        "--tolerance", type=float, default=2e-4, help="of a score, for a server computing in float32 (default %(default)s)"
    )
    args = parser.parse_args()

    reference = Reference(args.checkpoint, args.beam_width, args.threads, args.convention)
    requests = read_lines(args.requests)[: args.limit]
    differing, walls = 0, []
    with open(args.out, "w", encoding="utf-8") as out:
        for request in requests:
            answer = reference.answer(request)
            walls.append(answer["wall_s"])
            if args.server:
                complaints = compare(answer, ask_server(args.server, request, args.beam_width), args.tolerance)
                answer["complaints"] = complaints
                differing += bool(complaints)
                for complaint in complaints[:3]:
                    print(f"{answer['user_id'] or answer['id']}: {complaint}")
            out.write(json.dumps(answer, ensure_ascii=False) + "\n")
    walls.sort()
    print(f"{len(requests)} requests, generate took {walls[len(walls) // 2] * 1000:.0f} ms at the median")
    if args.server:
        print(f"{differing} of {len(requests)} differ by more than {args.tolerance}")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    try:
        main()
    except BrokenPipeError:
        # Who reads the output has seen enough.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
