#!/usr/bin/env python3
"""Train a small Qwen3 semantic-ID decoder on item sequences and save it as a checkpoint that beamline serves.

In:
  --sequences    JSON lines, one user each: {"user_id": ..., "items": [item ids, oldest first]}
  --catalog      JSON lines, one item each: {"item_id": ..., "sid": [codes, or token strings]}
  --convention   convention.json: how an item is written as tokens (see weights/README.md for its fields)
Out (--out DIR): config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json as
  `save_pretrained` writes them, and copies of catalog.jsonl and convention.json beside them. That directory is a checkpoint.

The choices that matter:
  Every position is an example. A history is written once, as the token stream the server will see in a prompt, and the model predicts
    each next item of it. One pass over a history of n items trains n next-item predictions, and a served prompt is exactly
    a prefix of such a stream.
  Loss on semantic-ID tokens only: all levels of all items, equally weighted. Begin and end tokens are never sampled by the server
    (the convention fixes them), so learning them would be wasted capacity.
  Codes are plain added tokens (special=False): the tokenizer splits them anywhere, and decoding keeps them.
  Long histories are cut into windows of --max-items, none dropped. The model sees no positions beyond that in training, although
    max_position_embeddings (--max-positions) may allow more.
  No dropout, one pass: enough fresh sequences beat regularisation. With little data, raise --epochs and --weight-decay and watch
    the validation loss.
  Adam with warm-up and a cosine to a tenth of the peak; gradients clipped at 1. Loss per level is printed on held-out users:
    the first level is the hard one, the last ones fall quickly.
  The seed fixes initial weights and batches; on one thread of one machine the result repeats exactly.

Example, the demo checkpoint:
  python3 weights/demo/world.py sequences --out weights/demo/build
  python3 weights/recipe/train.py --sequences weights/demo/build/train.jsonl --catalog weights/demo/catalog.jsonl \\
      --convention weights/demo/convention.json --out weights/demo/checkpoint

Limits: conventions whose prompts are item tokens with begin/end tokens (and special tokens such as <|bos|> in front). For a text
template ("user: recently watched ...") fine-tune a text model instead; the files a server needs are the same.
"""

import argparse
import json
import math
import os
import random
import sys

from tokens import Writer, build_tokenizer, check_convention, read_lines

sys.path.append(os.path.join(os.path.dirname(os.path.abspath(__file__)), ".."))
import training  # noqa: E402


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--sequences", required=True)
    add("--catalog", required=True)
    add("--convention", required=True)
    add("--out", required=True)
    shape = parser.add_argument_group("shape").add_argument
    shape("--hidden", type=int, default=160, help="width of the residual stream (default %(default)s)")
    shape("--layers", type=int, default=4, help="(default %(default)s)")
    shape("--heads", type=int, default=4, help="query heads (default %(default)s)")
    shape("--kv-heads", type=int, default=2, help="key/value heads; fewer make the server's cache smaller (default %(default)s)")
    shape("--head-dim", type=int, default=32, help="(default %(default)s)")
    shape("--intermediate", type=int, default=480, help="width of the MLP (default %(default)s)")
    shape("--max-positions", type=int, default=4096, help="max_position_embeddings: the longest prompt a server accepts (default %(default)s)")
    shape("--rope-theta", type=float, default=10_000.0, help="(default %(default)s)")
    training = parser.add_argument_group("training").add_argument
    training("--epochs", type=float, default=1.0, help="passes over the sequences; fractions allowed (default %(default)s)")
    training("--max-items", type=int, default=500, help="window length in items (default %(default)s)")
    training("--batch-tokens", type=int, default=4096, help="tokens per step, padding included (default %(default)s)")
    training("--lr", type=float, default=2.5e-3, help="peak learning rate (default %(default)s)")
    training("--warmup", type=int, default=100, help="warm-up steps (default %(default)s)")
    training("--weight-decay", type=float, default=0.01, help="(default %(default)s)")
    training("--validation-users", type=int, default=500, help="last users of the file, kept out of training (default %(default)s)")
    training("--seed", type=int, default=1, help="(default %(default)s)")
    training("--threads", type=int, default=1, help="CPU threads (default %(default)s)")
    training("--device", default="cpu", help="cpu or cuda (default %(default)s)")
    training("--bf16", action="store_true", help="autocast matrix products to bfloat16: faster on CPUs with AMX and on GPUs")
    training("--save-dtype", default="bfloat16", choices=["bfloat16", "float32"], help="dtype of model.safetensors (default %(default)s)")
    return parser.parse_args()


# ---------------------------------------------------------------------------------------------------- training


def main():
    args = arguments()
    import torch
    from transformers import Qwen3Config, Qwen3ForCausalLM

    rng = training.seeded(args.seed, args.threads)
    torch.use_deterministic_algorithms(args.device == "cpu")

    with open(args.convention, encoding="utf-8") as file:
        convention = json.load(file)
    check_convention(convention)
    catalog = read_lines(args.catalog)
    tokenizer = build_tokenizer(convention, catalog)
    writer = Writer(tokenizer, convention, catalog)

    users = [user["items"] for user in read_lines(args.sequences)]
    held_out = users[len(users) - args.validation_users :]
    users = users[: len(users) - args.validation_users]
    cut = lambda items: [items[at : at + args.max_items] for at in range(0, len(items), args.max_items)]  # noqa: E731
    train = [writer.write(window) for items in users for window in cut(items)]
    validation = [writer.write(items[-args.max_items :]) for items in held_out]
    longest = max(len(ids) for ids, _ in train)
    if longest > args.max_positions:
        raise SystemExit(f"the longest window has {longest} tokens, --max-positions allows {args.max_positions}")

    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.head_dim,
        intermediate_size=args.intermediate,
        max_position_embeddings=args.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": args.rope_theta},
        # The vocabulary is small, so separate input and output rows cost nothing.
        tie_word_embeddings=False,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        attn_implementation="sdpa",
    )
    model = Qwen3ForCausalLM(config).to(args.device)
    parameters = sum(p.numel() for p in model.parameters())
    tokens = sum(len(ids) for ids, _ in train)
    print(f"{parameters:,} parameters, {len(tokenizer)} tokens; {len(users):,} users, {tokens:,} tokens, longest window {longest}", flush=True)

    optimizer = training.adamw(model, args.lr, args.weight_decay, (0.9, 0.95))

    def losses(batch):
        """Per-token losses of a batch and the level each belongs to. Causal attention needs no mask for padding on the right:
        a real position never looks at what follows it, and padded positions carry no loss."""
        width = max(len(ids) for ids, _ in batch)
        ids = torch.tensor([ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in batch], device=args.device)
        level = torch.tensor([levels + [-1] * (width - len(levels)) for _, levels in batch], device=args.device)[:, 1:]
        learned = level >= 0
        with torch.autocast(args.device, dtype=torch.bfloat16, enabled=args.bf16):
            hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
            logits = model.lm_head(hidden[learned])  # only the rows that have a loss
        return torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][learned], reduction="none"), level[learned]

    def validate():
        model.eval()
        total, count = torch.zeros(convention["levels"]), torch.zeros(convention["levels"])
        with torch.no_grad():
            for batch in training.by_length([len(ids) for ids, _ in validation], args.batch_tokens, random.Random(0)):
                loss, level = losses([validation[n] for n in batch])
                total.index_add_(0, level.cpu(), loss.cpu())
                count.index_add_(0, level.cpu(), torch.ones(len(loss)))
        model.train()
        return (total / count).tolist()

    plan = []
    for _ in range(math.ceil(args.epochs)):
        plan += training.by_length([len(ids) for ids, _ in train], args.batch_tokens, rng)
    plan = plan[: int(len(plan) * args.epochs / math.ceil(args.epochs))]

    progress = training.Progress(50)
    model.train()
    for step, batch in enumerate(plan):
        loss = losses([train[n] for n in batch])[0].mean()
        warm = min(1.0, (step + 1) / args.warmup)
        training.take_step(model, optimizer, args.lr * warm * training.cosine(step / len(plan), 0.1), loss)
        progress.tell(loss.item(), (step + 1) / len(plan))
        if (step + 1) % 500 == 0:
            print("  held-out loss per level:", "  ".join(f"{x:.4f}" for x in validate()), flush=True)
    minutes, final = progress.seconds() / 60, validate()
    print(f"trained in {minutes:.1f} min; held-out loss per level:", "  ".join(f"{x:.4f}" for x in final), flush=True)

    files = {"catalog.jsonl": args.catalog, "convention.json": args.convention}
    training.save(args.out, model.to("cpu", getattr(torch, args.save_dtype)), tokenizer, files)
    print(f"saved to {args.out}", flush=True)


if __name__ == "__main__":
    main()
