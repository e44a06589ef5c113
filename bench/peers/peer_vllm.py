"""vLLM's beam search with prefix caching: no trie, since its beam search takes none."""
import argparse
import os

from common import LEVELS, read_prompts, report, timed

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "4")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint")
    parser.add_argument("prompts")
    parser.add_argument("--beams", type=int, default=32)
    parser.add_argument("--dtype", default="bfloat16")
    options = parser.parse_args()

    # It reads the environment when it is imported.
    from vllm import LLM
    from vllm.sampling_params import BeamSearchParams

    model = LLM(options.checkpoint, dtype=options.dtype, max_logprobs=2 * options.beams + 2, max_model_len=8192,
                enable_prefix_caching=True)
    search = BeamSearchParams(beam_width=options.beams, max_tokens=len(LEVELS), ignore_eos=True)

    def run(token_ids):
        return model.beam_search([{"prompt_token_ids": token_ids}], search)

    prompts = read_prompts(options.prompts)
    # Another prompt than any that is timed, or its pages would be in the cache.
    run(prompts[0]["token_ids"][7:])
    visits = [(prompt["visit"], timed(lambda: run(prompt["token_ids"]))[1]) for prompt in prompts]
    report(f"vllm-{options.dtype}", visits, options.beams, len(prompts[0]["token_ids"]))


if __name__ == "__main__":
    main()
