"""Measures `shared_prefix.py`: constrained beam search over one copy of each user's context, in PyTorch.

    python shared_prefix_baseline.py --shape qwen3-1.7b --batch 1,2,4,8 --beam 256 --context 1000,5000 --out results.jsonl
    python shared_prefix_baseline.py --cpu --points 1x8x20 --items 500

The engine is called shared_prefix, or shared_prefix_compiled with --compile. One JSON line per point (README.md).
"""
import torch

import sweep
from shared_prefix import Decoder, Session


def main(arguments=None):
    flags = sweep.measuring_flags(sweep.parser(__doc__))
    flags.add_argument(
        "--compile", action="store_true", help="fuse what lies between the products with torch.compile (needs a C compiler)"
    )
    flags.add_argument("--no-graphs", action="store_true", help="launch every kernel from the host")
    flags.add_argument(
        "--graph-prefill-tokens", type=int, default=16_384, help="prefills up to this many tokens are captured, too"
    )
    flags.add_argument(
        "--prefill-tokens", type=int, default=32_768, help="context rows that are computed at once, in whole users"
    )
    flags.add_argument("--logit-rows", type=int, default=4_096, help="rows whose logits are in memory at once")
    flags.add_argument("--flash", help="flash attention of another package, as torch.nn.attention names it: FA3, FA4")
    options = sweep.parse(flags, arguments)
    if options.flash:
        torch.nn.attention.activate_flash_attention_impl(options.flash)
    shape = options.model
    with torch.inference_mode():
        weights, host_trie = sweep.prepare(options)
        longest = max(context for _, _, context in options.grid) + shape.levels
        decoder, trie = Decoder(shape, weights, longest, options.compile), host_trie.on(options.device)
        value_bytes = torch.finfo(decoder.dtype).bits // 8

        def session(users, beams, context):
            made = Session(decoder, trie, users, beams, context, graphs=False if options.no_graphs else None,
                           prefill_tokens=options.prefill_tokens, graph_prefill_tokens=options.graph_prefill_tokens,
                           logit_rows=options.logit_rows)
            made.details = {"causal_attention": made.causal_name, "context_attention": made.shared_name,
                            "graphs": 0 if made.graphs is None else sum(graph is not None for graph in made.graphs)}
            return made

        def needs(users, beams, context):
            """Keys and values, the widest activations of a prefill and of a step, logits. Weights are there already."""
            kept = 2 * shape.layers * shape.keys * (users * context + (shape.levels - 1) * users * beams)
            rows = max(context * max(1, min(users, options.prefill_tokens // context)), users * beams)
            widest = rows * (2 * shape.hidden + 3 * shape.intermediate)
            logits = min(options.logit_rows, users * beams) * shape.vocabulary
            return value_bytes * (kept + widest + logits) + 4 * logits * (not options.compile)

        sweep.run_points(options, "shared_prefix_compiled" if options.compile else "shared_prefix", session, needs, trie)


if __name__ == "__main__":
    main()
