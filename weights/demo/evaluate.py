#!/usr/bin/env python3
"""How good is the demo checkpoint? Recall@10 of the next item on held-out shoppers, beside what is trivial and what is possible.

    python3 weights/demo/world.py sequences --out weights/demo/build
    python3 weights/demo/evaluate.py                                   # needs torch and transformers; two to five minutes on one core

Protocol: shoppers the model never saw; everything but the last item is the history, the last item is the target. No item is
excluded, because shoppers do re-buy.

    model               exact trie-constrained beam search, beam 50, scores = sums of full-vocabulary log-probabilities (float32
                        network, float64 sums), equal scores in path order; items of one semantic ID in catalog order
    popularity          the 10 items most frequent in the training sequences
    repeat last         the 10 items seen last, newest first
    next-item counts    the 10 items that followed the history's last item most often in the training sequences
    oracle              the 10 items most probable under the world's true distribution given the history: nothing that sees only the
                        history does better on average. `expected` is its exact probability of a hit, free of the luck of these
                        targets.

The beam search here is written for clarity and shares no code with the engine.
"""

import argparse
import collections
import hashlib
import json
import math
import os
import sys
import time

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, HERE)
import world as demo  # noqa: E402


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class Trie:
    """Dense tables: child[node, token] is the node after the token, -1 if no item continues that way. Node 0 is the root."""

    def __init__(self, paths, vocab_size, torch):
        nodes = {(): 0}
        edges = []
        for path in paths:
            for k, token in enumerate(path):
                if path[: k + 1] not in nodes:
                    nodes[path[: k + 1]] = len(nodes)
                    edges.append((nodes[path[:k]], token, nodes[path[: k + 1]]))
        self.child = torch.full((len(nodes), vocab_size), -1)
        for parent, token, node in edges:
            self.child[parent, token] = node


def beam_search(model, trie, prompts, width, steps, torch):
    """Exact constrained beam search for prompts of one length. Returns tokens [users, width, steps] and scores [users, width];
    a score of -inf marks a place that no path fills."""
    users = len(prompts)
    with torch.no_grad():
        out = model(input_ids=torch.tensor(prompts), use_cache=True, logits_to_keep=1)
    cache = out.past_key_values
    scores = torch.zeros(users, 1, dtype=torch.float64)
    node = torch.zeros(users, 1, dtype=torch.long)
    tokens = torch.zeros(users, 1, 0, dtype=torch.long)
    log_p = out.logits[:, -1].double().log_softmax(-1).view(users, 1, -1)
    vocab = log_p.shape[-1]
    for step in range(steps):
        # A dead beam has score -inf and stays dead; its node is irrelevant, any will do.
        child = trie.child[node.clamp(min=0)]
        candidates = (scores[..., None] + log_p).masked_fill(child < 0, -math.inf).view(users, -1)
        # Beams are kept in path order, so position order is path order, and a stable sort breaks ties by the smaller path.
        best = candidates.sort(dim=-1, descending=True, stable=True).indices[:, :width]
        last = step == steps - 1
        if not last:
            best = best.sort(dim=-1).values
        parent, token = best // vocab, best % vocab
        scores = candidates.gather(1, best)
        node = child.view(users, -1).gather(1, best)
        tokens = torch.cat([tokens.gather(1, parent[..., None].expand(-1, -1, step)), token[..., None]], -1)
        if last:
            return tokens, scores
        rows = (torch.arange(users)[:, None] * log_p.shape[1] + parent).flatten()
        cache.reorder_cache(rows)
        with torch.no_grad():
            out = model(input_ids=token.flatten()[:, None], past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        log_p = out.logits[:, -1].double().log_softmax(-1).view(users, -1, vocab)


def model_lists(checkpoint, histories, width, count, threads):
    """The model's `count` best items for each history (lists of item ids)."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(threads)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    with open(os.path.join(checkpoint, "convention.json"), encoding="utf-8") as file:
        convention = json.load(file)
    catalog = read_lines(os.path.join(checkpoint, "catalog.jsonl"))
    begin = [convention["item_begin_token"]["id"]]
    path_of, items_of = {}, collections.defaultdict(list)
    for item in catalog:
        text = [pattern.format(code) for pattern, code in zip(convention["level_token_patterns"], item["sid"])]
        path = tuple(tokenizer.convert_tokens_to_ids(text))
        path_of[item["item_id"]] = path
        items_of[path].append(item["item_id"])
    trie = Trie(path_of.values(), model.config.vocab_size, torch)

    prompts = [[t for item in history for t in begin + list(path_of[item])] + begin for history in histories]
    by_length = collections.defaultdict(list)
    for number, prompt in enumerate(prompts):
        by_length[len(prompt)].append(number)
    lists, done, start = [None] * len(prompts), 0, time.time()
    for length in sorted(by_length):
        numbers = by_length[length]
        group = max(1, min(32, 6000 // length))
        for at in range(0, len(numbers), group):
            part = numbers[at : at + group]
            tokens, scores = beam_search(model, trie, [prompts[n] for n in part], width, convention["levels"], torch)
            for number, paths, values in zip(part, tokens.tolist(), scores.tolist()):
                found = [i for path, value in zip(paths, values) if value > -math.inf for i in items_of[tuple(path)]]
                lists[number] = found[:count]
            done += len(part)
        if done * 10 // len(prompts) > (done - len(numbers)) * 10 // len(prompts):
            print(f"  {done}/{len(prompts)} users, {time.time() - start:.0f} s", flush=True)
    return lists, sum(p.numel() for p in model.parameters())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", default=os.path.join(HERE, "checkpoint"))
    parser.add_argument("--sequences", default=os.path.join(HERE, "build"), help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--out", default=os.path.join(HERE, "results.json"))
    parser.add_argument("--users", type=int, default=4000)
    parser.add_argument("--beam", type=int, default=50)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()

    world = demo.World()
    oracle = demo.Oracle(world)
    test = [user["items"] for user in read_lines(os.path.join(args.sequences, "test.jsonl"))[: args.users]]
    histories, targets = [items[:-1] for items in test], [items[-1] for items in test]

    counts, follows = collections.Counter(), collections.defaultdict(collections.Counter)
    for user in read_lines(os.path.join(args.sequences, "train.jsonl")):
        counts.update(user["items"])
        for one, other in zip(user["items"], user["items"][1:]):
            follows[one][other] += 1
    popular = [item for item, _ in counts.most_common(10)]

    lists = {"popularity": [popular] * len(test)}
    lists["repeat last"] = [list(dict.fromkeys(reversed(history)))[:10] for history in histories]
    lists["next-item counts"] = [[item for item, _ in follows[history[-1]].most_common(10)] for history in histories]
    lists["model"], parameters = model_lists(args.checkpoint, histories, args.beam, 10, args.threads)
    lists["oracle"], expected = [], 0.0
    for history in histories:
        top, probability = oracle.best([world.item_number[item] for item in history], 10)
        lists["oracle"].append(world.ids(top))
        expected += probability / len(test)

    def scores(name):
        ranks = [found.index(target) for found, target in zip(lists[name], targets) if target in found]
        return {
            "recall@10": round(len(ranks) / len(test), 4),
            "recall@1": round(sum(rank == 0 for rank in ranks) / len(test), 4),
            "ndcg@10": round(sum(1 / math.log2(rank + 2) for rank in ranks) / len(test), 4),
        }

    with open(os.path.join(args.checkpoint, "model.safetensors"), "rb") as file:
        digest = hashlib.sha256(file.read()).hexdigest()
    table = {name: scores(name) for name in ("popularity", "repeat last", "next-item counts", "model", "oracle")}
    table["oracle"]["expected recall@10"] = round(expected, 4)
    result = {
        "command": "python3 weights/demo/evaluate.py" + "".join(f" {a}" for a in sys.argv[1:]),
        "users": len(test),
        "standard_error_of_recall_at_most": round(0.5 / math.sqrt(len(test)), 4),
        "beam": args.beam,
        "parameters": parameters,
        "model_safetensors_sha256": digest,
        "model_share_of_oracle_recall@10": round(table["model"]["recall@10"] / table["oracle"]["recall@10"], 4),
        "results": table,
    }
    with open(args.out, "w", encoding="utf-8", newline="\n") as file:
        json.dump(result, file, indent=1)
        file.write("\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
