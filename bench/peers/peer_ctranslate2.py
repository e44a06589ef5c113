"""CTranslate2's beam search on a checkpoint converted by ct2-transformers-converter: no trie, no reuse between requests."""
import argparse

import ctranslate2
from transformers import AutoTokenizer

from common import LEVELS, read_prompts, report, timed


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("converted")
    parser.add_argument("prompts")
    parser.add_argument("--beams", type=int, default=32)
    parser.add_argument("--compute", default="float32")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)
    generator = ctranslate2.Generator(
        options.converted, device="cpu", compute_type=options.compute, intra_threads=options.threads)

    def run(prompt):
        return generator.generate_batch(
            [tokenizer.convert_ids_to_tokens(prompt["token_ids"])], beam_size=options.beams,
            num_hypotheses=options.beams, max_length=len(LEVELS), min_length=len(LEVELS),
            include_prompt_in_result=False, return_scores=True, length_penalty=0)

    prompts = read_prompts(options.prompts)
    run(prompts[0])
    visits = [(prompt["visit"], timed(lambda: run(prompt))[1]) for prompt in prompts]
    report(f"ctranslate2-{options.compute}", visits, options.beams, len(prompts[0]["token_ids"]))


if __name__ == "__main__":
    main()
