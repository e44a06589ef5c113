#!/usr/bin/env python3
"""Train an HSTU on what `prepare.py` wrote, to a directory that `beamline serve --checkpoint` takes as it is.

    train.py --data build/ml-100k --out build/hstu
    train.py --data build/ml-100k --semantic-ids build/sids.json --out build/hstu-tokens

Without `--semantic-ids` every event is one row and the next item is predicted: softmax of cosine similarities over all items,
or over sampled ones (`--negatives`). With it (a JSON object {item id: codes}, one code a level, see semantic_ids.py) every
event is one row per level and the next token is predicted; the catalog then holds the codes. Row i always reads the time of row
i + 1: the model knows when it is asked. If the data has actions, each event's is added to its rows, and `--hide-actions` of the
events carry action 0 instead, the one that generated rows carry.

The best state on the validation users (NDCG@10 by full ranking, items of the history not excluded) is what is written. One pass
over the training part is an epoch. Everything follows from `--seed`: after every epoch the state of training goes to
OUT.training.pt, the same command goes on from there, and ends where an uninterrupted run would have. Delete that file when
done. """

import argparse
import json
import os
import sys
import time

import torch

from config import items_head, research_config, tokens_head
from directory import read_lines, write
from evaluate import metrics, slates
from losses import item_loss, token_loss
from model import Hstu
from sequences import Spelling, batches, padded

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import training as common  # noqa: E402

# Up to this many items, a softmax over all of them costs less than it gives.
MANY_ITEMS = 20_000
GENERATED = 0


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True, help="folder of prepare.py")
    add("--out", required=True)
    add("--semantic-ids", metavar="FILE", help="train the token head on these codes")
    add("--max-events", type=int, default=200, help="longest history (default %(default)s)")
    add("--model-dim", type=int, default=64, help="(default %(default)s)")
    add("--layers", type=int, default=2, help="(default %(default)s)")
    add("--heads", type=int, default=2, help="(default %(default)s)")
    add("--key-dim", type=int, default=32, help="of a head (default %(default)s)")
    add("--value-dim", type=int, default=32, help="of a head (default %(default)s)")
    add("--dropout", type=float, default=0.3, help="of input rows and of layers' outputs (default %(default)s)")
    add("--temperature", type=float, default=0.05, help="(default %(default)s)")
    add(
        "--negatives",
        type=int,
        help=f"items drawn for the softmax, 0 for all (default: all up to {MANY_ITEMS:,} items, else 512)",
    )
    add("--tied", action="store_true", help="token head: predict with the rows of the input table instead of own ones")
    add(
        "--hide-actions",
        type=float,
        default=0.5,
        help="token head: share of events whose action is hidden while training (default %(default)s)",
    )
    add("--epochs", type=int, default=60, help="(default %(default)s)")
    add("--batch-rows", type=int, default=3000, help="rows of a step (default %(default)s)")
    add("--lr", type=float, default=2e-3, help="highest learning rate (default %(default)s)")
    add("--weight-decay", type=float, default=0.0, help="(default %(default)s)")
    add("--validate-every", type=int, default=3, help="epochs (default %(default)s)")
    add("--validate-users", type=int, default=1000, help="evenly spaced (default %(default)s)")
    add("--beam-width", type=int, default=50, help="token head: beams of the validation (default %(default)s)")
    add("--seed", type=int, default=1, help="(default %(default)s)")
    add("--threads", type=int, default=1, help="(default %(default)s)")
    add("--stop-after", type=int, metavar="EPOCHS", help="end this run early; the same command without it goes on")
    return parser.parse_args(given)


def with_semantic_ids(catalog, path):
    """The catalog in codes, and how many codes each level has."""
    with open(path, encoding="utf-8") as file:
        sids = json.load(file)
    if missing := [line["item_id"] for line in catalog if line["item_id"] not in sids]:
        raise SystemExit(f"{path} lacks {len(missing)} items of the catalog, such as {missing[:3]}")
    lines = [{**line, "sid": sids[line["item_id"]]} for line in catalog]
    for line in lines:
        if len(line["sid"]) != len(lines[0]["sid"]) or not all(type(code) is int and code >= 0 for code in line["sid"]):
            wanted = f"a whole number from 0 on for each of {len(lines[0]['sid'])} levels"
            raise SystemExit(f"{path}: {line['item_id']} has {line['sid']}; every item needs {wanted}")
    return lines, [max(level) + 1 for level in zip(*(line["sid"] for line in lines))]


def made_config(options, catalog, codes, actions):
    """`codes`: of each level, or None for an item head; `actions`: rows of the action table, or None."""
    levels = len(codes) if codes else 1
    head = tokens_head(codes, 1 / options.temperature, options.tied) if codes else items_head()
    rows = options.max_events * levels
    return research_config(
        model_dim=options.model_dim, layers=options.layers, heads=options.heads, key_dim=options.key_dim, value_dim=options.value_dim,
        num_items=sum(codes) if codes else max(line["sid"][0] for line in catalog), max_sequence_length=rows, positions=rows + levels, head=head,
        actions={"count": actions, "generated": GENERATED} if actions else None,
    )  # fmt: skip


class Training:
    """A model, its optimizer, and how far it is."""

    def __init__(self, options):
        self.options, self.path = options, options.out.rstrip("/") + ".training.pt"
        self.lines, catalog = (read_lines(os.path.join(options.data, name)) for name in ("train.jsonl", "catalog.jsonl"))
        self.lines = [line for line in self.lines if len(line["items"]) > 1]
        validation = read_lines(os.path.join(options.data, "validation.jsonl"))
        self.validation = common.even(validation, options.validate_users)
        self.catalog, codes = with_semantic_ids(catalog, options.semantic_ids) if options.semantic_ids else (catalog, None)
        known = [action for line in self.lines + validation for action in line.get("actions", [])]
        torch.manual_seed(options.seed)
        self.model = Hstu(made_config(options, self.catalog, codes, max(known) + 1 if known else None), options.dropout)
        self.spelling, self.tokens = Spelling(self.model.config, self.catalog), codes is not None
        self.negatives = options.negatives if options.negatives is not None else 0 if len(catalog) <= MANY_ITEMS else 512
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=options.lr, betas=(0.9, 0.98), weight_decay=options.weight_decay
        )
        self.epoch, self.seconds, self.best, self.history = 0, 0.0, None, []

    def settings(self):
        """What a state belongs to: all options but those that do not change the result."""
        return {name: value for name, value in vars(self.options).items() if name not in ("stop_after", "threads", "out")}

    def save(self):
        state = {"settings": self.settings(), "model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state | {name: getattr(self, name) for name in ("epoch", "seconds", "best", "history")}, self.path + ".new")
        os.replace(self.path + ".new", self.path)

    def resume(self):
        if not os.path.exists(self.path):
            return
        state = torch.load(self.path, weights_only=True)
        if state["settings"] != self.settings():
            changed = sorted(name for name, value in self.settings().items() if state["settings"].get(name, ()) != value)
            raise SystemExit(f"{self.path} is of a run with other settings ({', '.join(changed)}): delete it to begin anew")
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("epoch", "seconds", "best", "history"):
            setattr(self, name, state[name])
        print(f"going on after epoch {self.epoch}", flush=True)

    def loss(self, batch):
        ids, times, actions, targets = padded(batch, self.spelling)
        learned = targets > 0
        states = self.model(ids, times, actions)[learned]
        if self.tokens:
            return token_loss(self.model, states, targets[learned])
        return item_loss(self.model, states, targets[learned], self.options.temperature, self.negatives)

    def rate(self, done):
        """Of `done` in 0 to 1: a short warm-up, then half a cosine down to a twentieth."""
        return self.options.lr * min(1.0, done / 0.02 + 0.02) * common.cosine(done, 0.05)

    def run_epoch(self):
        """One pass; the mean loss of its steps."""
        seed = self.options.seed * 1_000_003 + self.epoch
        torch.manual_seed(seed)
        hidden = self.options.hide_actions if self.tokens else 0.0
        plan, total = batches(self.lines, self.spelling, self.options.batch_rows, hidden, seed), 0.0
        self.model.train()
        for step, batch in enumerate(plan):
            loss = self.loss(batch)
            common.take_step(self.model, self.optimizer, self.rate((self.epoch + step / len(plan)) / self.options.epochs), loss)
            total += loss.item()
        self.epoch += 1
        return total / len(plan)

    def validate(self):
        self.model.eval()
        return metrics(slates(self.model, self.catalog, self.validation, beam_width=self.options.beam_width), self.validation)

    def run(self):
        self.resume()
        last, started = min(self.options.epochs, self.epoch + (self.options.stop_after or self.options.epochs)), time.time()
        before, first = self.seconds, self.epoch
        while self.epoch < last:
            entry = {"loss": self.run_epoch(), "epoch": self.epoch}
            if self.epoch % self.options.validate_every == 0 or self.epoch == self.options.epochs:
                entry |= self.validate()
                if self.best is None or entry["NDCG@10"] > self.best["NDCG@10"]:
                    self.best = dict(entry)
                    write(self.options.out, self.model, self.catalog)
            self.history.append(entry)
            self.seconds = before + time.time() - started
            left = (time.time() - started) / (self.epoch - first) * (self.options.epochs - self.epoch)
            self.save()
            said = "  ".join(f"{name} {entry[name]:.4f}" for name in entry if name != "epoch")
            print(f"epoch {self.epoch}/{self.options.epochs}  {said}  {left / 60:.1f} min left", flush=True)
        if self.best:
            print(f"best on validation: epoch {self.best['epoch']}, HR@10 {self.best['HR@10']:.4f}, NDCG@10 {self.best['NDCG@10']:.4f}; "
                  f"{self.seconds / 60:.1f} min in all -> {self.options.out}", flush=True)  # fmt: skip


def main(given=None):
    options = arguments(given)
    torch.set_num_threads(options.threads)
    training = Training(options)
    parameters = sum(tensor.numel() for tensor in training.model.parameters())
    print(f"{len(training.lines):,} sequences, {len(training.catalog):,} items, {parameters:,} parameters", flush=True)
    training.run()
    return training


if __name__ == "__main__":
    main()
