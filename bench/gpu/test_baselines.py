"""What the baselines promise: the same exact search twice, and counts that match arithmetic done by hand.

    python -m unittest discover -s bench/gpu

On the CPU, in float32, with tiny models. Skipped loudly where torch or transformers is missing.
"""
import contextlib
import dataclasses
import io
import itertools
import json
import os
import pathlib
import sys
import tempfile
import unittest
import unittest.mock

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

try:
    import numpy as np
    import torch
    import transformers
except ImportError as missing:
    print(f"SKIPPED: the tests of bench/gpu need torch, transformers and numpy ({missing})", file=sys.stderr)
    raise unittest.SkipTest(f"bench/gpu: {missing}") from missing

import attention
import compare
import counts
import floor
import fused
from catalog import build_trie, random_codes
from expand import expand, scored_tokens, scored_tokens_reduced
from graph_stand_in import stand_in
from hf_search import Search, hugging_face_model
from shapes import SHAPES, Shape, shape_named
from shared_prefix import Decoder, Session
from timing import Marks, percentile
from weights import checkpoint_weights, random_weights, tensor_sizes

torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
CPU = torch.device("cpu")
# Weights this wide make scores of neighbours differ by far more than rounding does.
SPREAD = 0.3


def both(shape, trie, users, beams, context, dtype=torch.float32, cache="prefilled", processor="device", tokens=None, **settings):
    """Answers (leaves, scores) of Hugging Face and of the shared prefix for the same contexts."""
    if tokens is None:
        tokens = torch.randint(shape.vocabulary, (users, context), generator=torch.Generator().manual_seed(7))
    answers = []
    with torch.inference_mode():
        model = hugging_face_model(shape, random_weights(shape, CPU, dtype, seed=3, spread=SPREAD))
        answers.append(Search(model, trie, users, beams, context, cache, processor).run(tokens, Marks(CPU)))
        decoder = Decoder(shape, random_weights(shape, CPU, dtype, seed=3, spread=SPREAD), context + shape.levels)
        answers.append(Session(decoder, trie.on(CPU), users, beams, context, **settings).run(tokens, Marks(CPU)))
    return answers


class SameAnswers(unittest.TestCase):
    def check(self, shape, trie, users, beams, context, **settings):
        (leaves, scores), (own_leaves, own_scores) = both(shape, trie, users, beams, context, **settings)
        there = min(beams, trie.nodes(shape.levels))
        for user in range(users):
            exists = torch.isfinite(scores[user])
            self.assertEqual(exists.tolist(), torch.isfinite(own_scores[user]).tolist())
            self.assertLessEqual(int(exists.sum()), there)
            self.assertGreater(int(exists.sum()), 0)
            self.assertEqual(leaves[user][exists].tolist(), own_leaves[user][exists].tolist())
            np.testing.assert_allclose(own_scores[user][exists], scores[user][exists], atol=1e-4)
            self.assertEqual(len(set(leaves[user][exists].tolist())), int(exists.sum()))
        return leaves, scores

    def test_batches_and_beams(self):
        shape = SHAPES["tiny"]
        trie = build_trie(random_codes(500, 3, shape.codebook, seed=1), shape)
        for users, beams in itertools.product((1, 3), (1, 8, 50)):
            with self.subTest(users=users, beams=beams):
                self.check(shape, trie, users, beams, context=21)

    def test_every_cache_and_processor_of_hugging_face(self):
        shape = SHAPES["tiny"]
        trie = build_trie(random_codes(500, 3, shape.codebook, seed=1), shape)
        for cache, processor in (("dynamic", "device"), ("static", "device"), ("prefilled", "prefix_fn")):
            with self.subTest(cache=cache, processor=processor):
                self.check(shape, trie, 2, 8, context=9, cache=cache, processor=processor)

    def test_collisions(self):
        shape = shape_named("tiny", codebook=4)
        codes = random_codes(150, 3, 4, seed=2)
        trie = build_trie(codes, shape)
        self.assertLess(trie.nodes(3), 150)
        leaves, scores = self.check(shape, trie, 2, 50, context=12)
        # An item is found through its leaf, whichever of several it is.
        paths = trie.paths()
        for leaf in leaves[0][torch.isfinite(scores[0])].tolist():
            items = np.flatnonzero(trie.leaf == leaf)
            self.assertGreaterEqual(len(items), 1)
            for item in items:
                self.assertEqual(
                    [shape.first_token(level) + code for level, code in enumerate(codes[item])], paths[leaf].tolist()
                )

    def test_fewer_items_than_beams(self):
        shape = SHAPES["tiny"]
        trie = build_trie(random_codes(20, 3, shape.codebook, seed=5), shape)
        _, scores = self.check(shape, trie, 3, 50, context=10)
        self.assertEqual(torch.isfinite(scores).sum(1).tolist(), [trie.nodes(3)] * 3)

    def test_other_depths_and_untied_heads(self):
        for levels in (1, 2, 4):
            shape = dataclasses.replace(SHAPES["tiny"], levels=levels, tied=False)
            trie = build_trie(random_codes(300, levels, shape.codebook, seed=6), shape)
            with self.subTest(levels=levels):
                self.check(shape, trie, 2, 8, context=11)

    def test_users_and_logits_in_parts(self):
        shape = SHAPES["tiny"]
        trie = build_trie(random_codes(500, 3, shape.codebook, seed=1), shape)
        self.check(shape, trie, 3, 8, context=9, prefill_tokens=18, logit_rows=7)

    def test_the_best_of_all_leaves(self):
        """With as many beams as leaves nothing is cut: the order of all paths, each scored by a plain pass of the model."""
        shape = shape_named("tiny", codebook=4)
        trie = build_trie(random_codes(30, 3, 4, seed=2), shape)
        count, context = trie.nodes(3), 6
        (_, _), (leaves, scores) = both(shape, trie, 1, count, context)
        tokens = torch.randint(shape.vocabulary, (1, context), generator=torch.Generator().manual_seed(7))
        rows = torch.cat((tokens.expand(count, -1), torch.from_numpy(trie.paths())), 1)
        with torch.inference_mode():
            model = hugging_face_model(shape, random_weights(shape, CPU, torch.float32, seed=3, spread=SPREAD))
            logits = model(input_ids=rows).logits[:, context - 1 : -1].log_softmax(-1)
        expected = logits.gather(2, rows[:, context:, None]).sum((1, 2))
        self.assertEqual(leaves[0].tolist(), expected.argsort(descending=True).tolist())
        np.testing.assert_allclose(scores[0], expected.sort(descending=True).values, atol=1e-4)

    def test_bfloat16_within_its_rounding(self):
        shape = SHAPES["tiny"]
        trie = build_trie(random_codes(60, 3, shape.codebook, seed=1), shape)
        (leaves, scores), (own_leaves, own_scores) = both(shape, trie, 1, 60, 12, dtype=torch.bfloat16)
        exact = both(shape, trie, 1, 60, 12)[0]
        by_leaf = lambda found: dict(zip(found[0][0].tolist(), found[1][0].tolist()))  # noqa: E731
        theirs, ours, truth = by_leaf((leaves, scores)), by_leaf((own_leaves, own_scores)), by_leaf(exact)
        shared = [leaf for leaf in truth if np.isfinite(truth[leaf])]
        their_error = max(abs(theirs[leaf] - truth[leaf]) for leaf in shared)
        our_error = max(abs(ours[leaf] - truth[leaf]) for leaf in shared)
        self.assertLess(our_error, 2 * their_error + 0.02)


class Expansion(unittest.TestCase):
    def naive(self, trie, depth, logits, score, node, beams):
        """[(score, parent, node)] of one user, by loops."""
        found = []
        for beam, row in enumerate(logits.log_softmax(-1).tolist()):
            for child in range(trie.first[depth][node[beam]], trie.first[depth][node[beam] + 1]):
                total = score[beam] + row[trie.token[depth][child]]
                if total > float("-inf"):
                    found.append((total, beam, int(child)))
        return sorted(found, reverse=True)[:beams]

    def test_equals_a_naive_search(self):
        shape = SHAPES["tiny"]
        generator = torch.Generator().manual_seed(11)
        # Skewed: most items share the first code, so nodes have from one child to a whole codebook.
        codes = random_codes(400, 3, shape.codebook, seed=9)
        codes[:300, 0] = 3
        trie = build_trie(codes, shape)
        device_trie = trie.on(CPU)
        head = torch.randn(shape.vocabulary, shape.hidden, generator=generator)
        for depth, beams, scorer in itertools.product((0, 1, 2), (1, 7, 40), (scored_tokens, scored_tokens_reduced)):
            n = 1 if depth == 0 else 9
            hidden = torch.randn(2, n, shape.hidden, generator=generator)
            node = torch.randint(trie.nodes(depth), (2, n), generator=generator)
            score = torch.randn(2, n, generator=generator)
            if depth:
                score[:, -2:] = float("-inf")  # beams that do not exist
            with self.subTest(depth=depth, beams=beams, scorer=scorer.__name__):
                new, parent, child, token = expand(device_trie, depth, hidden, head, score, node, beams, 5, scorer)
                self.assertEqual(new.shape, (2, beams))
                for user in range(2):
                    expected = self.naive(trie, depth, hidden[user] @ head.T, score[user].tolist(), node[user].tolist(), beams)
                    count = int(torch.isfinite(new[user]).sum())
                    self.assertEqual(count, len(expected))
                    np.testing.assert_allclose(new[user][:count], [e[0] for e in expected], atol=1e-5)
                    self.assertEqual(parent[user][:count].tolist(), [e[1] for e in expected])
                    self.assertEqual(child[user][:count].tolist(), [e[2] for e in expected])
                    self.assertTrue(bool((parent < n).all() and (child < trie.nodes(depth + 1)).all()))
                    self.assertEqual(token.tolist(), device_trie.token[depth][child].tolist())

    def test_the_trie_holds_the_catalog(self):
        shape = SHAPES["tiny"]
        codes = random_codes(700, 3, shape.codebook, seed=4)
        trie = build_trie(codes, shape)
        tokens = codes + np.array([shape.first_token(level) for level in range(3)])
        self.assertEqual({tuple(path) for path in trie.paths()}, {tuple(path) for path in tokens})
        self.assertEqual(trie.leaves_of(tokens).tolist(), trie.leaf.tolist())
        absent = next(path for path in itertools.product(range(16), repeat=3) if list(path) not in codes.tolist())
        self.assertEqual(trie.leaves_of(np.array([absent]) + tokens[0] - codes[0]).tolist(), [-1])
        self.assertEqual(trie.widest[0], len(set(codes[:, 0])))


class SharedAttention(unittest.TestCase):
    def test_every_way_and_the_merge_equal_plain_attention(self):
        generator = torch.Generator().manual_seed(1)
        normal = lambda *size: torch.randn(size, generator=generator)  # noqa: E731
        users, beams, heads, group, width, context, n = 2, 5, 2, 3, 8, 256, 2
        query = normal(users, beams, heads, group, width)
        key, value = normal(users, context, heads, width), normal(users, context, heads, width)
        slots_key, slots_value = normal(40, heads, width), normal(40, heads, width)
        rows = torch.randint(40, (users, beams, n), generator=generator)
        flat = query.transpose(1, 2).reshape(users, heads, beams * group, width)
        ways = attention.ways(CPU, context) | {"in parts": attention.in_parts(attention.products, 4)}
        for name, way in ways.items():
            out, total = way(flat, key.transpose(1, 2), value.transpose(1, 2))
            merged = fused.merge(out, total, query, slots_key, slots_value, rows, width**-0.5)
            for user, beam, head in itertools.product(range(users), range(beams), range(heads)):
                keys = torch.cat((key[user, :, head], slots_key[rows[user, beam], head]))
                values = torch.cat((value[user, :, head], slots_value[rows[user, beam], head]))
                expected = (query[user, beam, head] @ keys.T * width**-0.5).softmax(-1) @ values
                found = merged[user, beam].view(heads, group, width)[head]
                with self.subTest(way=name, user=user, beam=beam, head=head):
                    np.testing.assert_allclose(found, expected, atol=1e-5)


    def test_a_wrong_way_is_never_chosen(self):
        generator = torch.Generator().manual_seed(2)
        query, key, value = (torch.randn(1, 2, n, 16, generator=generator).bfloat16() for n in (6, 256, 256))
        right = attention.products

        def too_small(*inputs):
            out, total = right(*inputs)
            return out, total - 0.7

        def unscaled(query, key, value):
            return right(2 * query, key, value)

        for wrong in (too_small, unscaled):
            with unittest.mock.patch.object(attention, "ways", lambda *_: {"wrong": wrong, "right": right}):
                self.assertEqual(attention.choose(query, key, value, 1 << 30)[0], "right")


class Graphs(unittest.TestCase):
    """What can be said of CUDA graphs without CUDA."""

    def test_replayed_phases_answer_like_plain_ones(self):
        shape = SHAPES["tiny"]
        trie = build_trie(random_codes(500, 3, shape.codebook, seed=1), shape).on(CPU)
        generator = torch.Generator().manual_seed(7)
        contexts = [torch.randint(shape.vocabulary, (2, 14), generator=generator) for _ in range(3)]
        with torch.inference_mode():
            decoder = Decoder(shape, random_weights(shape, CPU, torch.float32, seed=3, spread=SPREAD), 20)
            plain = Session(decoder, trie, 2, 9, 14)
            # With and without a graph of the prefill.
            for limit, phases in ((1000, 3), (10, 2)):
                with stand_in():
                    graphed = Session(decoder, trie, 2, 9, 14, graphs=True, graph_prefill_tokens=limit)
                    self.assertEqual(sum(graph is not None for graph in graphed.graphs), phases)
                    for context in contexts:
                        leaves, scores = plain.run(context, Marks(CPU))
                        found, found_scores = graphed.run(context, Marks(CPU))
                        self.assertEqual(leaves.tolist(), found.tolist())
                        np.testing.assert_allclose(found_scores, scores, atol=1e-5)

    def test_no_phase_asks_for_a_value(self):
        """Tensors without values, called CUDA's: an operation that needs one on the host, or sizes that do not fit, raise."""
        from torch._subclasses.fake_tensor import FakeTensorMode
        shape, device = dataclasses.replace(SHAPES["qwen3-1.7b"], layers=2), torch.device("cuda")
        trie = build_trie(random_codes(20_000, 3, shape.codebook), shape)
        context = 1000

        def causal(query, key, value):  # the public function refuses to choose a kernel without a device
            return torch.empty_like(query.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)

        for name, way in attention.ways(device, context).items():
            with self.subTest(way=name), FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode(), \
                 unittest.mock.patch.object(attention, "choose_causal", lambda *_: ("causal", causal)), \
                 unittest.mock.patch.object(attention, "choose", lambda *_, way=way: ("way", way)):
                like = lambda arrays: [torch.empty(len(a), dtype=torch.long, device=device) for a in arrays]  # noqa: E731
                tensors = dataclasses.replace(trie, first=like(trie.first), token=like(trie.token))
                weights = {n: torch.empty(size, device=device, dtype=torch.bfloat16) for n, size in tensor_sizes(shape).items()}
                session = Session(Decoder(shape, weights, context + 3), tensors, 4, 256, context, graphs=False)
                state = session.prefill()
                for depth in (1, 2):
                    state = session.step(depth, state)
                self.assertEqual([tuple(t.shape) for t in state], [(4, 256)] * 3 + [(4, 256, 2)])
                self.assertEqual({t.device.type for t in state}, {"cuda"})


class Counts(unittest.TestCase):
    def test_by_hand(self):
        shape = Shape(
            "by hand",
            hidden=4,
            layers=2,
            heads=2,
            kv_heads=1,
            head_dim=3,
            intermediate=5,
            tied=True,
            text_vocabulary=7,
            codebook=1,
        )
        # A layer: 24 + 24 + 60 weights beside 24 of keys and values. With the head 2 * 132 + 40 = 304.
        self.assertEqual(counts.weight_values(shape), 304)
        prefill, first, second = counts.request(shape, users=2, beams=5, context=3)
        # 6 rows: keys and values in 2 layers, the rest in 1; then the rest of the last layer for 2 rows.
        self.assertEqual(prefill.products, 2 * 6 * (2 * 24 + 108) + 2 * 2 * 108)
        # Keys seen: 1 + 2 + 3 in the first layer, 3 by the last row in the second; 6 values wide, twice, 2 users.
        self.assertEqual(prefill.attention, 2 * 2 * 6 * (6 + 3) * 2)
        self.assertEqual(prefill.head, 2 * 2 * 4 * 10)
        self.assertEqual(prefill.bytes, 2 * (304 + 72))
        # 10 rows, 2 layers; each sees 3 keys of context and itself, then an ancestor more.
        self.assertEqual((first.products, second.products), (5280, 5280))
        self.assertEqual((first.attention, second.attention), (1920, 2400))
        self.assertEqual((first.head, second.head), (800, 800))
        self.assertEqual((first.bytes, second.bytes), (992, 1232))
        self.assertEqual(counts.floor_ms(first, tflops=8e-6, gigabytes=1.0), 1.0)
        self.assertEqual(counts.floor_ms(first, tflops=1.0, gigabytes=992e-6), 1.0)

    def test_weights_are_those_that_are_made(self):
        for shape in SHAPES.values():
            matrices = {name: size for name, size in tensor_sizes(shape).items() if len(size) == 2}
            if not shape.tied:
                del matrices["model.embed_tokens.weight"]  # few rows of it are read
            self.assertEqual(counts.weight_values(shape), sum(rows * columns for rows, columns in matrices.values()), shape.name)
            joined = floor.matrices(shape)
            per_layer = sum(i * o for name, (i, o) in joined.items() if name != "head")
            self.assertEqual(counts.weight_values(shape), shape.layers * per_layer + joined["head"][0] * joined["head"][1])


class Comparing(unittest.TestCase):
    POINT = {"shape": "qwen3-1.7b", "levels": 3, "batch": 1, "beam": 256, "context": 1000}

    def report(self, *lines):
        output = io.StringIO()
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(output):
            path = pathlib.Path(folder, "lines.jsonl")
            path.write_text("".join(json.dumps({**self.POINT, **line}) + "\n" for line in lines))
            compare.main([str(path)])
        return output.getvalue()

    def measured(self, engine, ms, gpu="A", **more):
        return {
            "engine": engine,
            "median_ms": ms,
            "p90_ms": ms + 1,
            "prefill_ms": ms / 2,
            "step_ms": [ms / 4, ms / 4],
            "gpu": gpu,
            "torch": "2",
            "items": 10,
            **more,
        }

    def test_ratios_and_shares(self):
        text = self.report(self.measured("beamline", 10.0), self.measured("shared_prefix", 15.0), self.measured("floor", 4.0))
        self.assertIn("| 1 | 256 | 1000 | 10.00 (11.00) | 15.00 (16.00), 1.50x |", text)
        self.assertIn("| 1 | 256 | 1000 | 40% | 27% |", text)
        self.assertIn("5.00 + 2.50 + 2.50 | 7.50 + 3.75 + 3.75", text)

    def test_gaps_are_marked(self):
        text = self.report(self.measured("beamline", 10.0), {"engine": "hf_prefilled", "skipped": "out of memory", "gpu": "A"},
                           {**self.measured("shared_prefix", 5.0), "beam": 32})
        self.assertIn("| 1 | 256 | 1000 | 10.00 (11.00) | [1] | — |", text)
        self.assertIn("| 1 | 32 | 1000 | — | — | 5.00 (6.00) |", text)
        self.assertIn("[1] out of memory", text)

    def test_no_ratio_between_different_gpus_or_to_published_figures(self):
        text = self.report(
            self.measured("beamline", 10.0),
            self.measured("shared_prefix", 15.0, gpu="B"),
            self.measured("floor", 4.0, gpu="B"),
            self.measured("theirs", 20.0, published="somewhere"),
        )
        self.assertNotRegex(text, r"\d+\.\d\dx")
        self.assertIn("on another GPU than beamline: B", text)
        self.assertIn("published, not measured here", text)
        self.assertIn("| 1 | 256 | 1000 | — | 27% |", text)

    def test_the_published_figures_are_lines_like_others(self):
        published = pathlib.Path(__file__).with_name("published.jsonl")
        points, _, superseded, _ = compare.read([str(published)])
        self.assertEqual((len(points), superseded), (8, 0))
        self.assertEqual(points[("qwen3-1.7b", 3, 8, 256, 5000)]["NVIDIA sid-gr-inference"]["median_ms"], 307.917)


class Smoke(unittest.TestCase):
    """Each script from flags to JSON lines, on the CPU."""

    def run_script(self, main, *arguments):
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            main(list(arguments))
        return [json.loads(line) for line in output.getvalue().splitlines() if line.startswith("{")]

    def test_floor(self):
        rates, point = self.run_script(floor.main, "--cpu", "--seconds", "0.01", "--points", "2x8x20")
        self.assertGreater(rates["tflops"], 0)
        self.assertGreater(rates["gbps"], 0)
        self.assertEqual((point["engine"], point["batch"], point["beam"], point["context"]), ("floor", 2, 8, 20))
        (given,) = self.run_script(floor.main, "--tflops", "1000", "--gbps", "1e9", "--points", "1x256x1000")
        # 1.7 B parameters, 1.4 B of them met by each of 1,000 rows and all by 2 x 256: 2.7 + 2 x 0.9 TFLOP, and attention.
        self.assertGreater(given["median_ms"], 4.5)
        self.assertLess(given["median_ms"], 4.9)

    def test_weights_of_a_checkpoint(self):
        from safetensors.torch import save_file
        shape = SHAPES["tiny"]
        made = random_weights(shape, CPU, torch.float32, seed=1)
        with tempfile.TemporaryDirectory() as folder:
            save_file(made, os.path.join(folder, "model.safetensors"))
            read = checkpoint_weights(shape, folder, CPU, torch.float32)
            with self.assertRaises(SystemExit):
                checkpoint_weights(shape_named("tiny", codebook=4), folder, CPU, torch.float32)
        self.assertTrue(all(torch.equal(read[name], made[name]) for name in made))

    def test_baselines(self):
        import hf_baseline
        import shared_prefix_baseline

        quick = [
            "--cpu",
            "--points",
            "1x8x20,2x4x9",
            "--items",
            "300",
            "--least",
            "1",
            "--most",
            "1",
            "--warmup",
            "1",
            "--budget",
            "0",
        ]
        for main, engine in ((shared_prefix_baseline.main, "shared_prefix"), (hf_baseline.main, "hf_prefilled")):
            lines = self.run_script(main, *quick)
            self.assertEqual([(line["batch"], line["beam"], line["context"]) for line in lines], [(1, 8, 20), (2, 4, 9)])
            for line in lines:
                self.assertEqual((line["engine"], line["shape"], line["levels"], line["items"]), (engine, "tiny", 3, 300))
                self.assertEqual(len(line["step_ms"]), 2)
                self.assertLessEqual(line["prefill_ms"] + sum(line["step_ms"]), line["median_ms"] + 0.01)
                self.assertGreater(line["median_ms"], 0)
                self.assertEqual({"p90_ms", "peak_bytes", "torch", "gpu"} - set(line), set())

    def test_both_scripts_answer_alike(self):
        import hf_baseline
        import shared_prefix_baseline
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "answers.jsonl")
            quick = [
                "--cpu",
                "--points",
                "2x6x15",
                "--items",
                "300",
                "--least",
                "1",
                "--most",
                "1",
                "--warmup",
                "0",
                "--answers",
                path,
            ]
            self.run_script(shared_prefix_baseline.main, *quick)
            self.run_script(hf_baseline.main, *quick)
            one, other = map(json.loads, pathlib.Path(path).read_text().splitlines())
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-4)

    def test_a_point_that_is_too_late_says_so(self):
        import shared_prefix_baseline
        lines = self.run_script(shared_prefix_baseline.main, "--cpu", "--points", "1x2x5", "--items", "50", "--time-limit", "-1")
        self.assertEqual(lines[0]["skipped"], "time limit")

    def test_percentile(self):
        self.assertEqual(percentile(range(1, 11), 0.9), 9)
        self.assertEqual(percentile([5.0], 0.9), 5.0)
        self.assertEqual(percentile([1, 2, 3, 4, 5], 0.9), 5)


if __name__ == "__main__":
    unittest.main()
