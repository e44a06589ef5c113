"""Hugging Face generate() with a prefix trie, as MiniOneRec's evaluation runs it. It computes every request anew."""
import argparse
import json

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from common import LEVELS, read_prompts, read_trie, report, timed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("prompts")
    parser.add_argument("--beams", type=int, default=32)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", help="write items and scores as JSON lines")
    options = parser.parse_args()

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    model = AutoModelForCausalLM.from_pretrained(options.checkpoint, dtype=getattr(torch, options.dtype))
    model = model.to(options.device).eval()
    allowed, item_ids = read_trie(options.checkpoint, tokenizer)

    def run(prompt):
        ids = torch.tensor([prompt["token_ids"]], device=options.device)
        length = ids.shape[1]
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=options.beams,
                num_return_sequences=options.beams, max_new_tokens=len(LEVELS), min_new_tokens=len(LEVELS),
                do_sample=False, top_k=None, top_p=None, temperature=None, length_penalty=0.0, early_stopping=True,
                prefix_allowed_tokens_fn=lambda _, path: allowed.get(tuple(path[length:].tolist()), [0]),
                return_dict_in_generate=True, output_scores=True)
        items = [item_ids.get(tuple(path)) for path in found.sequences[:, length:].tolist()]
        return items, found.sequences_scores.tolist()

    prompts = read_prompts(options.prompts)
    run(prompts[0])
    visits, lines = [], []
    for prompt in prompts:
        (items, scores), seconds = timed(lambda: run(prompt))
        visits.append((prompt["visit"], seconds))
        lines.append({"user": prompt["user"], "visit": prompt["visit"], "items": items, "scores": scores})
    if options.out:
        with open(options.out, "w", encoding="utf-8") as out:
            out.writelines(json.dumps(line) + "\n" for line in lines)
    report(f"hf-{options.dtype}", visits, options.beams, len(prompts[0]["token_ids"]))


if __name__ == "__main__":
    main()
