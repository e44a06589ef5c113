"""The TIGER recipe's promises: the last level tells items apart (standard library); and, skipped where torch or transformers is
missing, that the search is exact, that training repeats, and that a server of the written directory answers as PyTorch does (if
there is a binary: $BEAMLINE, or target/release/beamline). Run: python3 -m unittest discover -s weights/tests"""

import contextlib
import importlib.util
import io
import json
import os
import sys
import tempfile
import unittest

WEIGHTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CLIENTS = os.path.join(os.path.dirname(WEIGHTS), "crates", "server", "tests", "clients")
sys.path[:0] = [os.path.join(WEIGHTS, "tiger"), os.path.join(WEIGHTS, "recipe"), WEIGHTS, CLIENTS]
import layout  # noqa: E402
import prepare  # noqa: E402
import server  # noqa: E402

TORCH = all(importlib.util.find_spec(name) for name in ("torch", "transformers"))
needs_torch = unittest.skipUnless(TORCH, "needs torch and transformers")
if not TORCH:
    print("SKIPPED: torch or transformers missing, the TIGER recipe is NOT tested", file=sys.stderr)


def load(name):
    """A file of weights/tiger under a name of its own: other folders have a train.py and an evaluate.py, too."""
    spec = importlib.util.spec_from_file_location(f"tiger_{name}", os.path.join(WEIGHTS, "tiger", f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class LayoutTest(unittest.TestCase):
    def test_items_with_equal_codes_are_told_apart(self):
        codes = [[5, 1, 9], [5, 1, 8], [5, 2, 9], [5, 1, 7]]
        self.assertEqual(layout.told_apart(codes, 2), [[5, 1, 0], [5, 1, 1], [5, 2, 0], [5, 1, 2]])
        # An index that has fewer levels keeps those it has.
        self.assertEqual(layout.told_apart(codes, 7)[0], [5, 1, 9, 0])

    def test_a_convention_says_only_what_the_preset_does_not(self):
        self.assertEqual(layout.convention_of([[255, 0, 0, 0]], 20), {"preset": "tiger"})
        written = layout.convention_of([[4095, 7, 0]], 10)
        self.assertEqual(written["level_code_counts"], [4096, 256, 256])
        self.assertEqual((written["levels"], written["max_history_items"]), (3, 10))
        self.assertEqual(layout.all_fields(written)["decoder_start_token"], "<pad>")


def prepared(folder):
    """A folder of prepare.py with 30 items, some of whom share all codes, and 40 users who walk along them."""
    sids = {str(item): [item % 5, item // 10] for item in range(30)}
    users = [(str(user), [str((user * 7 + step * 3) % 30) for step in range(3 + user % 9)]) for user in range(40)]
    train, validation, test = prepare.leave_one_out(users)
    catalog, _ = prepare.catalog_and_convention(sids)
    parts = {"catalog": catalog, "train": train, "validation": validation, "test": test}
    for name, lines in parts.items():
        prepare.write_lines(os.path.join(folder, f"{name}.jsonl"), lines)


@needs_torch
class TrainTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        import torch

        cls.torch = torch
        cls.train, cls.evaluate = load("train"), load("evaluate")
        temporary = tempfile.TemporaryDirectory()
        cls.addClassCleanup(temporary.cleanup)
        cls.addClassCleanup(torch.use_deterministic_algorithms, False)
        cls.data, cls.out = os.path.join(temporary.name, "data"), os.path.join(temporary.name, "out")
        os.mkdir(cls.data)
        prepared(cls.data)
        cls.said = cls.trained(cls.out)
        cls.directory = cls.evaluate.Directory(cls.out)

    @classmethod
    def trained(cls, out, *options):
        small = ["--hidden", "24", "--heads", "2", "--head-dim", "12", "--feed-forward", "32", "--layers", "1", "--dropout", "0"]
        small += ["--steps", "150", "--lr", "0.01"]
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
            cls.train.main(["--data", cls.data, "--out", out, "--warmup", "5", "--batch-tokens", "400", *small, *options])
        return said.getvalue()

    def evaluated(self, *options):
        with contextlib.redirect_stdout(io.StringIO()) as said, contextlib.redirect_stderr(io.StringIO()):
            status = self.evaluate.main([self.out, "--data", self.data, *options])
        return status, json.loads(said.getvalue())

    def test_examples(self):
        self.assertEqual(self.train.examples([[1, 2, 3, 4], [5]], 2), [([1], 2), ([1, 2], 3), ([2, 3], 4)])

    def test_training_learns_and_repeats(self):
        import safetensors.torch

        self.assertIn("150 steps", self.said)
        # Every user walks in steps of three, so what comes next can be known. By chance a third would be found.
        self.assertGreater(self.evaluated()[1]["recall@10"], 0.6)
        again = self.out + "-again"
        self.trained(again)
        one, other = (safetensors.torch.load_file(os.path.join(path, "model.safetensors")) for path in (self.out, again))
        self.assertEqual(one.keys(), other.keys())
        self.assertTrue(all(self.torch.equal(tensor, other[name]) for name, tensor in one.items()))

    def test_training_ends_in_time(self):
        self.assertNotIn("150 steps", self.trained(self.out + "-short", "--seconds", "0.05"))

    def test_wide_beams_are_exact_whatever_shares_the_batch(self):
        from search import search

        found, torch = self.directory, self.torch
        histories = [[3, 9, 4], [], [29] * 20]
        leaves, scores = search(found.model, found.trie, [], found.paths, histories, beam_width=40)
        for history, row, score in zip(histories, leaves.tolist(), scores.tolist()):
            # Every item alone, the whole path at once.
            ids = [token for item in history for token in found.paths[item]] + [1]
            with torch.no_grad():
                log = found.model(
                    input_ids=torch.tensor([ids] * 30), decoder_input_ids=torch.tensor([[0] + path[:-1] for path in found.paths])
                ).logits.log_softmax(-1)
            whole = log.gather(2, torch.tensor(found.paths)[..., None]).sum((1, 2)).tolist()
            self.assertEqual(len(set(found.trie.leaf)), 30)
            listed = [found.trie.items[leaf][0] for leaf in row[:30]]
            self.assertEqual(sorted(listed), list(range(30)))
            for item, value in zip(listed, score):
                self.assertAlmostEqual(value, whole[item], places=4)
            self.assertEqual(score[:30], sorted(score[:30], reverse=True))

    def test_lists_are_alike_up_to_near_ties(self):
        ours = [("a", -1.0), ("b", -2.0), ("c", -2.00001), ("d", -3.0)]
        alike = self.evaluate.alike
        self.assertTrue(alike(ours, [("a", -1.0), ("c", -2.0), ("b", -2.0), ("d", -3.0)], 1e-4))
        swapped = [("b", -2.0), ("a", -1.0), ("c", -2.0), ("d", -3.0)]
        for wrong in (swapped, ours[:3], ours[:3] + [("e", -3.0)], ours[:3] + [("d", -3.1)]):
            self.assertFalse(alike(ours, wrong, 1e-4))

    def test_a_server_answers_as_pytorch_does(self):
        if not os.path.exists(server.beamline()):
            print(f"SKIPPED: no binary at {server.beamline()}, the TIGER recipe is NOT served", file=sys.stderr)
            self.skipTest(f"no {server.beamline()}")
        with server.Server("--history-cut", "exact", checkpoint=self.out) as running:
            status, result = self.evaluated("--server", running.url)
        self.assertEqual((status, result["users"], result["server"]["alike"]), (0, 40, 40))


if __name__ == "__main__":
    unittest.main()
