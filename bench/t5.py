#!/usr/bin/env python3
"""An encoder-decoder of TIGER's size beside Hugging Face generate() with a trie: cold, and with the same history again.

    VENV/bin/python bench/t5.py --binary target/release/beamline --out bench/results/t5.json

VENV has torch and transformers. A checkpoint with random weights, its tokenizer and a catalog are made in --work: 4+4 layers,
width 128, 6 heads of 64, 4 x 256 codes. Random weights are right for timing and meaningless for quality. beamline is asked over
HTTP, before and after the other engine; its slower median counts. Both search exactly the same paths, so the items and scores
are compared as well. """

import argparse
import http.client
import json
import pathlib
import platform
import random
import statistics
import subprocess
import tempfile
import time

LEVELS, CODES, ITEMS, HISTORY = 4, 256, 12_000, 20


def make(folder):
    import torch
    from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

    folder.mkdir(parents=True, exist_ok=True)
    special = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.WordLevel({token: i for i, token in enumerate(special)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    names = "abcd"[:LEVELS]
    tokenizer.add_tokens([AddedToken(f"<{name}_{code}>", normalized=False) for name in names for code in range(CODES)])
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>", eos_token="</s>").save_pretrained(
        folder
    )
    torch.manual_seed(0)
    config = T5Config(vocab_size=len(special) + LEVELS * CODES, d_model=128, d_kv=64, d_ff=1024, num_layers=4, num_heads=6,
                      decoder_start_token_id=0, pad_token_id=0, eos_token_id=1)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    dice, sids = random.Random(1), {}
    while len(sids) < ITEMS:
        sids[tuple(dice.randrange(CODES) for _ in range(LEVELS))] = None
    with open(folder / "catalog.jsonl", "w", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"item_id": f"item-{i}", "sid": list(sid)}) + "\n" for i, sid in enumerate(sids))
    (folder / "convention.json").write_text('{"preset": "tiger"}\n')


def wait_until_ready(connection):
    for _ in range(600):
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        answer.read()
        if answer.status == 200:
            return
        time.sleep(0.1)
    raise SystemExit("the server did not become ready within a minute")


def beamline(options, folder, histories):
    command = [
        options.binary,
        "serve",
        "--listen",
        "127.0.0.1:0",
        "--log",
        "error",
        "--threads",
        str(options.threads),
        "--checkpoint",
        folder,
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        connection = http.client.HTTPConnection(server.stdout.readline().split("//")[1].strip())
        wait_until_ready(connection)

        def ask(history, tenant):
            body = {
                "history": [f"item-{i}" for i in history],
                "num_items": options.beams,
                "beam_width": options.beams,
                "tenant": tenant,
            }
            start = time.perf_counter()
            connection.request("POST", "/v1/recommend", json.dumps(body), {"content-type": "application/json"})
            answer = json.loads(connection.getresponse().read())
            return (time.perf_counter() - start) * 1e3, answer

        for history in histories[:3]:
            ask(history, "warm-up")
        cold = [ask(history, "a") for history in histories]
        again = [ask(history, "a") for history in histories]
        assert all(answer["usage"]["cached_tokens"] == 0 for _, answer in cold)
        assert all(answer["usage"]["cached_tokens"] == answer["usage"]["context_tokens"] for _, answer in again)
        assert all(one["items"] == other["items"] for (_, one), (_, other) in zip(cold, again))
        return [statistics.median(took for took, _ in visits) for visits in (cold, again)], [
            answer["items"] for _, answer in cold
        ]
    finally:
        server.terminate()
        server.wait()


def hugging_face(options, folder, histories):
    import torch
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    torch.set_num_threads(options.threads)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = T5ForConditionalGeneration.from_pretrained(folder).eval()
    items = [json.loads(line) for line in (folder / "catalog.jsonl").read_text().splitlines()]
    token = [{code: tokenizer.convert_tokens_to_ids(f"<{name}_{code}>") for code in range(CODES)} for name in "abcd"[:LEVELS]]
    paths = [[token[level][code] for level, code in enumerate(item["sid"])] for item in items]
    allowed, named = {}, {}
    for item, path in zip(items, paths):
        named[tuple(path)] = item["item_id"]
        for end in range(LEVELS):
            allowed.setdefault(tuple(path[:end]), set()).add(path[end])
    allowed = {prefix: sorted(tokens) for prefix, tokens in allowed.items()}

    def ask(history):
        ids = torch.tensor([[token for i in history for token in paths[i]] + [1]])
        start = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                num_beams=options.beams,
                num_return_sequences=options.beams,
                max_new_tokens=LEVELS,
                min_new_tokens=LEVELS,
                do_sample=False,
                length_penalty=0.0,
                early_stopping=True,
                prefix_allowed_tokens_fn=lambda _, path: allowed.get(tuple(path[1:].tolist()), [0]),
                return_dict_in_generate=True,
                output_scores=True,
            )
        took = (time.perf_counter() - start) * 1e3
        return took, [
            (named.get(tuple(path)), score)
            for path, score in zip(found.sequences[:, 1:].tolist(), found.sequences_scores.tolist())
        ]

    ask(histories[0])
    answers = [ask(history) for history in histories]
    return statistics.median(took for took, _ in answers), [found for _, found in answers]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--binary", default="target/release/beamline")
    parser.add_argument("--work", type=pathlib.Path, help="where the checkpoint is made, and kept")
    parser.add_argument("--users", type=int, default=40)
    parser.add_argument("--beams", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = (options.work or pathlib.Path(scratch)) / "tiger"
        if not (folder / "convention.json").exists():
            make(folder)
        dice = random.Random(2)
        histories = [[dice.randrange(ITEMS) for _ in range(HISTORY)] for _ in range(options.users)]
        before, ours = beamline(options, folder, histories)
        theirs_ms, theirs = hugging_face(options, folder, histories)
        after, _ = beamline(options, folder, histories)
    cold, again = (max(pair) for pair in zip(before, after))
    off = [abs(one["score"] - score) for mine, other in zip(ours, theirs) for one, (_, score) in zip(mine, other)]
    result = {
        "machine": platform.processor() or platform.machine(),
        "users": options.users,
        "beams": options.beams,
        "threads": options.threads,
        "cold_ms": round(cold, 2),
        "again_ms": round(again, 2),
        "hugging_face_ms": round(theirs_ms, 1),
        "cold_ratio": round(theirs_ms / cold, 1),
        "again_ratio": round(theirs_ms / again, 1),
        "first_items_equal": sum(mine[0]["item_id"] == other[0][0] for mine, other in zip(ours, theirs)),
        "largest_difference_of_scores": max(off),
    }
    print(json.dumps(result, indent=1))
    if options.out:
        pathlib.Path(options.out).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
