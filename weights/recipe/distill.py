#!/usr/bin/env python3
"""Train a small Qwen3 semantic-ID decoder on a small data set, with an item-level teacher, and save it as a checkpoint that beamline serves.

train.py is for data that is plentiful: one pass, next-token loss, nothing else. With a few hundred thousand interactions that learns the
training sequences by heart and loses to counting pairs. Here the decoder learns from what *could* have come next:

  In:  --data DIR     what prepare.py wrote (catalog.jsonl, convention.json, train.jsonl, validation.jsonl)
       --teacher F    item_model.npz of item_model.py, fitted on the same train.jsonl
  Out: --out DIR      a checkpoint directory, as train.py writes it

The loss of one next item, after history h, with y the item that came and q(. | h) the teacher's distribution over items:

    (1 - soft) * cross-entropy of y's codes  +  soft * cross-entropy between q and the decoder over whole semantic IDs

The second term is estimated from one item drawn from q (soft_targets.py), whose codes are predicted in a branch beside the history
(branches.py). The first item of a history has no teacher and takes the first term alone.

Choices that matter are measured in weights/README.md. Training state is written to OUT/state.pt after each epoch, and the same
command goes on from it. The learning rate is constant until the last --decay-epochs, then falls linearly to zero; what is saved is the
moving average of the weights. While the rate is constant, a run may be stopped after an epoch and gone on with under another --epochs or
--decay-epochs: the result is that of the new command from the start.
"""

import argparse
import json
import math
import os
import random
import shutil
import time

import torch

import beam
import branches
import soft_targets
from item_model import ItemModel, examples
from tokens import Writer, build_tokenizer, check_convention, read_lines


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True)
    add("--teacher", required=True)
    add("--out", required=True)
    shape = parser.add_argument_group("shape").add_argument
    shape("--hidden", type=int, default=128, help="width of the residual stream (default %(default)s)")
    shape("--layers", type=int, default=3, help="(default %(default)s)")
    shape("--heads", type=int, default=4, help="query heads (default %(default)s)")
    shape("--kv-heads", type=int, default=4, help="key/value heads (default %(default)s)")
    shape("--head-dim", type=int, default=32, help="(default %(default)s)")
    shape("--intermediate", type=int, default=512, help="width of the MLP (default %(default)s)")
    shape("--max-positions", type=int, default=1024, help="max_position_embeddings (default %(default)s)")
    training = parser.add_argument_group("training").add_argument
    training("--epochs", type=int, default=16, help="passes over the sequences (default %(default)s)")
    training("--decay-epochs", type=int, default=5, help="epochs at the end in which the learning rate falls to 0 (default %(default)s)")
    training("--soft", type=float, default=0.8, help="weight of the teacher (default %(default)s)")
    training("--candidates", type=int, default=50, help="items of the teacher's distribution, per history (default %(default)s)")
    training("--sharpness", type=float, default=1.0, help="q is proportional to the teacher's score to this power (default %(default)s)")
    training("--dropout", type=float, default=0.1, help="of whole features of a sequence, after embeddings, attention and MLP (default %(default)s)")
    training("--max-items", type=int, default=50, help="items of a history, in training and validation (default %(default)s)")
    training("--batch-items", type=int, default=600, help="items per step (default %(default)s)")
    training("--lr", type=float, default=3e-3, help="peak learning rate (default %(default)s)")
    training("--warmup", type=int, default=200, help="warm-up steps (default %(default)s)")
    training("--weight-decay", type=float, default=0.02, help="(default %(default)s)")
    training("--average", type=float, default=0.998, help="decay of the moving average of the weights (default %(default)s)")
    training("--seed", type=int, default=1, help="(default %(default)s)")
    training("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    training("--validate-every", type=int, default=2, help="epochs (default %(default)s)")
    training("--validation-users", type=int, default=1000, help="evenly spaced over the file (default %(default)s)")
    return parser.parse_args()


def even(values, count):
    """`count` values, evenly spaced over all of them: files are often ordered."""
    count = min(count, len(values))
    return [values[number * len(values) // count] for number in range(count)]


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


class Teacher:
    """The teacher's candidates for every next item of the training sequences: found once, looked up by (sequence, place)."""

    def __init__(self, path, sequences, candidates, sharpness):
        model = ItemModel(path)
        histories, _ = examples(sequences)
        items, scores = model.best(histories, candidates)
        weight = scores.astype("float64") ** sharpness
        weight[:, 0][weight.sum(1) == 0] = 1e-9  # an unknown history: anything, see `known`
        self.items = torch.from_numpy(items.astype("int64"))
        self.known = torch.from_numpy(scores[:, 0] > 0)
        self.probabilities = torch.from_numpy((weight / weight.sum(1, keepdims=True)).astype("float32"))
        self.first, at = [], 0
        for sequence in sequences:
            self.first.append(at)
            at += max(0, len(sequence) - 1)

    def rows(self, numbers, sequences):
        """Rows of all next items of these sequences, in order."""
        return torch.cat([torch.arange(self.first[n], self.first[n] + max(0, len(sequences[n]) - 1)) for n in numbers])


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
    """The loss of a batch of sequences; see the top of this file."""

    def __init__(self, model, paths, prefix, teacher, soft):
        self.model, self.teacher, self.soft = model, teacher, soft
        if len(prefix) != 1:
            raise SystemExit("prompt_prefix must be one token here")
        self.prefix = prefix[0]
        self.levels = len(paths[0])
        self.nothing = len(paths)  # the number that pads a batch
        self.tokens = torch.tensor(paths + [[0] * self.levels])

    def __call__(self, numbers, sequences):
        """Mean loss per item and level; and the hard losses per level, for the log."""
        levels, batch = self.levels, [sequences[n] for n in numbers]
        users, longest = len(batch), max(map(len, batch))
        items = torch.tensor([sequence + [self.nothing] * (longest - len(sequence)) for sequence in batch])
        real = items != self.nothing
        later = real.clone()
        later[:, 0] = False

        rows = self.teacher.rows(numbers, sequences)
        candidates, probabilities = self.teacher.items[rows], self.teacher.probabilities[rows]
        drawn = candidates.gather(1, soft_targets.draw(probabilities)[:, None])[:, 0]
        other = torch.full((users, longest), self.nothing)
        other[later] = drawn

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
        # Row n of the stream predicts token n + 1, so the rows before an item's tokens are shifted by one.
        main = hidden[:, : size - 1].reshape(users, longest, levels, -1)[real]
        side = hidden[:, size:].reshape(users, longest, levels - 1, -1)[later]
        main = self.model.lm_head(main).log_softmax(-1)  # [items, L, V]
        side = self.model.lm_head(side).log_softmax(-1)  # [later items, L - 1, V]

        hard = -main.gather(2, self.tokens[items[real]][..., None])[..., 0]
        among = later[real]
        tokens = self.tokens[candidates]
        weights = soft_targets.conditionals(tokens, probabilities, self.tokens[drawn])
        log = torch.cat([main[among][:, :1], side], 1)  # the first level is the same in stream and branch
        known = self.teacher.known[rows].float()[:, None]
        soft = soft_targets.soft_cross_entropy(log, tokens, weights) * known
        share = torch.ones(len(hard), 1)
        share[among] = 1 - self.soft * known
        return ((hard * share).sum() + self.soft * soft.sum()) / hard.numel(), hard.detach().mean(0), soft.detach().mean(0)


def main():
    args = arguments()
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
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
    # The window is the newest part of a longer history.
    sequences = [[number[item] for item in user["items"]][-args.max_items :] for user in read_lines(os.path.join(args.data, "train.jsonl"))]
    sequences = [sequence for sequence in sequences if sequence]
    validation = [
        ([number[item] for item in user["history"]], number[user["target"]])
        for user in even(read_lines(os.path.join(args.data, "validation.jsonl")), args.validation_users)
    ]
    trie = beam.Trie(paths)
    start = time.time()
    teacher = Teacher(args.teacher, sequences, args.candidates, args.sharpness)
    print(f"teacher: {len(teacher.items):,} next items in {time.time() - start:.0f} s", flush=True)

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
    average.load_state_dict(model.state_dict())
    add_dropout(model, args.dropout)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(tokenizer)} tokens, {len(sequences):,} sequences", flush=True)
    parameters, averaged = list(model.parameters()), list(average.parameters())
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": args.weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ],
        lr=args.lr,
        betas=(0.9, 0.98),
        fused=True,
    )
    loss_of = Loss(model, paths, writer.prefix, teacher, args.soft)

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
        clock, cpu, hard, soft = time.time(), time.process_time(), 0, 0
        for at, numbers in enumerate(batches):
            left = (args.epochs - epoch - at / len(batches)) / max(1, args.decay_epochs)
            rate = args.lr * min(1.0, (step + 1) / args.warmup, left)
            for group in optimizer.param_groups:
                group["lr"] = rate
            loss, hard_levels, soft_levels = loss_of(numbers, sequences)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            step += 1
            with torch.no_grad():
                torch._foreach_lerp_(averaged, parameters, 1 - min(args.average, step / (step + 10)))
            hard, soft = hard + hard_levels, soft + soft_levels
            if (at + 1) % 25 == 0:
                each = (time.time() - clock) / (at + 1)
                togo = each * (len(batches) * (args.epochs - epoch) - at)
                print(
                    f"epoch {epoch + 1} step {at + 1}/{len(batches)}  hard {' '.join(f'{x / (at + 1):.2f}' for x in hard.tolist())}  "
                    f"soft {' '.join(f'{x / (at + 1):.2f}' for x in soft.tolist())}  "
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
    for normalization in ("full_vocab", "allowed_set"):
        for exclude in (False, True):
            report(f"{normalization}, history {'excluded' if exclude else 'kept'}", normalization=normalization, exclude_history=exclude)
    average.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    for name in ("catalog.jsonl", "convention.json"):
        shutil.copyfile(os.path.join(args.data, name), os.path.join(args.out, name))
    print(f"saved to {args.out} after {spent / 60:.1f} CPU min of training", flush=True)


if __name__ == "__main__":
    main()
