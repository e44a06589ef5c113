#!/usr/bin/env python3
"""Train a small Qwen3 semantic-ID decoder on a small data set, with an item-level teacher, and save it as a checkpoint that beamline serves.

train.py is for data that is plentiful: one pass, next-token loss, nothing else. With a few hundred thousand interactions that learns the
training sequences by heart and loses to counting pairs. Here the decoder learns from what *could* have come next:

  In:  --data DIR     what prepare.py wrote (catalog.jsonl, convention.json, train.jsonl, validation.jsonl)
       --teacher F    item_model.npz of item_model.py, fitted on the same train.jsonl
  Out: --out DIR      a checkpoint directory, as train.py writes it

The loss after a history h, with q(. | h) the teacher's distribution over items, is the cross-entropy between q and the decoder over whole
semantic IDs. It is estimated from one item drawn from q (soft_targets.py), whose codes are predicted in a branch beside the history
(branches.py). What really came next is not looked at: the teacher has seen it. Only the first item of a sequence, before which there is
no history, is learned as it stands.

Histories need no labels, so there are more of them than the data has (`histories`): every prefix of every training sequence and the whole
sequence, the same of copies with items left out and neighbours swapped, and each item alone, so that no item is met rarely.
The whole sequences of the users that validation asks about are left out: their histories are as new to the decoder as those of the test.

Token embeddings and output rows start from the teacher's item embedding (`start_from`), the mean over the items that carry the token.

Choices that matter are measured in weights/README.md. Training state is written to OUT/state.pt after each epoch, and the same
command goes on from it. The learning rate is constant until the last --decay-epochs, then falls linearly to zero; what is saved is the
moving average of the weights. While the rate is constant, a run may be stopped after an epoch and gone on with under another --epochs or
--decay-epochs: the result is that of the new command from the start.
"""

import argparse
import json
import os
import random
import sys
import time

import numpy
import torch

import beam
import branches
import build_index
import soft_targets
from item_model import REACH, ItemModel
from tokens import Writer, build_tokenizer, check_convention, read_lines

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import training  # noqa: E402


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True)
    add("--teacher", required=True)
    add("--out", required=True)
    shape = parser.add_argument_group("shape").add_argument
    shape("--hidden", type=int, default=192, help="width of the residual stream (default %(default)s)")
    shape("--layers", type=int, default=3, help="(default %(default)s)")
    shape("--heads", type=int, default=6, help="query heads (default %(default)s)")
    shape("--kv-heads", type=int, default=6, help="key/value heads (default %(default)s)")
    shape("--head-dim", type=int, default=32, help="(default %(default)s)")
    shape("--intermediate", type=int, default=512, help="width of the MLP (default %(default)s)")
    shape("--max-positions", type=int, default=1024, help="max_position_embeddings (default %(default)s)")
    training = parser.add_argument_group("training").add_argument
    training("--epochs", type=int, default=11, help="passes over all histories (default %(default)s)")
    training("--decay-epochs", type=int, default=8, help="epochs at the end in which the learning rate falls to 0 (default %(default)s)")
    training("--copies", type=int, default=1, help="altered copies of each sequence (default %(default)s)")
    training("--candidates", type=int, default=50, help="items of the teacher's distribution, per history (default %(default)s)")
    training("--sharpness", type=float, default=1.3, help="q is proportional to the teacher's score to this power (default %(default)s)")
    training("--dropout", type=float, default=0.2, help="of whole features of a sequence, after embeddings, attention and MLP (default %(default)s)")
    training("--max-items", type=int, default=50, help="items of a history, in training and validation (default %(default)s)")
    training("--batch-items", type=int, default=300, help="items per step (default %(default)s)")
    training("--lr", type=float, default=3e-3, help="peak learning rate (default %(default)s)")
    training("--warmup", type=int, default=200, help="warm-up steps (default %(default)s)")
    training("--weight-decay", type=float, default=0.02, help="(default %(default)s)")
    training("--average", type=float, default=0.998, help="decay of the moving average of the weights (default %(default)s)")
    training("--seed", type=int, default=1, help="(default %(default)s)")
    training("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    training("--validate-every", type=int, default=3, help="epochs (default %(default)s)")
    training("--validation-users", type=int, default=4000, help="evenly spaced over the file (default %(default)s)")
    return parser.parse_args()


def add_dropout(model, rate):
    """Dropout that exists in training only and leaves no trace in the configuration: the saved model is a plain Qwen3.

    One mask per sequence and feature, shared by all its tokens: as good a regulariser, and a hundred times fewer random numbers."""

    def hook(module, _inputs, output):
        if not module.training or rate == 0:
            return output
        hidden = output[0] if isinstance(output, tuple) else output
        kept = (torch.rand(hidden.shape[0], 1, hidden.shape[2]) >= rate).float().div_(1 - rate)
        return (hidden * kept, *output[1:]) if isinstance(output, tuple) else hidden * kept

    return [
        module.register_forward_hook(hook)
        for module in [model.model.embed_tokens] + [part for layer in model.model.layers for part in (layer.self_attn, layer.mlp)]
    ]


# Of an item, and of a pair of neighbours, in an altered copy.
LEFT_OUT, SWAPPED = 0.35, 0.15
# Strongest successors of an item in the graph that the first embeddings are made from.
NEIGHBOURS = 30


def altered(sequence, rng):
    """A copy with items left out and neighbours swapped; None if nothing is left."""
    copy = [item for item in sequence if rng.random() > LEFT_OUT]
    for at in range(len(copy) - 1):
        if rng.random() < SWAPPED:
            copy[at], copy[at + 1] = copy[at + 1], copy[at]
    return copy or None


def histories(sequences, items, copies, seed):
    """All sequences to train on: these, `copies` altered ones of each, and every item alone. The given ones come first."""
    rng = random.Random(seed)
    made = [altered(sequence, rng) for _ in range(copies) for sequence in sequences if len(sequence) > 1]
    return sequences + [copy for copy in made if copy] + [[item] for item in range(items)]


class Teacher:
    """The teacher's candidates after every item of the sequences: found once, looked up by (sequence, place)."""

    def __init__(self, path, sequences, candidates, sharpness):
        items, scores = ItemModel(path).best(
            [sequence[max(0, end - REACH) : end] for sequence in sequences for end in range(1, len(sequence) + 1)], candidates
        )
        weight = scores.astype("float64") ** sharpness
        weight[:, 0][weight.sum(1) == 0] = 1e-9  # an unknown history: anything, see `known`
        self.items = torch.from_numpy(items.astype("int64"))
        self.known = torch.from_numpy(scores[:, 0] > 0)
        self.probabilities = torch.from_numpy((weight / weight.sum(1, keepdims=True)).astype("float32"))
        self.first = torch.tensor([0] + [len(sequence) for sequence in sequences]).cumsum(0)

    def rows(self, numbers, longest):
        """Rows of the places after items 1 .. longest of these sequences, [sequences, longest]; meaningless beyond their ends."""
        return self.first[torch.tensor(numbers)][:, None] + torch.arange(longest)


def start_from(points, paths, model):
    """Token embeddings and output rows from item points [items, D]: the mean over the items that carry the first code, and for later
    codes the mean of what is still missing. So the sum of an item's tokens is close to its point. Embeddings get the size 0.3 a feature,
    which leaves a trace through all layers; output rows a tenth of it, so that the first predictions are not sure of anything."""
    tokens = torch.tensor(paths)
    vocabulary, width = model.model.embed_tokens.weight.shape
    missing, rows = torch.from_numpy(points), torch.zeros(vocabulary, points.shape[1])
    for level in tokens.T:
        sums = torch.zeros_like(rows).index_add(0, level, missing)
        mean = sums / torch.bincount(level, minlength=vocabulary).clamp_min(1)[:, None]
        rows, missing = rows + mean, missing - mean[level]
    rows *= 0.3 / rows[tokens.unique()].pow(2).mean().sqrt()
    with torch.no_grad():
        model.model.embed_tokens.weight[:, : rows.shape[1]] = rows[:, :width]
        model.lm_head.weight[:, : rows.shape[1]] = rows[:, :width] * 0.1


def plan(sequences, batch_items, seed):
    """Batches of similar length and about equal size, in random order."""
    rng = random.Random(seed)
    order = list(range(len(sequences)))
    rng.shuffle(order)
    made = []
    for start in range(0, len(order), 3000):
        batch, size = [], 0
        for number in sorted(order[start : start + 3000], key=lambda n: len(sequences[n])):
            batch.append(number)
            size += len(sequences[number])
            if size >= batch_items:
                made.append(batch)
                batch, size = [], 0
        if batch:
            made.append(batch)
    rng.shuffle(made)
    return made


class Loss:
    """The loss of a batch of sequences; see the top of this file. `unseen`: numbers of sequences after whose last item nothing is learned."""

    def __init__(self, model, paths, prefix, teacher, unseen, given):
        self.model, self.teacher, self.unseen, self.given = model, teacher, unseen, given
        if len(prefix) != 1:
            raise SystemExit("prompt_prefix must be one token here")
        self.prefix = prefix[0]
        self.levels = len(paths[0])
        self.nothing = len(paths)  # the number that pads a batch
        self.tokens = torch.tensor(paths + [[0] * self.levels])

    def __call__(self, numbers, sequences):
        """Mean loss per history and level; and the means per level after a history, for the log."""
        levels, batch = self.levels, [sequences[n] for n in numbers]
        users, longest = len(batch), max(map(len, batch))
        items = torch.tensor([sequence + [self.nothing] * (longest - len(sequence)) for sequence in batch])
        rows = self.teacher.rows(numbers, longest)
        use = items != self.nothing
        for user, number in enumerate(numbers):
            use[user, len(batch[user]) - 1] &= number not in self.unseen
        use &= self.teacher.known[rows.where(use, 0)]
        rows = rows[use]
        candidates, probabilities = self.teacher.items[rows], self.teacher.probabilities[rows]
        drawn = candidates.gather(1, soft_targets.draw(probabilities)[:, None])[:, 0]
        other = torch.full((users, longest), self.nothing)
        other[use] = drawn

        stream = torch.cat([torch.full((users, 1), self.prefix), self.tokens[items].view(users, -1)], 1)
        branch = self.tokens[other][:, :, : levels - 1].reshape(users, -1)
        mask, positions = branches.layout(longest, levels)
        hidden = self.model.model(
            input_ids=torch.cat([stream, branch], 1),
            attention_mask=mask[None, None].expand(users, 1, -1, -1),
            position_ids=positions[None].expand(users, -1),
            use_cache=False,
        ).last_hidden_state
        size = stream.shape[1]
        # After an item the first code is predicted, in a branch the others.
        after = torch.cat([hidden[:, levels:size:levels, None], hidden[:, size:].view(users, longest, levels - 1, -1)], 2)[use]
        log = self.model.lm_head(after).log_softmax(-1)  # [histories, L, V]
        tokens = self.tokens[candidates]
        soft = soft_targets.soft_cross_entropy(log, tokens, soft_targets.conditionals(tokens, probabilities, self.tokens[drawn]))
        total, count = soft.sum(), soft.numel()

        # The first item of a given sequence follows from nothing but the begin token.
        real = torch.tensor([user for user, number in enumerate(numbers) if number < self.given], dtype=torch.long)
        if len(real):
            first = self.model.lm_head(hidden[real, :levels]).log_softmax(-1)
            total = total - first.gather(2, self.tokens[items[real, 0]][..., None]).sum()
            count += first.shape[0] * levels
        return total / max(1, count), soft.detach().mean(0)


def main():
    args = arguments()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    training.seeded(args.seed, args.threads)
    with open(os.path.join(args.data, "convention.json"), encoding="utf-8") as file:
        convention = json.load(file)
    check_convention(convention)
    catalog = read_lines(os.path.join(args.data, "catalog.jsonl"))
    tokenizer = build_tokenizer(convention, catalog)
    writer = Writer(tokenizer, convention, catalog)
    number = {entry["item_id"]: at for at, entry in enumerate(catalog)}
    paths = [writer.item[entry["item_id"]] for entry in catalog]
    if len(paths[0]) != convention["levels"]:
        raise SystemExit("this trainer writes items without begin and end tokens")
    users = [user for user in read_lines(os.path.join(args.data, "train.jsonl")) if user["items"]]
    asked = training.even(read_lines(os.path.join(args.data, "validation.jsonl")), args.validation_users)
    validation = [([number[item] for item in user["history"]], number[user["target"]]) for user in asked]
    asked = {user["user_id"] for user in asked}
    unseen = {at for at, user in enumerate(users) if user["user_id"] in asked}
    # The window is the newest part of a longer history.
    sequences = [[number[item] for item in user["items"]][-args.max_items :] for user in users]
    sequences = histories(sequences, len(catalog), args.copies, args.seed)
    trie = beam.Trie(paths)
    cpu = time.process_time()
    teacher = Teacher(args.teacher, sequences, args.candidates, args.sharpness)
    print(f"teacher: {len(teacher.items):,} histories in {time.process_time() - cpu:.0f} CPU s", flush=True)

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        intermediate_size=args.intermediate,
        max_position_embeddings=args.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    model, average = Qwen3ForCausalLM(config), Qwen3ForCausalLM(config)
    stored = numpy.load(args.teacher)
    start_from(build_index.embed(stored["items"][0], stored["scores"][0], NEIGHBOURS, args.hidden, args.seed), paths, model)
    average.load_state_dict(model.state_dict())
    add_dropout(model, args.dropout)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, {len(sequences):,} sequences", flush=True)
    parameters, averaged = list(model.parameters()), list(average.parameters())
    optimizer = training.adamw(model, args.lr, args.weight_decay, (0.9, 0.98), fused=True)
    loss_of = Loss(model, paths, writer.prefix, teacher, unseen, len(users))

    os.makedirs(args.out, exist_ok=True)
    state_file = os.path.join(args.out, "state.pt")
    epoch, step, spent = 0, 0, 0.0
    if os.path.exists(state_file):
        state = torch.load(state_file)
        epoch, step, spent = state["epoch"], state["step"], state["cpu_seconds"]
        model.load_state_dict(state["model"]), average.load_state_dict(state["average"]), optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["random"])
        print(f"going on after epoch {epoch}", flush=True)

    def report(name, **options):
        values = beam.recall(average, trie, writer.prefix, paths, validation, max_items=args.max_items, **options)
        print(f"  validation, {name}: recall@10 {values[0]:.4f}  NDCG@10 {values[1]:.4f}", flush=True)

    model.train()
    while epoch < args.epochs:
        batches = plan(sequences, args.batch_items, args.seed * 1000 + epoch)
        clock, cpu, soft = time.time(), time.process_time(), 0
        for at, numbers in enumerate(batches):
            left = (args.epochs - epoch - at / len(batches)) / max(1, args.decay_epochs)
            loss, levels = loss_of(numbers, sequences)
            training.take_step(model, optimizer, args.lr * min(1.0, (step + 1) / args.warmup, left), loss)
            step += 1
            with torch.no_grad():
                torch._foreach_lerp_(averaged, parameters, 1 - min(args.average, step / (step + 10)))
            soft = soft + levels
            if (at + 1) % 100 == 0:
                each = (time.time() - clock) / (at + 1)
                togo = each * (len(batches) * (args.epochs - epoch) - at)
                print(
                    f"epoch {epoch + 1} step {at + 1}/{len(batches)}  loss per level {' '.join(f'{x / (at + 1):.3f}' for x in soft.tolist())}  "
                    f"{(time.process_time() - cpu) / (at + 1):.2f} CPU s/step  ETA {togo / 60:.0f} min",
                    flush=True,
                )
        epoch += 1
        spent += time.process_time() - cpu
        state = {"epoch": epoch, "step": step, "cpu_seconds": spent, "model": model.state_dict(), "average": average.state_dict()}
        torch.save({**state, "optimizer": optimizer.state_dict(), "random": torch.get_rng_state()}, state_file + ".new")
        os.replace(state_file + ".new", state_file)
        print(f"epoch {epoch}/{args.epochs} done, {spent / 60:.1f} CPU min so far", flush=True)
        if epoch % args.validate_every == 0 and epoch < args.epochs:
            report("full_vocab")
    files = {name: os.path.join(args.data, name) for name in ("catalog.jsonl", "convention.json")}
    training.save(args.out, average, tokenizer, files)
    print(f"saved to {args.out} after {spent / 60:.1f} CPU min of training", flush=True)
    for normalization in ("full_vocab", "allowed_set"):
        for exclude in (False, True):
            report(f"{normalization}, history {'excluded' if exclude else 'kept'}", normalization=normalization, exclude_history=exclude)


if __name__ == "__main__":
    main()
