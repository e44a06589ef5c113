"""Measures Hugging Face's constrained beam search (`hf_search.py`): bf16, SDPA.

    python hf_baseline.py --shape qwen3-1.7b --batch 1,2,4,8 --beam 256 --context 1000,5000 --out results.jsonl
    python hf_baseline.py --cpu --points 1x8x20 --items 500

The engine is called hf_CACHE after --cache, with _prefix_fn appended for --processor prefix_fn. One JSON line per point.
"""
import torch
import transformers

import sweep
from hf_search import Search, hugging_face_model


def main(arguments=None):
    flags = sweep.measuring_flags(sweep.parser(__doc__))
    flags.add_argument(
        "--cache", choices=["prefilled", "dynamic", "static"], default="prefilled", help="default: the fastest of them"
    )
    flags.add_argument("--processor", choices=["device", "prefix_fn"], default="device")
    options = sweep.parse(flags, arguments)
    transformers.logging.set_verbosity_error()
    shape = options.model
    with torch.inference_mode():
        weights, trie = sweep.prepare(options)
        model = hugging_face_model(shape, weights)
        value_bytes = torch.finfo(model.dtype).bits // 8

        def session(users, beams, context):
            made = Search(model, trie, users, beams, context, options.cache, options.processor)
            made.details = {"transformers": transformers.__version__}
            return made

        def needs(users, beams, context):
            """Keys and values of every beam (a layer's twice while they are reordered), and log-probabilities: as they come,
            in float32, constrained, and with scores added. A prefill per beam holds its activations for all of them."""
            rows = users * beams
            cached = 2 * (shape.layers + 1) * shape.keys * rows * (context + shape.levels)
            wide = rows * context * (2 * shape.hidden + 3 * shape.intermediate) if options.cache != "prefilled" else 0
            return value_bytes * (cached + wide) + (value_bytes + 4 * 4) * rows * shape.vocabulary

        name = f"hf_{options.cache}" + ("_prefix_fn" if options.processor == "prefix_fn" else "")
        sweep.run_points(options, name, session, needs, trie)


if __name__ == "__main__":
    main()
