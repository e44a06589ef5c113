"""The training recipe's promises: data preparation (standard library), and the arithmetic of soft targets, branches and beams
(skipped where torch, numpy or transformers are missing). Run: python3 -m unittest discover -s weights/tests"""

import importlib.util
import json
import math
import os
import sys
import tempfile
import unittest

RECIPE = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "recipe")
sys.path.insert(0, RECIPE)
import prepare  # noqa: E402

TORCH = all(importlib.util.find_spec(name) for name in ("torch", "numpy", "scipy", "transformers"))
needs_torch = unittest.skipUnless(TORCH, "needs torch, numpy, scipy and transformers")


class PrepareTest(unittest.TestCase):
    def read(self, text, offset=0):
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "sequences")
            with open(path, "w", encoding="utf-8") as file:
                file.write(text)
            return prepare.read_sequences(path, offset)

    def test_sequences(self):
        self.assertEqual(self.read("7 1 2 3\n\n8 4 5\n", -1), [("7", ["0", "1", "2"]), ("8", ["3", "4"])])
        self.assertEqual(self.read('{"user_id": "u", "items": ["shoe", 4]}\n'), [("u", ["shoe", "4"])])
        with self.assertRaises(SystemExit):
            self.read("u shoe hat\n", -1)

    def test_catalog_of_tokens(self):
        catalog, convention = prepare.catalog_and_convention(
            {"10": ["<a_3>", "<b_0>"], "9": ["<a_1>", "<b_7>"], "11": ["<a_3>", "<b_0>"]}
        )
        # by number, not by text: 9 before 10
        self.assertEqual([item["item_id"] for item in catalog], ["9", "10", "11"])
        self.assertEqual(convention["level_token_patterns"], ["<a_{}>", "<b_{}>"])
        self.assertEqual(convention["level_code_counts"], [4, 8])
        # two codes a level, and four tokens of the tokenizer's own
        self.assertEqual((convention["vocab_size"], convention["levels"], convention["generated_steps"]), (8, 2, 2))

    def test_codes_become_tokens(self):
        codes, _ = prepare.catalog_and_convention({"0": [3, 0], "1": [1, 7]})
        tokens, _ = prepare.catalog_and_convention({"0": ["<a_3>", "<b_0>"], "1": ["<a_1>", "<b_7>"]})
        self.assertEqual(codes, tokens)

    def test_damaged_indexes_are_refused(self):
        for sids in ({"0": [1, 2], "1": [1]}, {"0": ["<a_1>"], "1": ["<b_1>"]}, {"0": ["<a_x>"]}, {"0": ["<a_1>", "<a_2>"]}):
            with self.assertRaises(SystemExit, msg=str(sids)):
                prepare.catalog_and_convention(sids)

    def test_leave_one_out(self):
        train, validation, test = prepare.leave_one_out([("u", list("abcd")), ("v", list("xy"))])
        self.assertEqual([user["items"] for user in train], [["a", "b"], ["x", "y"]])
        self.assertEqual(validation, [{"user_id": "u", "history": ["a", "b"], "target": "c"}])
        self.assertEqual(test, [{"user_id": "u", "history": ["a", "b", "c"], "target": "d"}])

    def test_command(self):
        with tempfile.TemporaryDirectory() as folder:
            paths = {name: os.path.join(folder, name) for name in ("sequences.txt", "sids.json", "out")}
            with open(paths["sequences.txt"], "w", encoding="utf-8") as file:
                file.write("1 1 2 3\n")
            with open(paths["sids.json"], "w", encoding="utf-8") as file:
                json.dump({"0": [0, 0], "1": [0, 1], "2": [1, 0]}, file)
            command = ["prepare.py", "--sequences", paths["sequences.txt"], "--sids", paths["sids.json"], "--out", paths["out"]]
            before = sys.argv
            try:
                sys.argv = command
                with self.assertRaises(SystemExit):  # item 3 is not in the index: the offset is missing
                    prepare.main()
                sys.argv = command + ["--item-offset", "-1"]
                prepare.main()
            finally:
                sys.argv = before
            with open(os.path.join(paths["out"], "test.jsonl"), encoding="utf-8") as file:
                self.assertEqual(json.loads(file.read()), {"user_id": "1", "history": ["0", "1"], "target": "2"})


@needs_torch
class SoftTargetTest(unittest.TestCase):
    """Four items <- (0,2) (0,3) (1,2) (0,2): the first and the last share everything."""

    def setUp(self):
        import torch

        self.torch = torch
        self.tokens = torch.tensor([[[0, 2], [0, 3], [1, 2], [0, 2]]])
        self.q = torch.tensor([[0.1, 0.3, 0.4, 0.2]])

    def dense(self, path):
        import soft_targets

        weights = soft_targets.conditionals(self.tokens, self.q, self.torch.tensor([path]))
        dense = self.torch.zeros(1, 2, 4).scatter_add(2, self.tokens.transpose(1, 2), weights)
        return [[round(value, 6) for value in level] for level in dense[0].tolist()]

    def test_marginals_along_a_path(self):
        self.assertEqual(self.dense([0, 2]), [[0.6, 0.4, 0, 0], [0, 0, 0.5, 0.5]])
        self.assertEqual(self.dense([1, 2]), [[0.6, 0.4, 0, 0], [0, 0, 1.0, 0]])

    def test_prefix_without_mass_teaches_nothing(self):
        self.assertEqual(self.dense([3, 2]), [[0.6, 0.4, 0, 0], [0, 0, 0, 0]])

    def test_chain_rule(self):
        """Averaged over paths drawn from q, the levels sum to the cross-entropy over whole semantic IDs."""
        import soft_targets

        torch = self.torch
        logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
        first, after = logits[0], {0: logits[1], 1: logits[2]}  # p(. ) and p(. | first token)
        items = self.tokens[0].tolist()
        whole = -sum(q * (first[a] + after[a][b]) for q, (a, b) in zip(self.q[0].tolist(), items))
        mean = 0.0
        for q, (a, b) in zip(self.q[0].tolist(), items):
            weights = soft_targets.conditionals(self.tokens, self.q, torch.tensor([[a, b]]))
            log = torch.stack([first, after[a]])[None]
            mean += q * soft_targets.soft_cross_entropy(log, self.tokens, weights).sum()
        self.assertAlmostEqual(float(mean), float(whole), places=5)


def tiny_model(torch, vocabulary):
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        intermediate_size=24,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        attn_implementation="sdpa",
        initializer_range=0.5,
    )
    return Qwen3ForCausalLM(config).eval()


@needs_torch
class BranchTest(unittest.TestCase):
    def test_a_branch_is_the_history_with_another_item(self):
        import torch

        import branches

        model = tiny_model(torch, 12)
        stream, other = [0, 1, 5, 9, 2, 6, 10, 3, 7, 11], [4, 8]  # a start token and three items of three tokens; another item
        mask, positions = branches.layout(3, 3)
        run = lambda ids, **options: model.model(input_ids=torch.tensor([ids]), use_cache=False, **options).last_hidden_state[0]  # noqa: E731
        with torch.no_grad():
            straight = run(stream)
            for after in (1, 2, 3):
                branch = [0] * (2 * after - 2) + other + [0] * (6 - 2 * after)
                hidden = run(stream + branch, attention_mask=mask[None, None], position_ids=positions[None])
                instead = run(stream[: 1 + 3 * after] + other)
                torch.testing.assert_close(hidden[:10], straight, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(hidden[8 + 2 * after : 10 + 2 * after], instead[-2:], rtol=1e-4, atol=1e-4)


@needs_torch
class DistillTest(unittest.TestCase):
    def test_histories(self):
        import random

        import distill

        sequences = [[0, 1, 2, 3, 4, 5], [2], [3, 1]]
        made = distill.histories(sequences, 6, 2, 1)
        self.assertEqual(made[:3], sequences)
        self.assertEqual(made[-6:], [[item] for item in range(6)])
        for copy in made[3:-6]:
            self.assertTrue(copy)
            self.assertEqual(len(set(copy)), len(copy))
            self.assertTrue(set(copy) <= set(sequences[0]) or set(copy) <= set(sequences[2]))
        self.assertEqual(made, distill.histories(sequences, 6, 2, 1))
        self.assertLess(len(distill.altered(list(range(200)), random.Random(0))), 180)

    def loss(self, sequences, numbers, unseen=(), given=1):
        """Of a tiny model, over four items of two codes each; a teacher that knows what comes after any item but the last one."""
        import numpy
        import torch

        import distill
        import item_model

        columns = numpy.array([[[1, 2], [2, 0], [3, 0], [0, 1]]])
        scores = numpy.array([[[0.6, 0.2], [0.9, 0.1], [0.5, 0.5], [0.0, 0.0]]])
        paths = [[1, 4], [1, 5], [2, 4], [3, 4]]
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.npz")
            item_model.save(path, columns, scores, [1.0], [1.0])
            teacher = distill.Teacher(path, sequences, 2, 1.0)
        model = tiny_model(torch, 6)
        torch.manual_seed(3)
        with torch.no_grad():
            return paths, model, distill.Loss(model, paths, [0], teacher, set(unseen), given)(numbers, sequences)

    def test_loss_after_one_item(self):
        """Item 1 is followed by item 2 (0.9 of 1.0; item 0 otherwise), and no first item counts: both levels by hand."""
        import torch

        paths, model, (loss, levels) = self.loss([[0], [1]], [1], given=0)
        with torch.no_grad():
            log = lambda ids: model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(-1)  # noqa: E731
            first = log([0, 1, 5])
            wanted = -(0.9 * first[2] + 0.1 * first[1])
            later = {code: -log([0, 1, 5, code])[4] for code in (1, 2)}  # whichever is drawn, one item is left
        self.assertAlmostEqual(float(levels[0]), float(wanted), places=4)
        self.assertTrue(any(abs(float(levels[1] - value)) < 1e-4 for value in later.values()))
        self.assertAlmostEqual(float(loss), float(levels.mean()), places=5)

    def test_what_validation_asks_and_what_the_teacher_does_not_know_is_not_learned(self):
        sequences = [[0, 1], [2, 3]]
        whole = self.loss(sequences, [0], given=0)[2][1][0]
        without_end = self.loss(sequences, [0], unseen=[0], given=0)[2][1][0]
        alone = self.loss([[0]], [0], given=0)[2][1][0]
        self.assertAlmostEqual(float(without_end), float(alone), places=4)
        self.assertNotAlmostEqual(float(whole), float(alone), places=3)
        # After item 3 nothing is known but what followed item 2.
        self.assertGreater(float(self.loss([[3]], [0])[2][0]), 0)  # the first item alone is learned

    def test_first_embeddings_add_up_to_the_points(self):
        import numpy
        import torch

        import distill

        paths = [[1, 4], [1, 5], [2, 4], [3, 4]]
        points = numpy.eye(4, 8, dtype=numpy.float32)
        model = tiny_model(torch, 6)
        distill.start_from(points, paths, model)
        rows = model.model.embed_tokens.weight.detach()
        sums = torch.stack([rows[a] + rows[b] for a, b in paths])[:, :8]
        likeness = torch.nn.functional.cosine_similarity(sums[:, None], torch.from_numpy(points)[None], dim=2)
        self.assertEqual(likeness.argmax(1).tolist(), [0, 1, 2, 3])
        torch.testing.assert_close(model.lm_head.weight.detach()[1:, :8], 0.1 * rows[1:, :8])


@needs_torch
class BeamTest(unittest.TestCase):
    def setUp(self):
        import torch

        import beam

        self.beam, self.torch = beam, torch
        self.model = tiny_model(torch, 10)
        self.paths = [[1, 4, 7], [1, 5, 7], [2, 4, 8], [1, 4, 9], [3, 6, 7], [1, 4, 7]]  # the first and the last item collide
        self.trie = beam.Trie(self.paths)

    def scores(self, history):
        """Score of every item, one full forward pass each."""
        prompt = [0] + [token for item in history for token in self.paths[item]]
        scores = []
        for path in self.paths:
            with self.torch.no_grad():
                log = self.model(input_ids=self.torch.tensor([prompt + path])).logits[0].log_softmax(-1)
            scores.append(float(sum(log[len(prompt) - 1 + at, token] for at, token in enumerate(path))))
        return scores

    def test_wide_beams_are_exact_whatever_shares_the_batch(self):
        histories = [[2], [0, 3, 4], []]
        leaves, scores = self.beam.search(self.model, self.trie, [0], self.paths, histories, beam_width=10)
        for history, row, found in zip(histories, leaves.tolist(), scores.tolist()):
            wanted = {self.trie.leaf[item]: score for item, score in enumerate(self.scores(history))}
            self.assertEqual(len(wanted), 5)
            best = sorted(wanted, key=lambda leaf: -wanted[leaf])
            self.assertEqual(row[:5], best)
            for leaf, score in zip(best, found):
                self.assertTrue(math.isclose(score, wanted[leaf], abs_tol=1e-3))

    def test_recall_counts_items_in_catalog_order_and_excludes_the_history(self):
        # Everything fits into ten places, so each target is found, unless it is history.
        users = [([2], 5), ([2, 0], 0)]
        self.assertEqual(self.beam.recall(self.model, self.trie, [0], self.paths, users)[0], 1.0)
        self.assertEqual(self.beam.recall(self.model, self.trie, [0], self.paths, users, exclude_history=True)[0], 0.5)
        # The colliding pair takes two places: item 5 stands right behind item 0.
        order = sorted(range(6), key=lambda item: (-self.scores([2])[item], item))
        gain = self.beam.recall(self.model, self.trie, [0], self.paths, [([2], 5)])[1]
        self.assertAlmostEqual(gain, 1 / math.log2(order.index(5) + 2), places=5)


@needs_torch
class ItemModelTest(unittest.TestCase):
    def test_what_followed_comes_first(self):
        import item_model

        sequences = [[0, 1, 2], [3, 1, 2], [0, 1, 4], [5, 0, 1]]
        matrix = item_model.fit(sequences, 6, 0.1, 1.0)
        items, scores = item_model.largest(matrix, 6)
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.npz")
            item_model.save(path, items[None], scores[None], [1.0], [1.0])
            found, value = item_model.ItemModel(path).best([[0], [0, 1]], 3)
        self.assertEqual(found[0, 0], 1)
        self.assertEqual(found[1, 0], 2)
        self.assertNotIn(1, found[1][value[1] > 0])  # history is left out

    def test_closed_form(self):
        import numpy

        import item_model

        # One pair 0 -> 1 seen n times: B[0, 1] = n / (n + ridge).
        matrix = item_model.fit([[0, 1]] * 6, 3, 2.0, 1.0)
        self.assertAlmostEqual(float(matrix[0, 1]), 6 / 8, places=6)
        self.assertAlmostEqual(float(numpy.abs(matrix).sum()), 6 / 8, places=6)


    def test_components_add_up(self):
        import numpy

        import item_model

        items, scores = numpy.array([[[1, 2], [2, 0], [0, 1]]]), numpy.array([[[0.5, 0.1], [0.5, 0.1], [0.5, 0.1]]])
        with tempfile.TemporaryDirectory() as folder:
            path = os.path.join(folder, "model.npz")
            item_model.save(path, numpy.concatenate([items, items]), numpy.concatenate([scores, scores]), [1.0, 2.0], [1.0, 0.5])
            found, value = item_model.ItemModel(path).best([[2, 0]], 2, exclude_history=False)
        # item 0 counts in full, item 2 with exp(-1) and exp(-1/2)
        older = math.exp(-1) + 0.5 * math.exp(-0.5)
        self.assertEqual(found[0].tolist(), [1, 0])
        self.assertAlmostEqual(float(value[0, 0]), 0.5 * 1.5 + 0.1 * older, places=5)
        self.assertAlmostEqual(float(value[0, 1]), 0.5 * older, places=5)


@needs_torch
class IndexTest(unittest.TestCase):
    def test_capacity_is_kept_and_the_surest_choose_first(self):
        import numpy

        import build_index

        likeness = numpy.array([[0.9, 0.1], [0.8, 0.2], [0.95, 0.0]])
        self.assertEqual(build_index.within_capacity(likeness, 2).tolist(), [0, 1, 0])

    def test_codes_of_a_group_differ(self):
        import numpy

        import build_index

        # Items 0 and 1 may not both have code 0; together they lose least if item 0 keeps it. Item 2 is alone and free.
        likeness = numpy.array([[0.9, 0.1], [0.8, 0.7], [0.6, 0.5]])
        self.assertEqual(build_index.all_different(["x", "x", "y"], likeness).tolist(), [0, 1, 0])
        with self.assertRaises(SystemExit):
            build_index.all_different(["x"] * 3, likeness)

    def test_neighbours_share_codes_and_all_ids_differ(self):
        import numpy

        import build_index

        # Two worlds of twelve items each; an item's successors are the others of its world.
        worlds = [list(range(12)), list(range(12, 24))]
        columns = numpy.array([[other for other in world if other != item] for world in worlds for item in world])
        points = build_index.embed(columns, numpy.ones(columns.shape), 11, 4, 1)
        sids = build_index.semantic_ids(points, [16, 2], 1.0, 1)
        self.assertEqual(len({tuple(sid) for sid in sids}), 24)
        self.assertEqual([len({sids[item][1] for item in world}) for world in worlds], [1, 1])
        self.assertNotEqual(sids[0][1], sids[23][1])
        self.assertEqual(sids, build_index.semantic_ids(points, [16, 2], 1.0, 1))


if __name__ == "__main__":
    unittest.main()
