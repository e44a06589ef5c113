"""The HSTU recipe's promises: preparation (standard library); and, skipped where torch, numpy or safetensors are missing, that
the module computes what a second implementation computes, that decoding is what the full forward pass says, that a target is
seen in training as it is when served, and that training writes a whole directory. Run: python3 -m unittest discover -s
weights/tests"""

import contextlib
import importlib.util
import io
import json
import math
import os
import random
import re
import sys
import tempfile
import unittest

WEIGHTS = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
REPOSITORY = os.path.dirname(WEIGHTS)
FIXTURE = os.path.join(REPOSITORY, "crates", "server", "tests", "fixtures", "hstu-semantic-ids")
RESEARCH = os.path.join(REPOSITORY, "fixtures", "hstu-research")
FOLDERS = [os.path.join(WEIGHTS, "hstu"), os.path.join(WEIGHTS, "convert")]


def load(name):
    """A file of weights/hstu under a name of its own: other folders have a prepare.py and a train.py, too."""
    spec = importlib.util.spec_from_file_location(f"hstu_{name}", os.path.join(FOLDERS[0], f"{name}.py"))
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TORCH = all(importlib.util.find_spec(name) for name in ("torch", "numpy", "safetensors"))
needs_torch = unittest.skipUnless(TORCH, "needs torch, numpy and safetensors")
sys.path[:0] = FOLDERS
prepare = load("prepare")
if TORCH:
    import numpy as np
    import torch
    from safetensors.torch import load_file

    import config
    import decode
    import directory
    import evaluate
    import forward
    import losses
    import reference
    import semantic_ids
    import sequences
    import time_buckets
    from model import Hstu

    train = load("train")
else:
    print("test_hstu.py: torch, numpy or safetensors missing, the HSTU recipe is NOT tested", file=sys.stderr)
sys.path = [path for path in sys.path if path not in FOLDERS]


class Folder(unittest.TestCase):
    def setUp(self):
        temporary = tempfile.TemporaryDirectory()
        self.addCleanup(temporary.cleanup)
        self.folder = temporary.name

    def path(self, *names):
        return os.path.join(self.folder, *names)

    def write(self, name, text):
        with open(self.path(name), "w", encoding="utf-8") as file:
            file.write(text)
        return self.path(name)

    def lines(self, *names):
        with open(self.path(*names), encoding="utf-8") as file:
            return [json.loads(line) for line in file]

    def quietly(self, main, *arguments):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            found = main([str(argument) for argument in arguments])
        return found, said.getvalue()


INTER = "user_id:token\titem_id:token\trating:float\ttimestamp:float\n"


class PrepareTest(Folder):
    def refused(self, name, text, why, *options):
        with self.assertRaises(SystemExit) as refusal:
            self.quietly(prepare.main, self.write(name, text), "--out", self.path("out"), *options)
        self.assertIn(why, str(refusal.exception))

    def test_recbole(self):
        log = self.write("log.inter", INTER + "u\t9\t3\t30.7\nu\t10\t5\t10\nv\t9\t1\t5\nu\t2\t4\t30\nu\t9\t1\t20\n")
        tags = self.write("log.item", "item_id:token\tclass:token_seq\n9\tDrama War\n10\t\n")
        self.quietly(prepare.main, log, "--out", self.path("out"), "--item-tags", tags + ":class", "--num-items", 7)
        # Rows by number, not by text, and from 1 on.
        catalog = [
            {"item_id": "2", "sid": [1]},
            {"item_id": "9", "sid": [2], "tags": ["Drama", "War"]},
            {"item_id": "10", "sid": [3]},
        ]
        self.assertEqual(self.lines("out", "catalog.jsonl"), catalog)
        # By time; 30.7 and 30 are one second, so the file's order counts. v has too few events to be asked about.
        train = [{"user_id": "u", "items": ["10", "9"], "times": [10, 20]}, {"user_id": "v", "items": ["9"], "times": [5]}]
        self.assertEqual(self.lines("out", "train.jsonl"), train)
        self.assertEqual(self.lines("out", "validation.jsonl"), [{**train[0], "target": "9", "target_time": 30}])
        last = {"user_id": "u", "items": ["10", "9", "9"], "times": [10, 20, 30], "target": "2", "target_time": 30}
        self.assertEqual(self.lines("out", "test.jsonl"), [last])
        asked = {
            "id": "u",
            "history": [{"item_id": "10", "timestamp": 10}, {"item_id": "9", "timestamp": 20}],
            "query_time": 30,
            "num_items": 7,
        }
        self.assertEqual(self.lines("out", "validation_requests.jsonl"), [asked])

    def test_json_lines_with_actions(self):
        events = [
            {"user_id": 1, "item_id": item, "timestamp": time, "action": action}
            for item, time, action in (("a", 3, 2), ("b", 1, 1), ("c", 2, 3))
        ]
        log = self.write("log.jsonl", "\n".join(map(json.dumps, events)) + "\n\n")
        self.quietly(prepare.main, log, "--out", self.path("out"), "--actions", "--exclude-seen")
        self.assertEqual(self.lines("out", "test.jsonl")[0]["actions"], [1, 3])
        asked = self.lines("out", "test_requests.jsonl")[0]
        self.assertEqual(asked["history"][1], {"item_id": "c", "timestamp": 2, "action": "3"})
        self.assertEqual(asked["filters"], {"exclude_seen": True})
        self.quietly(prepare.main, log, "--out", self.path("out"))
        self.assertNotIn("actions", self.lines("out", "train.jsonl")[0])

    def test_lines_that_cannot_be_read_are_named(self):
        self.refused("x.inter", INTER + "u\t1\t3\t10\nu\t2\t3\n", "x.inter:3: 3 fields")
        self.refused("x.inter", INTER + "u\t1\t3\tnoon\n", "x.inter:2: timestamp 'noon'")
        self.refused("x.inter", INTER + "u\t1\t3\tnan\n", "x.inter:2: timestamp")
        self.refused("x.inter", "user_id:token\titem_id:token\nu\t1\n", "x.inter:2: no timestamp")
        self.refused("x.inter", INTER + "u\t1\t2.5\t10\n", "x.inter:2: rating '2.5'", "--actions")
        self.refused("x.inter", INTER, "no interactions")
        self.refused("x.jsonl", '{"user_id": 1, "item_id": "a", "timestamp": 3}\n', "x.jsonl:1: no action", "--actions")
        self.refused("x.jsonl", '{"user_id": 1, "item_id": "a"\n', "x.jsonl:1: not JSON")
        self.refused("x.jsonl", '{"user_id": 1, "item_id": "", "timestamp": 3}\n', "x.jsonl:1: no item_id")


def made_model(head=None, actions=5, seed=3, **sizes):
    """A random model whose every part matters, in double precision."""
    torch.manual_seed(seed)
    given = (
        dict(model_dim=12, layers=3, heads=2, key_dim=5, value_dim=4, num_items=25, max_sequence_length=20, positions=25) | sizes
    )
    model = (
        Hstu(
            config.research_config(
                head=head or config.items_head(), actions=actions and {"count": actions, "generated": 2}, **given
            )
        )
        .double()
        .eval()
    )
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.copy_(torch.randn_like(tensor).mul(0.5).float())  # what single precision can store
    return model


def made_times(rng, count):
    return list(np.cumsum([1_700_000_000] + [int(10 ** rng.uniform(0, 6.5)) * rng.randint(0, 1) for _ in range(count - 1)]))


@needs_torch
class TimeBucketsTest(unittest.TestCase):
    def test_thresholds_are_the_servers(self):
        self.assertEqual(time_buckets.THRESHOLDS, forward.BUCKET_STARTS.tolist())
        with open(os.path.join(REPOSITORY, "crates/compute/src/cpu/time_buckets.rs"), encoding="utf-8") as file:
            table = re.search(r"pub const THRESHOLDS.*?=\s*\[(.*?)\];", file.read(), re.DOTALL).group(1)
        served = [int(number.replace("_", "")) for number in re.findall(r"[\d_]+", table)]
        self.assertEqual(served[: len(time_buckets.THRESHOLDS)], time_buckets.THRESHOLDS)

    def test_buckets(self):
        found = time_buckets.time_buckets(
            torch.tensor([0, 1, 2, 3, 4, 15, 16, 417_900, 417_901, -16, 21_236_737_025]), 128
        ).tolist()
        self.assertEqual(found, [0, 0, 2, 3, 4, 8, 9, 42, 43, 9, 79])
        self.assertEqual(time_buckets.time_buckets(torch.tensor([1000]), 5).tolist(), [5])
        with self.assertRaises(ValueError):
            time_buckets.time_buckets(torch.tensor([1_700_000_000_000]), 128)


@needs_torch
class ModelTest(Folder):
    def test_equals_the_second_implementation(self):
        rng = random.Random(1)
        for actions in (None, 5):
            model = made_model(actions=actions)
            directory.write(self.path(f"model{actions}"), model, [])
            other = forward.Model(self.path(f"model{actions}"))
            for count in (1, 2, 7, 20):
                ids, done = ([rng.randrange(low, high) for _ in range(count)] for low, high in ((1, 26), (0, 5)))
                times = made_times(rng, count + 1)
                states = model(torch.tensor([ids]), torch.tensor([times]), torch.tensor([done]) if actions else None)
                layers = other.layers(other.research_rows(ids, done if actions else None), 0, np.array(times))
                expected = other.normalized(layers[-1], other.output["normalization"])
                self.assertLess(np.abs(states[0].detach().numpy() - expected).max(), 1e-12)
            self.assertLess(np.abs(model.items().detach().numpy() - other.items()).max(), 1e-12)

    def test_equals_the_published_code(self):
        stored = load_file(os.path.join(RESEARCH, "fp64.safetensors"))
        with open(os.path.join(RESEARCH, "config.json"), encoding="utf-8") as file:
            sizes = json.load(file)
        state = {
            name.removeprefix("state."): tensor
            for name, tensor in stored.items()
            if name.startswith("state.") and "_attn_mask" not in name
        }
        model = Hstu(config.research_config(
            model_dim=sizes["embedding_dim"], layers=sizes["num_blocks"], heads=sizes["num_heads"], key_dim=sizes["attention_dim"],
            value_dim=sizes["linear_dim"], num_items=sizes["num_items"], max_sequence_length=sizes["max_sequence_len"],
            positions=sizes["max_sequence_len"] + sizes["gr_output_length"] + 1, head=config.items_head(),
        )).double().eval()  # fmt: skip
        model.load_state_dict(state)
        lengths = stored["in.past_lengths"]
        longest = int(lengths.max())
        states = model(stored["in.past_ids"][:, :longest], stored["in.timestamps"][:, : longest + 1])
        users = states[torch.arange(len(lengths)), lengths - 1]
        self.assertLess((users - stored["out.current_embeddings"]).abs().max(), 1e-12)
        self.assertLess((users @ model.items().T - stored["out.scores"]).abs().max(), 1e-12)

    def test_padding_reaches_nobody(self):
        model = made_model()
        ids, done, times = torch.tensor([[4, 9, 7]]), torch.tensor([[1, 0, 3]]), torch.tensor([[0, 50, 60, 4000]])
        alone = model(ids, times, done)
        padded = model(
            torch.tensor([[4, 9, 7, 0, 0]]), torch.tensor([[0, 50, 60, 4000, 4000, 4000]]), torch.tensor([[1, 0, 3, 0, 0]])
        )
        self.assertLess((padded[:, :3] - alone).abs().max(), 1e-14)
        # Its row of the table is not zero, its rows of the model are.
        self.assertTrue(
            (model.rows(torch.tensor([[4, 0]]), torch.tensor([[1, 1]]))[0].abs().sum(-1) > 0).tolist() == [True, False]
        )

    def test_gradients_of_the_bias(self):
        model = made_model(actions=None)
        table, index = model._hstu._attention_layers[0]._rel_attn_bias._ts_w, torch.tensor([[0, 5, 5], [128, 0, 5]])
        weights = torch.rand(2, 3, dtype=torch.float64)
        from model import Lookup

        found = torch.autograd.grad((Lookup.apply(table, index) * weights).sum(), table)[0]
        expected = torch.autograd.grad((table[index] * weights).sum(), table)[0]
        self.assertTrue(torch.equal(found, expected))

    def test_what_is_not_computed_is_refused(self):
        for part, name, value in (("stack", "output_parts", "concat_raw"), ("stack", "silu", "u"), ("stack", "residual", False)):
            other = made_model().config
            other[part][name] = value
            with self.assertRaisesRegex(ValueError, name):
                Hstu(other)


@needs_torch
class DecodingTest(unittest.TestCase):
    """On the fixture that the server's tests use."""

    @classmethod
    def setUpClass(cls):
        cls.reference = reference.Reference(FIXTURE)
        with open(os.path.join(FIXTURE, "reference.json"), encoding="utf-8") as file:
            cls.cases = json.load(file)

    def test_reference_gives_the_stored_answers(self):
        for case in self.cases["recommend"]:
            found = self.reference.recommend(case["body"])
            self.assertEqual([item["item_id"] for item in found], [item["item_id"] for item in case["expected"]])
            for one, other in zip(found, case["expected"]):
                self.assertAlmostEqual(one["score"], other["score"], delta=1e-9)
        for case in self.cases["rank"]:
            for name, values in self.reference.rank(case["body"]).items():
                np.testing.assert_allclose(values, case[name], atol=1e-9)

    def test_cases_cover_what_they_should(self):
        cases = self.cases["recommend"]
        self.assertTrue(
            any(len({item["score"] for item in case["expected"]}) < len(case["expected"]) for case in cases), "items of one leaf"
        )
        self.assertTrue(any(len(case["expected"]) < case["body"]["num_items"] for case in cases), "fewer items than asked for")
        for case in cases:
            self.assertFalse(
                {item["item_id"] for item in case["expected"]} & set(case["body"].get("filters", {}).get("exclude_items", []))
            )

    def test_history_computed_once_gives_the_same(self):
        for case in self.cases["recommend"]:
            body = case["body"]
            excluded = set(body.get("filters", {}).get("exclude_items", []))
            allowed = {path for item, path in self.reference.path.items() if item not in excluded}
            tokens, actions, times = self.reference.context(body)
            with torch.no_grad():
                context = decode.Context(self.reference.model, tokens, times + [body["query_time"]], actions)
            found = decode.search(context, decode.Trie(allowed), 3, body["beam_width"], body["normalization"])
            expected = self.reference.search(body, allowed, body["beam_width"])
            self.assertEqual([path for path, _ in found], [path for path, _ in expected])
            np.testing.assert_allclose([score for _, score in found], [score for _, score in expected], atol=1e-12)

    def rows_and_times(self, body, path):
        """`context | tokens of an item` and its actions and times, the plain way."""
        tokens, actions, times = self.reference.context(body)
        return tokens + list(path), actions + [0] * len(path), times + [body["query_time"]] * (len(path) + 1)

    def test_scores_are_sums_of_log_probabilities_of_the_second_implementation(self):
        other = forward.Model(FIXTURE)
        head, scale = other.of("_token_head.weight"), other.output["head"]["logit_scale"]
        for case in self.cases["rank"][::2]:
            body = case["body"]
            for candidate, stated in zip(body["candidates"], case["log_probabilities"]):
                path = self.reference.path[candidate["item_id"]]
                ids, actions, times = self.rows_and_times(body, path)
                after = other.layers(other.research_rows(ids, actions), 0, np.array(times))[-1]
                logits = other.normalized(after, other.output["normalization"])[-len(path) - 1 : -1] @ head.T * scale
                log_softmax = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
                self.assertAlmostEqual(sum(log_softmax[range(len(path)), path]), stated, delta=1e-9)

    def test_a_target_in_training_is_what_is_served(self):
        """The loss of a target's tokens, its action hidden, is minus the score of the answer at the time of the target."""
        model = self.reference.model
        spelling = sequences.Spelling(model.config, self.reference.catalog)
        case = next(
            case
            for case in self.cases["recommend"]
            if case["body"]["normalization"] == "full_vocab" and 3 < len(case["body"]["history"]) < 19
        )
        events, target = case["body"]["history"], case["expected"][0]
        line = {"items": [event["item_id"] for event in events] + [target["item_id"]]}
        line["times"] = [event["timestamp"] for event in events] + [case["body"]["query_time"]]
        line["actions"] = [int(event["action"]) for event in events] + [0]
        ids, times, actions, targets = sequences.padded([spelling.rows(line)], spelling)
        loss = losses.token_loss(model, model(ids, times, actions)[0, -3:], targets[0, -3:])
        self.assertAlmostEqual(-3 * loss.item(), target["score"], delta=1e-9)

    def test_unknown_fields_are_refused(self):
        with self.assertRaises(SystemExit):
            self.reference.recommend({**self.cases["recommend"][0]["body"], "filters": {"require_tags": ["x"]}})


@needs_torch
class SequencesTest(unittest.TestCase):
    def test_windows_predict_every_event_once(self):
        rng = random.Random(4)
        for events, most in ((2, 5), (6, 5), (7, 5), (23, 5), (24, 1)):
            for _ in range(20):
                found = sequences.windows(events, most, rng)
                self.assertTrue(all(stop - start <= most + 1 for start, stop in found))
                self.assertEqual([event for start, stop in found for event in range(start + 1, stop)], list(range(1, events)))

    def token_spelling(self):
        head = config.tokens_head([4, 4], 2.0, False)
        return sequences.Spelling(
            made_model(head, num_items=8).config, [{"item_id": "a", "sid": [0, 3]}, {"item_id": "b", "sid": [2, 1]}]
        )

    def test_events_become_a_row_per_level(self):
        line = {"items": ["b", "a"], "times": [10, 20], "actions": [3, 4], "target_time": 99}
        spelling = self.token_spelling()
        self.assertEqual(spelling.rows(line), ([3, 6, 1, 8], [10, 10, 20, 20], [3, 3, 4, 4]))
        self.assertEqual(spelling.question(line), ([3, 6, 1, 8], [10, 10, 20, 20, 99], [3, 3, 4, 4]))
        ids, times, actions, targets = sequences.padded([spelling.rows(line), spelling.rows(line, 0, 1)], spelling)
        # Row i reads the time of row i + 1, and the last row of the sequence is only a target.
        self.assertEqual(ids.tolist(), [[3, 6, 1], [3, 0, 0]])
        self.assertEqual(targets.tolist(), [[6, 1, 8], [6, 0, 0]])
        self.assertEqual(times.tolist(), [[10, 10, 20, 20], [10, 10, 10, 10]])
        self.assertEqual(actions.tolist(), [[3, 3, 4], [3, 3, 0]])

    def test_hidden_actions_are_the_generated_one(self):
        lines = [{"items": ["a", "b"] * 4, "times": list(range(8)), "actions": [4] * 8}]
        spelling = self.token_spelling()

        def actions(hidden):
            return [action for batch in sequences.batches(lines, spelling, 1000, hidden, 7) for row in batch for action in row[2]]

        self.assertEqual(actions(0.0), [4] * 16)
        self.assertEqual(actions(1.0), [2] * 16)
        self.assertEqual(set(zip(actions(0.5)[::2], actions(0.5)[1::2])), {(2, 2), (4, 4)})


@needs_torch
class LossTest(unittest.TestCase):
    def test_all_items(self):
        model = made_model()
        states, targets = torch.nn.functional.normalize(torch.randn(3, 12).double(), dim=-1), torch.tensor([1, 25, 7])
        logits = (states @ model.items().T / 0.05).detach()
        expected = -(logits[range(3), targets - 1] - logits.logsumexp(-1)).mean()
        self.assertAlmostEqual(losses.item_loss(model, states, targets, 0.05).item(), expected.item(), places=10)

    def test_a_drawn_target_does_not_count_twice(self):
        model = made_model(num_items=1)
        states = torch.nn.functional.normalize(torch.randn(2, 12).double(), dim=-1)
        self.assertAlmostEqual(losses.item_loss(model, states, torch.tensor([1, 1]), 0.05, negatives=9).item(), 0.0, places=12)


@needs_torch
class EvaluationTest(unittest.TestCase):
    def test_metrics(self):
        lines = [{"target": "a"}, {"target": "a"}, {"target": "a"}]
        found = evaluate.metrics([[("a", 2.0)], [("b", 2.0), ("c", 1.0), ("a", 0.5)], [("b", 1.0)]], lines, cuts=(1, 3))
        self.assertEqual(found, {"HR@1": 1 / 3, "NDCG@1": 1 / 3, "HR@3": 2 / 3, "NDCG@3": (1 + 1 / math.log2(4)) / 3})

    def test_item_slates(self):
        model = made_model()
        catalog = [{"item_id": f"i{row}", "sid": [row]} for row in range(1, 26) if row != 13]  # a row without an item
        asked = {"target": "i1", "target_time": 500}
        lines = [
            {"items": ["i3", "i9"] * turn, "times": list(range(2 * turn)), "actions": [1, 4] * turn, **asked}
            for turn in (1, 4, 12)
        ]
        for exclude in (False, True):
            for line, slate in zip(lines, evaluate.item_slates(model, catalog, lines, 24, exclude), strict=True):
                ids, times, actions = sequences.Spelling(model.config, catalog).question(line)
                self.assertEqual(len(ids), min(20, len(line["items"])))
                user = model(torch.tensor([ids]), torch.tensor([times]), torch.tensor([actions]))[0, -1]
                score = dict(zip((f"i{row}" for row in range(1, 26)), (model.items() @ user).tolist()))
                left = [item for item in score if item != "i13" and not (exclude and item in ("i3", "i9"))]
                self.assertEqual([item for item, _ in slate], sorted(left, key=lambda item: -score[item]))
                np.testing.assert_allclose(
                    [value for _, value in slate], sorted((score[item] for item in left), reverse=True), atol=1e-12
                )

    def test_token_slates_leave_out_seen_items_only(self):
        model, catalog = directory.read(FIXTURE)
        leaves = {}
        for item in catalog:
            leaves.setdefault(tuple(item["sid"]), []).append(item["item_id"])
        shared = max(leaves.values(), key=len)
        self.assertGreaterEqual(len(shared), 3)
        line = {"items": [shared[1]], "times": [5], "actions": [1], "target": shared[0], "target_time": 9}
        (slate,) = evaluate.token_slates(model, catalog, [line], 100, True, 100)
        items = [item for item, _ in slate]
        self.assertEqual(len(items), len(catalog) - 1)
        self.assertEqual(items[items.index(shared[0]) + 1], shared[2])

    def test_differences(self):
        ours, theirs = (
            [[("a", 0.5), ("b", 0.25)], [("a", 0.5), ("b", 0.25)]],
            [[("a", 0.5), ("b", 0.125)], [("b", 0.25), ("a", 0.5)]],
        )
        self.assertEqual(evaluate.differences(ours, theirs), {"same_top_10": 1, "of": 2, "largest_score_difference": 0.125})


def fields(value, prefix=""):
    """Names of all fields of a JSON value, those of dictionaries in lists once."""
    if isinstance(value, dict):
        return {name for key, inner in value.items() for name in {f"{prefix}{key}"} | fields(inner, f"{prefix}{key}.")}
    return {name for inner in value for name in fields(inner, prefix)} if isinstance(value, list) else set()


@needs_torch
class TrainTest(Folder):
    SMALL = (
        "--model-dim", 8, "--key-dim", 4, "--value-dim", 4, "--max-events", 6, "--batch-rows", 60, "--validate-every", 2, "--epochs", 6,
        "--dropout", 0.1, "--lr", 1e-2,
    )  # fmt: skip

    def setUp(self):
        super().setUp()
        # Items follow each other in a circle, so there is something to learn.
        rng, events = random.Random(2), []
        for user in range(30):
            at = rng.randrange(12)
            for step in range(rng.randint(3, 14)):
                events.append(
                    {"user_id": user, "item_id": f"i{(at + step) % 12}", "timestamp": 1000 * step + user, "action": 1 + step % 2}
                )
        log = self.write("log.jsonl", "".join(json.dumps(event) + "\n" for event in events))
        self.quietly(prepare.main, log, "--out", self.path("data"), "--actions")

    def train(self, name, *options):
        return self.quietly(train.main, "--data", self.path("data"), "--out", self.path(name), *self.SMALL, *options)[0]

    def sids(self):
        return self.write("sids.json", json.dumps({f"i{number}": [number // 4, number % 4] for number in range(12)}))

    # As in crates/model/src/families/hstu/config.rs.
    EVERY_FIELD = {
        "model_type", "hstu_variant", "stack", "stack.model_dim", "stack.layers", "stack.heads", "stack.key_dim", "stack.value_dim", "stack.input_norm",
        "stack.input_norm.affine", "stack.input_norm.eps", "stack.uvqk_bias", "stack.uvqk_layout", "stack.silu", "stack.logit_scale",
        "stack.attention_divisor", "stack.relative_bias", "stack.relative_bias.positions", "stack.relative_bias.time_buckets",
        "stack.relative_bias.time_divisor", "stack.mask", "stack.mask.contextual_len", "stack.mask.max_attention_len", "stack.mask.min_full_attention_len",
        "stack.output_norm", "stack.output_norm.kind", "stack.output_norm.affine", "stack.output_norm.eps", "stack.output_parts", "stack.output_bias",
        "stack.output_layout", "stack.residual", "input", "input.num_items", "input.padding_id", "input.max_sequence_length", "input.position",
        "input.position.direction", "input.position.rows", "input.position.scale", "input.actions", "input.actions.count", "input.actions.dim",
        "input.actions.combine", "input.actions.generated", "output", "output.normalization", "output.normalization.kind", "output.normalization.eps",
        "output.head", "output.head.kind",
    }  # fmt: skip

    def check_directory(self, name, head):
        with open(self.path(name, "config.json"), encoding="utf-8") as file:
            found = json.load(file)
        self.assertEqual(fields(found), self.EVERY_FIELD | {f"output.head.{field}" for field in head})
        model, catalog = directory.read(self.path(name))
        self.assertEqual(len(catalog), 12)
        return found, model

    def test_items(self):
        training = self.train("items")
        self.assertLess(training.history[-1]["loss"], 0.7 * training.history[0]["loss"])
        found, model = self.check_directory("items", {"eps"})
        self.assertEqual(
            (found["input"]["num_items"], found["input"]["max_sequence_length"], found["input"]["actions"]["count"]), (12, 6, 3)
        )
        # What was written is the best state, not the last.
        measured = evaluate.metrics(evaluate.slates(model.float(), training.catalog, training.validation), training.validation)
        self.assertEqual(measured["NDCG@10"], max(entry.get("NDCG@10", 0) for entry in training.history))
        self.train("sampled", "--negatives", 5)

    def test_tokens(self):
        training = self.train("tokens", "--semantic-ids", self.sids())
        self.assertLess(training.history[-1]["loss"], 0.7 * training.history[0]["loss"])
        levels = {"semantic_id_levels", "semantic_id_levels.first_token", "semantic_id_levels.codes"}
        found, _ = self.check_directory("tokens", {"vocab_size", "tied", "logit_scale"} | levels)
        head, entry = found["output"]["head"], found["input"]
        self.assertEqual(head["semantic_id_levels"], [{"first_token": 1, "codes": 3}, {"first_token": 4, "codes": 4}])
        self.assertEqual(
            (head["vocab_size"], head["logit_scale"], entry["num_items"], entry["actions"]["generated"]), (8, 20.0, 7, 0)
        )
        # Generated rows need positions, too.
        self.assertEqual(
            (entry["max_sequence_length"], entry["position"]["rows"], found["stack"]["relative_bias"]["positions"]), (12, 14, 14)
        )
        # The reference reads what was written.
        lines = evaluate.read_lines(self.path("data", "test_requests.jsonl"))
        asked = {name: value for name, value in lines[0].items() if name != "num_items"} | {"num_items": 12}
        self.assertEqual(len(reference.Reference(self.path("tokens")).recommend(asked)), 12)
        self.train("tied", "--semantic-ids", self.sids(), "--tied", "--epochs", 2)

    def test_interrupted_training_ends_where_the_other_does(self):
        self.train("whole")
        for _ in range(3):
            self.train("parts", "--stop-after", 2)
        for name in ("model.safetensors", "config.json", "catalog.jsonl"):
            whole, parts = (open(self.path(folder, name), "rb") for folder in ("whole", "parts"))
            with whole, parts:
                self.assertEqual(whole.read(), parts.read())
        with self.assertRaises(SystemExit):
            self.train("parts", "--lr", 0.5)

    def test_damaged_semantic_ids_are_refused(self):
        for sids in (
            {"i0": [1, 2]},
            {f"i{number}": [1] * (1 + number % 2) for number in range(12)},
            {f"i{number}": [-1] for number in range(12)},
        ):
            with self.assertRaises(SystemExit):
                self.train("refused", "--semantic-ids", self.write("bad.json", json.dumps(sids)))

    def test_index_of_item_vectors(self):
        self.train("items", "--epochs", 2)
        self.quietly(semantic_ids.main, self.path("items"), "--codes", 3, 4, "--out", self.path("own.json"))
        with open(self.path("own.json"), encoding="utf-8") as file:
            sids = json.load(file)
        self.assertEqual(len(sids), 12)
        self.assertTrue(all(0 <= first < 3 and 0 <= second < 4 for first, second in sids.values()))
        self.assertEqual(len({first for first, _ in sids.values()}), 3)


if __name__ == "__main__":
    unittest.main()
