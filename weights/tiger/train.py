#!/usr/bin/env python3
"""Train a small TIGER (Rajput et al. 2023: T5 over semantic IDs) and save it as a checkpoint that beamline serves.

In:  --data DIR   what recipe/prepare.py wrote (catalog.jsonl, train.jsonl, validation.jsonl), from any index
Out: --out DIR    a directory that is served: model and tokenizer of `save_pretrained`, catalog.jsonl, convention.json

The semantic IDs are the first --levels codes of the index and a last one that tells items apart whose codes are equal. Every item
of a training sequence but the first is an example: the encoder reads up to --max-items items before it, the decoder writes its
codes. The loss is the cross-entropy of these codes, all levels equally weighted.

Training ends after --steps, or after --seconds if that is sooner. Until then the learning rate falls along a cosine to a tenth.
Without --seconds the seed fixes everything: on one thread of one machine the result repeats exactly.

What differs from the paper: no token stands for the user; AdamW; the defaults are smaller. The paper's size is --layers 4
--heads 6 --head-dim 64 --hidden 128 --feed-forward 1024.

  python3 weights/recipe/prepare.py --sequences sequences.txt --sids sids.json --item-offset -1 --out build/given
  python3 weights/tiger/train.py --data build/given --out build/tiger --seconds 300
"""

import argparse
import json
import os
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path[:0] = [HERE, os.path.join(HERE, "..", "recipe"), os.path.join(HERE, "..")]
import training  # noqa: E402

import layout  # noqa: E402
import prepare  # noqa: E402
from tokens import code_tokens, read_lines, sid_tokens  # noqa: E402


def arguments(given=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--data", required=True)
    add("--out", required=True)
    add("--levels", type=int, default=3, help="codes of the index that an item keeps (default %(default)s)")
    add("--max-items", type=int, default=20, help="items of a history (default %(default)s)")
    shape = parser.add_argument_group("shape").add_argument
    shape("--hidden", type=int, default=128, help="d_model (default %(default)s)")
    shape("--layers", type=int, default=2, help="of the encoder, and of the decoder (default %(default)s)")
    shape("--heads", type=int, default=4, help="(default %(default)s)")
    shape("--head-dim", type=int, default=32, help="d_kv (default %(default)s)")
    shape("--feed-forward", type=int, default=512, help="d_ff (default %(default)s)")
    shape("--dropout", type=float, default=0.1, help="(default %(default)s)")
    how = parser.add_argument_group("training").add_argument
    how("--steps", type=int, default=5000, help="(default %(default)s)")
    how("--seconds", type=float, help="longest time of training")
    how("--batch-tokens", type=int, default=4096, help="of the encoder in a step, padding included (default %(default)s)")
    how("--lr", type=float, default=2e-3, help="peak learning rate (default %(default)s)")
    how("--warmup", type=int, default=100, help="warm-up steps (default %(default)s)")
    how("--weight-decay", type=float, default=0.05, help="(default %(default)s)")
    how("--validation-users", type=int, default=500, help="evenly spaced over the file (default %(default)s)")
    how("--seed", type=int, default=1, help="(default %(default)s)")
    how("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    return parser.parse_args(given)


def examples(sequences, max_items):
    """[(items before, next item)] of every item of every sequence but the first ones."""
    return [(items[max(0, at - max_items) : at], items[at]) for items in sequences for at in range(1, len(items))]


def endless(lengths, batch_tokens, rng):
    """Batches, pass after pass."""
    while True:
        yield from training.by_length(lengths, batch_tokens, rng)


def made_model(args, tokenizer):
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=len(tokenizer), d_model=args.hidden, d_kv=args.head_dim, d_ff=args.feed_forward, num_layers=args.layers,
        num_heads=args.heads, dropout_rate=args.dropout, feed_forward_proj="relu", tie_word_embeddings=True,
        pad_token_id=layout.PAD, eos_token_id=layout.END, decoder_start_token_id=layout.PAD,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def train(args, model, pairs, paths, rng):
    import torch

    from search import encoder_input

    optimizer, progress = training.adamw(model, args.lr, args.weight_decay, (0.9, 0.98)), training.Progress(50)
    batches = endless([len(history) * len(paths[0]) + 1 for history, _ in pairs], args.batch_tokens, rng)
    targets, done = torch.tensor(paths), 0.0
    model.train()
    while done < 1:
        batch = [pairs[number] for number in next(batches)]
        ids, mask = encoder_input([history for history, _ in batch], paths)
        loss = model(input_ids=ids, attention_mask=mask, labels=targets[[item for _, item in batch]], use_cache=False).loss
        rate = args.lr * min(1.0, (progress.step + 1) / args.warmup) * training.cosine(done, 0.1)
        training.take_step(model, optimizer, rate, loss)
        done = (progress.step + 1) / args.steps
        if args.seconds is not None:
            done = max(done, progress.seconds() / args.seconds)
        progress.tell(loss.item(), min(1.0, done))
    print(f"{progress.step} steps in {progress.seconds() / 60:.1f} min", flush=True)


def main(given=None):
    args = arguments(given)
    import torch

    import beam
    from search import search

    rng = training.seeded(args.seed, args.threads)
    torch.use_deterministic_algorithms(True)
    catalog = read_lines(os.path.join(args.data, "catalog.jsonl"))
    codes = [[code if isinstance(code, int) else prepare.split_token(code)[1] for code in line["sid"]] for line in catalog]
    sids = layout.told_apart(codes, args.levels)
    catalog = [{**line, "sid": sid} for line, sid in zip(catalog, sids)]
    written = layout.convention_of(sids, args.max_items)
    convention = layout.all_fields(written)
    tokenizer = layout.build_tokenizer(code_tokens(convention, catalog))
    paths = [tokenizer.convert_tokens_to_ids(sid_tokens(convention, sid)) for sid in sids]

    number = {line["item_id"]: at for at, line in enumerate(catalog)}
    sequences = [[number[item] for item in line["items"]] for line in read_lines(os.path.join(args.data, "train.jsonl"))]
    asked = training.even(read_lines(os.path.join(args.data, "validation.jsonl")), args.validation_users)
    asked = [([number[item] for item in line["history"]], number[line["target"]]) for line in asked]
    pairs = examples(sequences, args.max_items)
    model = made_model(args, tokenizer)
    parameters, most = sum(p.numel() for p in model.parameters()), 1 + max(sid[-1] for sid in sids)
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens, {len(catalog):,} items, {len(pairs):,} examples", flush=True)
    print(f"up to {most} items share all codes but the last", flush=True)

    train(args, model, pairs, paths, rng)
    training.save(args.out, model.eval(), tokenizer, {})
    prepare.write_lines(os.path.join(args.out, "catalog.jsonl"), catalog)
    with open(os.path.join(args.out, "convention.json"), "w", encoding="utf-8") as file:
        json.dump(written, file, indent=1)
        file.write("\n")
    print(f"saved to {args.out}", flush=True)
    if asked:
        values = beam.recall(model, beam.Trie(paths), [], paths, asked, max_items=args.max_items, by=search)
        print(f"{len(asked)} validation users: recall@10 {values[0]:.4f}  NDCG@10 {values[1]:.4f}", flush=True)


if __name__ == "__main__":
    main()
