"""OpenVINO GenAI's beam search, with paged attention and prefix caching, on a model exported by optimum-cli: no trie.

  optimum-cli export openvino -m CHECKPOINT --task text-generation-with-past --weight-format fp32|int8 EXPORTED
"""
import argparse

import numpy as np
import openvino
import openvino_genai as genai

from common import LEVELS, read_prompts, report, timed

CACHE_GIB = 1


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported")
    parser.add_argument("prompts")
    parser.add_argument("--beams", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--label", default="f32", help="what the line that is printed calls this export")
    parser.add_argument("--precision", default="f32", help="type of the activations")
    options = parser.parse_args()

    scheduler = genai.SchedulerConfig()
    scheduler.enable_prefix_caching = True
    scheduler.cache_size = CACHE_GIB
    scheduler.dynamic_split_fuse = True
    pipeline = genai.LLMPipeline(
        options.exported, "CPU", scheduler_config=scheduler, INFERENCE_NUM_THREADS=options.threads,
        INFERENCE_PRECISION_HINT=options.precision)
    config = genai.GenerationConfig(
        max_new_tokens=len(LEVELS), min_new_tokens=len(LEVELS), num_beams=options.beams, num_beam_groups=1,
        num_return_sequences=options.beams, length_penalty=0.0, ignore_eos=True)
    config.stop_criteria = genai.StopCriteria.NEVER

    def run(token_ids):
        ids = np.array([token_ids], dtype=np.int64)
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(np.ones_like(ids)))
        return pipeline.generate(inputs, config)

    prompts = read_prompts(options.prompts)
    first = prompts[0]["token_ids"]
    found = len(run(first).tokens)
    if found != options.beams:
        raise SystemExit(f"{found} sequences for {options.beams} beams")
    # A later visit with one item less, so that the path through cached pages was taken once as well.
    run(first[:-7] + first[-2:])
    # The first user is in the cache by now.
    visits = [(prompt["visit"], timed(lambda: run(prompt["token_ids"]))[1]) for prompt in prompts[1:]]
    report(f"openvino-genai-{options.label}", visits, options.beams, len(first))


if __name__ == "__main__":
    main()
