#!/usr/bin/env python3
"""Semantic IDs from HSTU layers, decoded the plain way: the answers that a server of the same directory has to give.

    reference.py DIR --requests requests.jsonl --out answers.jsonl

No cache and no shared rows: for every beam and every step the whole sequence `context | tokens of the beam` goes through the model, in double
precision. Each event is one row per level, all with the event's action and time; a generated token carries the action `input.actions.generated`
and the time of the query, which is also the time that the last row reads. Exact constrained beam search: a beam is expanded by exactly
the tokens that lead to an item the filter allows, and the best `beam_width` of all expansions survive; equal scores go to the smaller token path. A
score is the sum of log-probabilities over the levels,

    full_vocab    log-softmax over every row of the head
    allowed_set   softmax over the tokens that the beam may be expanded by

In, one JSON object a line: the body of POST /v1/recommend (history, query_time, num_items, beam_width, normalization, filters.exclude_items), or of
POST /v1/rank (history, query_time, candidates, normalization). Other fields are an error.
Out, one line each: {"items": [{"item_id", "score"}]}, items of one leaf in the order of the catalog; or {"log_probabilities": [...]}, of each
candidate, in the order of the request.

A ranking is the same sum along the candidate's path. Under `allowed_set` there are two readings: relative to all items of the catalog
(`log_probabilities`), or to the candidates alone, as a search that is restricted to them computes it (`among_candidates`). Both are written.
"""

import argparse

import torch
from directory import read, read_lines, write_lines

RECOMMEND = {"id", "user_id", "history", "query_time", "num_items", "beam_width", "normalization", "filters"}
RANK = {"id", "user_id", "history", "query_time", "candidates", "normalization"}


class Reference:
    """A directory with a token head."""

    def __init__(self, path, dtype=torch.float64):
        self.model, self.catalog = read(path, dtype)
        self.entry, self.head = self.model.config["input"], self.model.config["output"]["head"]
        if self.head["kind"] != "tokens":
            raise SystemExit(f"{path}: a head of {self.head['kind']}; only one of tokens is decoded")
        first = [level["first_token"] for level in self.head["semantic_id_levels"]]
        self.levels = len(first)
        self.path = {line["item_id"]: tuple(start + code for start, code in zip(first, line["sid"], strict=True)) for line in self.catalog}
        self.smallest_gap = float("inf")

    def context(self, request):
        """(tokens, actions or None, times of all rows) of a history; the oldest events go if there are too many."""
        events = [event for event in request["history"] if event["item_id"] in self.path]
        most = self.entry["max_sequence_length"] // self.levels
        events = events[-most:]
        tokens = [token for event in events for token in self.path[event["item_id"]]]
        times = [event["timestamp"] for event in events for _ in range(self.levels)]
        actions = [int(event["action"]) for event in events for _ in range(self.levels)] if self.entry["actions"] else None
        return tokens, actions, times

    @torch.no_grad()
    def logits(self, context, beams, query_time):
        """[beams, vocab_size] after `context | tokens of the beam`, each beam on its own; beams are equally long."""
        tokens, actions, times = context
        depth, found = len(beams[0]), []
        moments = torch.tensor([times + [query_time] * (depth + 1)])
        done = None if actions is None else torch.tensor([actions + [self.entry["actions"]["generated"]] * depth])
        for beam in beams:
            states = self.model(torch.tensor([tokens + list(beam)]), moments, done)
            found.append(self.model.token_logits(states[0, -1]))
        return torch.stack(found)

    def recommend(self, request):
        """[{"item_id", "score"}], best first."""
        refuse_unknown(request, RECOMMEND)
        excluded = set(request.get("filters", {}).get("exclude_items", []))
        allowed = {path for item, path in self.path.items() if item not in excluded}
        width = request.get("beam_width", 50)
        found = self.search(request, allowed, width)
        slate = []
        for path, score in found:
            items = [line["item_id"] for line in self.catalog if self.path[line["item_id"]] == path]
            slate += [{"item_id": item, "score": score} for item in items if item not in excluded]
        return slate[: request.get("num_items", 10)]

    def search(self, request, allowed, width):
        """[(path, score)] of at most `width` of the `allowed` paths, best first. `smallest_gap` becomes the smallest difference of scores that
        decided anything: who survived, or who comes first."""
        context, beams = self.context(request), [((), 0.0)]
        normalization = request.get("normalization", "full_vocab")
        self.smallest_gap = float("inf")
        for level in range(self.levels):
            if not beams:
                break
            logits, expanded = self.logits(context, [path for path, _ in beams], request["query_time"]), []
            for (path, score), row in zip(beams, logits):
                following = sorted({other[level] for other in allowed if other[:level] == path})
                step = row.log_softmax(-1)[following] if normalization == "full_vocab" else row[following].log_softmax(-1)
                expanded += [(path + (token,), score + gain) for token, gain in zip(following, step.tolist())]
            expanded.sort(key=lambda beam: (-beam[1], beam[0]))
            ends = [(one, next_one) for one, next_one in zip(expanded, expanded[1:])]
            decided = ends if level == self.levels - 1 else ends[width - 1 : width]
            self.smallest_gap = min([self.smallest_gap] + [one[1] - next_one[1] for one, next_one in decided[:width]])
            beams = expanded[:width]
        return beams

    def rank(self, request):
        """{"log_probabilities"} of the candidates, and under `allowed_set` also {"among_candidates"}."""
        refuse_unknown(request, RANK)
        wanted = [self.path[candidate["item_id"]] for candidate in request["candidates"]]
        # As wide as there are paths: nothing is pruned.
        scores = dict(self.search(request, set(self.path.values()), len(self.path)))
        answer = {"log_probabilities": [scores[path] for path in wanted]}
        if request.get("normalization") == "allowed_set":
            scores = dict(self.search(request, set(wanted), len(wanted)))
            answer["among_candidates"] = [scores[path] for path in wanted]
        return answer


def refuse_unknown(request, known):
    fields = set(request) - known | set(request.get("filters", {})) - {"exclude_items"}
    if fields:
        raise SystemExit(f"the reference does not know {', '.join(sorted(fields))}")


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--requests", required=True)
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", choices=("float64", "float32"), default="float64", help="(default %(default)s)")
    options = parser.parse_args(arguments)
    reference = Reference(options.directory, getattr(torch, options.dtype))
    answers = [reference.rank(request) if "candidates" in request else {"items": reference.recommend(request)} for request in read_lines(options.requests)]
    write_lines(options.out, answers)
    print(f"{len(answers)} answers -> {options.out}")


if __name__ == "__main__":
    main()
