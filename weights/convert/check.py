#!/usr/bin/env python3
"""Does a converted directory compute what the training code computed?

    check.py DIR --against FILE

FILE is a safetensors file of inputs `in.*` and outputs `out.*` that the training code wrote; DIR holds config.json and
safetensors. The inputs are run through `forward.py`, in double precision, from DIR alone, and every output that is known here
is compared. Users lie one after the other in `in.*` without padding unless said otherwise.

    any       in.x [rows, width], in.lengths [users], in.num_targets [users]: the layers alone   out.layer{l}, out.y [rows, width]
    research  in.past_ids, in.timestamps [users, N] (the query's time follows the last event), in.past_lengths [users]
              out.layer{l}.jagged, out.layer{l}.rel_attn_bias, out.seq_embeddings, out.current_embeddings,
              out.item_embeddings_l2, out.scores, out.topk_ids_filtered, out.topk_scores_filtered (what the user has seen is
              left out); several sets as in.a.past_ids, out.a.scores
    dlrm      in.uih_lengths_per_user, in.num_candidates [users]; of events in.uih.{feature}, in.uih.action_ts, in.uih.action_weight; of
              users in.uih.{feature} with in.uih_len.{feature}; of candidates in.cand.item_{feature}, in.cand.item_query_time
              out.preprocessor.embeddings, out.position, out.stu, out.user_embeddings, out.item_embeddings, out.preds [tasks,
              candidates]
    nvidia    in.num_events, in.num_candidates [users], in.items, in.actions, in.candidates, in.contextual.{feature} with
              in.contextual_len.{feature}   out.layer{l}, out.logits, out.preds [candidates, outputs]

Outputs that are not compared are listed, never counted as agreement. The tolerance (of a difference, over 1 + the expected
number) follows from the type of the outputs: 1e-9 in double precision, 5e-5 in single, 3e-2 in half; the other type's accuracy
is what it measures, so outputs in double precision are worth having. The exit status is 1 if anything differs or nothing was
compared. """

import argparse
import re

import numpy as np
from safetensors import safe_open

from forward import Model

TOLERANCES = {"torch.float64": 1e-9, "torch.float32": 5e-5, "torch.float16": 3e-2, "torch.bfloat16": 3e-2}


class Check:
    """Stated inputs and outputs, and what was compared with them."""

    def __init__(self, model, path, tolerance=None):
        self.model, self.tolerance = model, tolerance
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys() if name.startswith(("in.", "out."))}
        self.types = {name: str(tensor.dtype) for name, tensor in tensors.items()}
        self.values = {
            name: (tensor.double() if tensor.is_floating_point() else tensor).numpy() for name, tensor in tensors.items()
        }
        self.compared, self.complaints = {}, []

    def __contains__(self, name):
        return name in self.values

    def of(self, name):
        if name not in self.values:
            raise SystemExit(f"the file to check against has no {name}")
        return self.values[name]

    def allowed(self, name):
        return self.tolerance or TOLERANCES.get(self.types[name], 0.0)

    def compare(self, name, found, rows=None):
        """`rows` selects what of the stated output is meant to be compared."""
        if name not in self.values:
            return
        expected = self.values[name] if rows is None else self.values[name][rows]
        if found.shape != expected.shape:
            self.compared[name] = np.inf
            self.complaints.append(f"{name}: shape {list(found.shape)}, stated {list(expected.shape)}")
            return
        difference = np.abs(found - expected) / (1 + np.abs(expected))
        worst = float(difference.max()) if difference.size else 0.0
        self.compared[name] = max(worst, self.compared.get(name, 0.0))
        if not worst <= self.allowed(name):
            self.complaints.append(f"{name}: differs by {worst:.3g}, allowed {self.allowed(name):.3g}")

    def layers(self, prefix, after, suffix=""):
        for layer, rows in enumerate(zip(*after)):
            self.compare(f"{prefix}layer{layer}{suffix}", np.concatenate(rows))

    def report(self):
        for name, worst in self.compared.items():
            print(f"  {name}: within {worst:.3g}")
        left = [name for name in self.values if name.startswith("out.") and name not in self.compared]
        if left:
            print(f"  not compared: {', '.join(sorted(left))}")
        if not self.compared:
            self.complaints.append("nothing was compared")
        for complaint in self.complaints:
            print(f"  DIFFERENT {complaint}")
        return not self.complaints


def split(values, lengths):
    return np.split(values, np.cumsum(lengths)[:-1])


def check_layers(check):
    """The layers alone, of any variant without relative bias."""
    if check.model.stack["relative_bias"]:
        raise SystemExit("in.x: layers with a relative bias need times, give in.past_ids")
    users = zip(split(check.of("in.x"), check.of("in.lengths")), check.of("in.num_targets"))
    after = [check.model.layers(x, int(targets)) for x, targets in users]
    check.layers("out.", after)
    check.compare("out.y", np.concatenate([layers[-1] for layers in after]))


def check_research(check, stage):
    model = check.model
    ids, times, lengths = (check.of(f"in.{stage}{name}") for name in ("past_ids", "timestamps", "past_lengths"))
    after, last = [], []
    for user, n in enumerate(lengths):
        # The query's time follows the last event; in the last position of all it stands for itself.
        moments = times[user][np.minimum(np.arange(n + 1), times.shape[1] - 1)]
        layers = model.layers(model.research_rows(ids[user][:n]), 0, moments)
        final = model.normalized(layers[-1], model.output["normalization"])
        for layer in range(len(layers)):
            if model.stack["relative_bias"]:
                seen = np.tril_indices(n)
                rows = (user, *seen)
                check.compare(f"out.{stage}layer{layer}.rel_attn_bias", model.relative_bias(layer, moments)[seen], rows)
        check.compare(f"out.{stage}seq_embeddings", final, (user, slice(0, n)))
        after.append(layers)
        last.append(final[-1])
    check.layers(f"out.{stage}", after, ".jagged")
    users, items = np.stack(last), model.items()
    check.compare(f"out.{stage}current_embeddings", users)
    check.compare(f"out.{stage}item_embeddings_l2", items)
    scores = users @ items.T
    check.compare(f"out.{stage}scores", scores)
    if f"out.{stage}topk_ids_filtered" in check:
        check_top(check, stage, scores, ids, lengths)


def check_top(check, stage, scores, ids, lengths):
    """The best unseen items, best first; items closer than the tolerance may change places."""
    name, scored = f"out.{stage}topk_ids_filtered", f"out.{stage}topk_scores_filtered"
    stated, worst = check.of(name), 0.0
    best = np.empty(stated.shape)
    for user, n in enumerate(lengths):
        unseen = scores[user].copy()
        unseen[ids[user][:n] - 1] = -np.inf
        best[user] = -np.sort(-unseen)[: stated.shape[1]]
        worst = max(worst, float(np.abs(best[user] - unseen[stated[user] - 1]).max()))
        if len(set(stated[user].tolist())) < stated.shape[1]:
            worst = np.inf
    check.compared[name] = worst
    allowed = 2 * check.allowed(scored) if scored in check else TOLERANCES["torch.float32"]
    if not worst <= allowed:
        check.complaints.append(f"{name}: other items; the stated ones are worse by up to {worst:.3g}")
    check.compare(scored, best)


def check_dlrm(check):
    model = check.model
    lengths, counts = check.of("in.uih_lengths_per_user"), check.of("in.num_candidates")
    event = lambda name: split(check.of(f"in.uih.{name}"), lengths)  # noqa: E731
    candidate = lambda name: split(check.of(f"in.cand.{name}"), counts)  # noqa: E731
    of_user = {
        f["name"]: split(check.of(f"in.uih.{f['name']}"), check.of(f"in.uih_len.{f['name']}")) for f in model.input["contextual"]
    }
    names = [feature["name"] for feature in model.input["features"]]
    events, candidates = ({name: read(prefix + name) for name in names} for read, prefix in ((event, ""), (candidate, "item_")))
    before, embedded, after, users, items = [], [], [], [], []
    for user, count in enumerate(counts):
        asked = candidate("item_query_time")[user]
        times = np.concatenate([event("action_ts")[user], asked])
        both = {name: np.concatenate([events[name][user], candidates[name][user]]) for name in names}
        contextual = {name: values[user] for name, values in of_user.items()}
        x, positioned = model.dlrm_rows(both, event("action_weight")[user], times, contextual, int(count))
        before.append(x)
        embedded.append(positioned)
        layers = model.layers(positioned, int(count))
        after.append(layers[-1])
        users.append(model.dlrm_users(layers[-1][len(positioned) - count :], asked))
        items.append(model.dlrm_items({name: candidates[name][user] for name in names}))
    users, items = np.concatenate(users), np.concatenate(items)
    for name, found in (
        ("preprocessor.embeddings", np.concatenate(before)),
        ("position", np.concatenate(embedded)),
        ("stu", np.concatenate(after)),
    ):
        check.compare(f"out.{name}", found)
    check.compare("out.user_embeddings", users)
    check.compare("out.item_embeddings", items)
    check.compare("out.preds", model.dlrm_predictions(users, items).T)


def check_nvidia(check):
    model = check.model
    lengths, counts = check.of("in.num_events"), check.of("in.num_candidates")
    items, candidates = split(check.of("in.items"), lengths), split(check.of("in.candidates"), counts)
    actions = split(check.of("in.actions"), lengths) if model.input["action_table"] is not None else items
    names = [feature["name"] for feature in model.input["contextual"]]
    of_user = {name: split(check.of(f"in.contextual.{name}"), check.of(f"in.contextual_len.{name}")) for name in names}
    after, states = [], []
    for user, count in enumerate(counts):
        x = model.nvidia_rows({name: of_user[name][user] for name in names}, items[user], actions[user], candidates[user])
        after.append(model.layers(x, int(count)))
        states.append(after[-1][-1][len(x) - count :])
    check.layers("out.", after)
    logits = model.nvidia_logits(np.concatenate(states))
    check.compare("out.logits", logits)
    check.compare("out.preds", model.nvidia_predictions(logits))


def run(directory, against, tolerance=None):
    """Whether all that is known of the stated outputs agrees; prints what was compared."""
    check = Check(Model(directory), against, tolerance)
    print(f"{directory} against {against}:")
    if "in.x" in check:
        check_layers(check)
    if check.model.variant == "research":
        stages = [found[1] for found in (re.fullmatch(r"in\.(.*)past_ids", name) for name in check.values) if found]
        for stage in sorted(stages):
            check_research(check, stage)
    elif check.model.variant == "dlrm" and "in.num_candidates" in check:
        check_dlrm(check)
    elif check.model.variant == "nvidia" and "in.num_candidates" in check:
        check_nvidia(check)
    return check.report()


def add_options(parser):
    """What the converters have in common with this tool."""
    parser.add_argument("--check", metavar="FILE", help="compare the result with stated inputs and outputs: see check.py")
    parser.add_argument("--tolerance", type=float, help="for --check")


def after_conversion(options):
    if options.check and not run(options.out, options.check, options.tolerance):
        raise SystemExit(1)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory")
    parser.add_argument("--against", required=True)
    parser.add_argument("--tolerance", type=float)
    options = parser.parse_args(arguments)
    if not run(options.directory, options.against, options.tolerance):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
