"""The demo world keeps its promises. Standard library only: python3 -m unittest discover -s weights/tests"""

import json
import math
import os
import re
import sys
import tempfile
import unittest

DEMO = os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "demo")
sys.path.insert(0, DEMO)
import world as demo  # noqa: E402


def read_lines(name):
    with open(os.path.join(DEMO, name), encoding="utf-8") as file:
        return [json.loads(line) for line in file]


class WorldTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.world = demo.World()
        cls.oracle = demo.Oracle(cls.world)

    def test_same_seed_same_world(self):
        other = demo.World()
        self.assertEqual(other.items, self.world.items)
        self.assertEqual(other.complements, self.world.complements)
        # shoppers do not depend on which were drawn before
        self.assertEqual([other.shopper(n) for n in (7, 3)], [self.world.shopper(n) for n in (3, 7)][::-1])
        self.assertNotEqual(self.world.shopper(3), self.world.shopper(7))
        self.assertNotEqual(demo.World(demo.SEED + 1).items, self.world.items)

    def test_catalog(self):
        items = self.world.items
        self.assertTrue(2500 <= len(items) <= 3500)
        self.assertEqual(len({item["item_id"] for item in items}), len(items))
        self.assertEqual(len({item["title"] for item in items}), len(items))
        for item in items:
            self.assertRegex(item["item_id"], r"^[a-z0-9]+(-[a-z0-9]+)*$")
            self.assertEqual(list(item), ["item_id", "sid", "tags", "title"])
            self.assertEqual(len(set(item["tags"])), len(item["tags"]))
            for prefix in ("dept:", "cat:", "price:"):
                self.assertEqual(sum(tag.startswith(prefix) for tag in item["tags"]), 1)

    def test_sids_follow_the_hierarchy(self):
        counts = demo.convention(self.world)["level_code_counts"]
        by_sid = {}
        for number, item in enumerate(self.world.items):
            self.assertEqual(len(item["sid"]), 3)
            for code, count in zip(item["sid"], counts):
                self.assertTrue(0 <= code < count)
            by_sid.setdefault(tuple(item["sid"]), []).append(number)
        collisions = [numbers for numbers in by_sid.values() if len(numbers) > 1]
        self.assertTrue(20 <= len(collisions) <= 300)
        for numbers in collisions:  # only shades of one line share an ID
            self.assertEqual(len({self.world.line_of[n] for n in numbers}), 1)

    def test_committed_files_are_the_generators(self):
        self.assertEqual(read_lines("catalog.jsonl"), self.world.items)
        self.assertEqual(read_lines("sample_requests.jsonl"), list(demo.sample_requests(self.world)))
        with open(os.path.join(DEMO, "convention.json"), encoding="utf-8") as file:
            self.assertEqual(json.load(file), demo.convention(self.world))

    def test_sample_requests(self):
        requests = read_lines("sample_requests.jsonl")
        self.assertEqual(len(requests), 20)
        for request in requests:
            self.assertEqual(set(request), {"user_id", "history", "num_items"})
            self.assertGreaterEqual(len(request["history"]), 5)
            times = [event["timestamp"] for event in request["history"]]
            self.assertEqual(times, sorted(times))
            self.assertTrue(all(event["item_id"] in self.world.item_number for event in request["history"]))

    def test_sequences_command(self):
        with tempfile.TemporaryDirectory() as folder:
            argv, sys.argv = sys.argv, ["world.py", "sequences", "--out", folder, "--train-users", "3", "--test-users", "2"]
            try:
                demo.main()
            finally:
                sys.argv = argv
            with open(os.path.join(folder, "train.jsonl"), encoding="utf-8") as file:
                train = [json.loads(line) for line in file]
            self.assertEqual([r["items"] for r in train], [self.world.ids(self.world.shopper(n)) for n in range(3)])
            self.assertTrue(os.path.exists(os.path.join(folder, "test.jsonl")))


class OracleTest(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        cls.world = demo.World()
        cls.oracle = demo.Oracle(cls.world)

    def histories(self):
        shopper = self.world.shopper(demo.FIRST_HELD_OUT)
        return [[], shopper[:1], shopper[:2], shopper[:-1], self.world.shopper(11)]

    def test_probabilities_sum_to_one(self):
        self.assertAlmostEqual(math.fsum(demo.WEIGHTS.values()), 1.0, places=12)
        for history in self.histories():
            probabilities = self.oracle.predict(history)
            self.assertAlmostEqual(math.fsum(probabilities), 1.0, places=10)
            self.assertGreater(min(probabilities), 0.0)
            self.assertAlmostEqual(math.fsum(self.oracle.mood(history)), 1.0, places=10)
        for row in self.world.drift:
            self.assertAlmostEqual(math.fsum(row), 1.0, places=12)

    def test_forward_algorithm_against_enumeration(self):
        """p(next | history) from the sum over all mood paths, for a short history."""
        import itertools

        history = self.world.shopper(5)[:3]
        world, total, joint = self.world, 0.0, [0.0] * demo.CLUSTERS
        for path in itertools.product(range(demo.CLUSTERS), repeat=4):
            p = 1.0 / demo.CLUSTERS
            for step, item in enumerate(history):
                visible, taste = world.terms(history[:step])
                p *= sum(w * t[item] for w, t in visible) + taste * world.tastes[path[step]][item]
                p *= world.drift[path[step]][path[step + 1]]
            joint[path[3]] += p
            total += p
        for z, belief in enumerate(self.oracle.mood(history)):
            self.assertAlmostEqual(belief, joint[z] / total, places=10)

    def test_oracle_agrees_with_the_shoppers(self):
        """Its claimed recall is what shoppers do (4 standard deviations), and it is far above the most popular items."""
        claimed = hits = variance = 0.0
        users = range(demo.FIRST_HELD_OUT, demo.FIRST_HELD_OUT + 400)
        for number in users:
            history = self.world.shopper(number)
            top, probability = self.oracle.best(history[:-1], 10)
            self.assertEqual(len(set(top)), 10)
            claimed += probability
            variance += probability * (1 - probability)
            hits += history[-1] in top
        self.assertLess(abs(hits - claimed), 4 * math.sqrt(variance))
        self.assertGreater(claimed / len(users), 0.5)
        self.assertLess(claimed / len(users), 0.8)


class ConventionTest(unittest.TestCase):
    def test_consistent(self):
        world = demo.World()
        convention = demo.convention(world)
        self.assertEqual(len(convention["level_token_patterns"]), convention["levels"])
        self.assertEqual(len(convention["level_code_counts"]), convention["levels"])
        self.assertEqual(convention["generated_steps"], convention["levels"] + len(convention["tail_tokens"]))
        self.assertTrue(all(re.fullmatch(r"<s_[a-c]_\{\}>", pattern) for pattern in convention["level_token_patterns"]))
        self.assertEqual(convention["tokenizer_size"], len(demo.BASE_TOKENS) + 1 + sum(convention["level_code_counts"]))

    def test_checkpoint_tokenizer_agrees(self):
        """Where the trained checkpoint is present: its tokenizer writes the tokens the convention names."""
        path = os.path.join(DEMO, "checkpoint", "tokenizer.json")
        if not os.path.exists(path):
            self.skipTest("no checkpoint here: train one with weights/recipe/train.py")
        with open(path, encoding="utf-8") as file:
            tokenizer = json.load(file)
        ids = dict(tokenizer["model"]["vocab"])
        ids.update((token["content"], token["id"]) for token in tokenizer["added_tokens"])
        with open(os.path.join(DEMO, "checkpoint", "convention.json"), encoding="utf-8") as file:
            convention = json.load(file)
        self.assertEqual(convention, demo.convention(demo.World()))
        self.assertEqual(len(set(ids.values())), convention["tokenizer_size"])
        for pattern, count in zip(convention["level_token_patterns"], convention["level_code_counts"]):
            for code in range(count):
                self.assertIn(pattern.format(code), ids)
        self.assertEqual(ids[convention["item_begin_token"]["text"]], convention["item_begin_token"]["id"])
        with open(os.path.join(DEMO, "checkpoint", "config.json"), encoding="utf-8") as file:
            self.assertEqual(json.load(file)["vocab_size"], convention["vocab_size"])


if __name__ == "__main__":
    unittest.main()
