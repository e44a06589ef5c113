"""The metrics: against values computed by hand, and against ir-measures on random runs."""

import contextlib
import io
import math
import random
import unittest
from unittest import mock

from helpers import Folder, needs

from beamline_eval import beyond, evaluate, measures, runs, trec
from beamline_eval.errors import EvalError
from beamline_eval.prepare import prepare
from beamline_eval.prepared import Catalog, Prepared


class ByHand(unittest.TestCase):
    def test_one_target(self):
        slates = {"a": ["x"], "b": ["y", "x"], "c": [str(n) for n in range(9)] + ["x"], "d": ["y"]}
        values = measures.by_hand({user: ["x"] for user in "abcde"}, slates, [5, 10])
        mean = measures.mean(values, measures.keys([5, 10]))
        self.assertAlmostEqual(mean["HR@5"], 2 / 5)
        self.assertAlmostEqual(mean["HR@10"], 3 / 5)
        self.assertAlmostEqual(mean["NDCG@5"], (1 + 1 / math.log2(3)) / 5)
        self.assertAlmostEqual(mean["NDCG@10"], (1 + 1 / math.log2(3) + 1 / math.log2(11)) / 5)
        self.assertAlmostEqual(mean["MRR@10"], (1 + 1 / 2 + 1 / 10) / 5)
        self.assertEqual(mean["HR@10"], mean["Recall@10"])

    def test_several_targets(self):
        values = measures.by_hand({"u": ["a", "b", "c"]}, {"u": ["x", "a", "b", "y"]}, [2, 4])["u"]
        ideal = 1 + 1 / math.log2(3) + 1 / math.log2(4)
        self.assertEqual((values["HR@2"], values["MRR@2"]), (1.0, 0.5))
        # The denominator is the number of targets, not min(k, that).
        self.assertAlmostEqual(values["Recall@2"], 1 / 3)
        self.assertAlmostEqual(values["Recall@4"], 2 / 3)
        self.assertAlmostEqual(values["NDCG@4"], (1 / math.log2(3) + 1 / math.log2(4)) / ideal)

    def test_leave_one_out_says_the_same(self):
        import leave_one_out

        draw = random.Random(2)
        slates = {f"u{n}": draw.sample(range(30), 10) for n in range(200)}
        targets = {user: [draw.randrange(30)] for user in slates}
        script = leave_one_out.metrics(
            [leave_one_out.rank_of(targets[user][0], slate) for user, slate in slates.items()], [5, 10]
        )
        package = measures.mean(measures.by_hand(targets, slates, [5, 10]), measures.keys([5, 10]))
        for key, value in script.items():
            self.assertAlmostEqual(package[key], value, places=12)

    def test_nobody_answers(self):
        self.assertEqual(set(measures.by_hand({"u": ["a"]}, {}, [10])["u"].values()), {0.0})


class AgainstTheLibrary(unittest.TestCase):
    @needs("ir_measures")
    def test_random_runs(self):
        draw = random.Random(7)
        items = [f"i{n}" for n in range(40)]
        for _ in range(20):
            targets = {f"u{n}": draw.sample(items, draw.choice([1, 1, 1, 2, 5])) for n in range(30)}
            # Some users are missing, some have short or empty slates, some slates repeat items.
            raw = {user: draw.choices(items, k=draw.choice([0, 3, 10, 25])) for user in targets if draw.random() < 0.8}
            slates = runs.Run(raw).slates
            cut_offs = [1, 5, 10, 20]
            ours, theirs = measures.by_hand(targets, slates, cut_offs), measures.by_library(targets, slates, cut_offs)
            self.assertEqual(list(ours), list(theirs))
            for user in targets:
                for key in measures.keys(cut_offs):
                    self.assertAlmostEqual(ours[user][key], theirs[user][key], places=6, msg=f"{user} {key}")

    @needs("ir_measures")
    def test_means_are_those_of_the_library_over_all_users_of_the_qrels(self):
        import ir_measures
        from ir_measures import RR, nDCG

        targets, slates = {"a": ["x"], "b": ["y"], "c": ["z"]}, {"a": ["q", "x"], "b": ["y"]}
        run = {user: {item: -float(rank) for rank, item in enumerate(items)} for user, items in slates.items()}
        theirs = ir_measures.calc_aggregate([nDCG @ 10, RR @ 10], {u: dict.fromkeys(i, 1) for u, i in targets.items()}, run)
        ours = measures.mean(measures.by_library(targets, slates, [10]), ["NDCG@10", "MRR@10"])
        self.assertAlmostEqual(ours["NDCG@10"], theirs[nDCG @ 10])
        self.assertAlmostEqual(ours["MRR@10"], theirs[RR @ 10])
        self.assertAlmostEqual(ours["MRR@10"], (0.5 + 1 + 0) / 3)

    @needs("ir_measures")
    def test_equal_scores_cannot_reorder_a_slate(self):
        # Given the model's equal scores, the library would order by id; the slate's order is what was shown.
        for slate in (["a", "b", "c"], ["c", "b", "a"], ["b", "c", "a"]):
            values = measures.by_library({"u": ["a"]}, {"u": slate}, [3])["u"]
            self.assertAlmostEqual(values["MRR@3"], 1 / (slate.index("a") + 1))

    @needs("ir_measures")
    def test_nobody_answers(self):
        self.assertEqual(set(measures.by_library({"u": ["a"]}, {}, [10])["u"].values()), {0.0})


class Runs(Folder):
    def test_trec_order_is_that_of_ranks(self):
        path = self.put("r.run", "u Q0 b 2 0.5 t\nu Q0 a 1 0.5 t\nv Q0 c 1 0.1 t\nv Q0 d 2 0.9 t\n")
        run = runs.read(path)
        self.assertEqual(run.slates, {"u": ["a", "b"], "v": ["c", "d"]})
        self.assertEqual(run.notes["rank_score_conflicts"], 1)

    def test_where_ranks_say_nothing_scores_decide(self):
        # BEIR writes rank 0 on every line.
        run = runs.read(
            self.put("r.run", "u Q0 a 0 2.5 beir\nu Q0 c 0 3.5 beir\nu Q0 b 0 -1 beir\nv Q0 a 1 0.1 x\nv Q0 b 2 0 x\n")
        )
        self.assertEqual(run.slates, {"u": ["c", "a", "b"], "v": ["a", "b"]})
        self.assertEqual((run.notes["users_ordered_by_score"], run.notes["rank_score_conflicts"]), (1, 0))
        with self.assertRaisesRegex(EvalError, "share a rank.*share a score.*write ranks"):
            runs.read(self.put("r.run", "u Q0 b 0 0.5 t\nu Q0 a 0 0.5 t\n"))
        with self.assertRaisesRegex(EvalError, r"r\.run:1: the score is not a number"):
            runs.read(self.put("r.run", "u Q0 b 1 nan t\n"))

    def test_written_and_read_again(self):
        slates = {"u": ["b", "a"], "v": ["c"]}
        trec.write_run(self.at("x.run"), slates, "tag")
        self.assertEqual(runs.read(self.at("x.run")).slates, slates)

    def test_answers(self):
        model = {"model": {"sha256": "m"}, "catalog_version": "c"}
        path = self.put_lines(
            "a.jsonl",
            [
                {"line": 1, "id": "u", "items": [{"item_id": "a"}, {"item_id": "b"}, {"item_id": "a"}], **model},
                {"line": 2, "id": "v", "error": {"type": "timeout", "message": "late"}},
            ],
        )
        run = runs.read(path)
        self.assertEqual(run.slates, {"u": ["a", "b"], "v": []})
        self.assertEqual(
            (run.notes["errors"], run.notes["repeated_items"], run.notes["error_types"], run.notes["model_sha256"]),
            (1, 1, {"timeout": 1}, "m"),
        )

    def test_answers_that_cannot_be_read_right(self):
        for lines, why in (
            ([{"items": []}], "no `id`"),
            ([{"id": 1, "items": []}, {"id": "1", "items": []}], "second answer"),
            ([{"id": 1}], "neither"),
            ([{"id": n, "items": [], "model": {"sha256": str(n)}} for n in (1, 2)], "several models"),
        ):
            with self.assertRaisesRegex(EvalError, why):
                runs.read(self.put_lines("a.jsonl", lines))

    def test_sample_is_evenly_spaced(self):
        self.assertEqual(runs.sample(range(10), 3), [0, 3, 6])
        # It must reach the end of the list whatever the remainder: files are ordered, and their ends differ.
        for count in (3, 299, 300, 4000, 9999):
            chosen = runs.sample(range(22363), count)
            self.assertEqual((len(set(chosen)), chosen[0]), (count, 0))
            self.assertLess(22363 - chosen[-1], 22363 / count + 1)
        self.assertEqual(runs.sample(range(3), None), [0, 1, 2])
        self.assertEqual(runs.sample(range(3), 9), [0, 1, 2])


class Engine(unittest.TestCase):
    def test_without_the_library_every_command_falls_back_and_says_so(self):
        with mock.patch.object(measures, "installed", lambda: False):
            err = io.StringIO()
            with contextlib.redirect_stderr(err):
                self.assertEqual(measures.engine(), "plain")
            self.assertIn("ir-measures is not installed", err.getvalue())
            self.assertEqual(measures.engine("plain"), "plain")
            with self.assertRaisesRegex(EvalError, "pip install"):
                measures.per_user({"u": ["a"]}, {}, [1], measures.engine("ir-measures"))
        with mock.patch.object(measures, "installed", lambda: True):
            self.assertEqual(measures.engine(), "ir-measures")


class Beyond(unittest.TestCase):
    def test_gini(self):
        self.assertAlmostEqual(beyond.gini([2, 2, 2, 2], 4), 0)
        self.assertAlmostEqual(beyond.gini([8], 4), 0.75)
        self.assertAlmostEqual(beyond.gini([1, 3], 2), 0.25)
        self.assertEqual(beyond.gini([], 4), 0.0)

    def test_by_hand(self):
        slates, histories = {"u": ["a", "b"], "v": ["a", "ghost"]}, {"u": ["b"], "v": []}
        found = beyond.beyond(["u", "v", "w"], slates, 2, {"a", "b", "c", "d"}, {"a": 3, "b": 1}, histories)
        self.assertEqual(found["coverage@2"], 2 / 4)
        self.assertEqual(found["valid_share@2"], 3 / 4)
        self.assertEqual(found["full_slates@2"], 2 / 3)
        self.assertEqual(found["seen_share@2"], 1 / 4)
        # (3 + 1) / (4 + 4) is one bit, (1 + 1) / 8 two bits; the ghost is not counted.
        self.assertAlmostEqual(found["novelty_bits@2"], (1 + 2 + 1) / 3)


class Evaluate(Folder):
    def setUp(self):
        super().setUp()
        prepare(self.put("s.txt", "1 a b c d\n2 b c a\n3 e a b c d e a b\n"), self.at("data"), num_items=2, beam_width=2)
        self.put_lines(
            "catalog.jsonl",
            [{"item_id": item, "sid": sid} for item, sid in zip("abcde", ([0, 0], [0, 1], [1, 0], [1, 0], [2, 2]))],
        )

    def test_users_and_buckets(self):
        # User 1 gets c, which shares d's semantic ID; user 2 gets a; user 3 is missing.
        self.put_lines(
            "a.jsonl",
            [
                {"id": "1", "items": [{"item_id": "c"}, {"item_id": "b"}]},
                {"id": "2", "items": [{"item_id": "b"}, {"item_id": "a"}]},
            ],
        )
        result = evaluate.evaluate(
            self.at("data"), self.at("a.jsonl"), self.at("catalog.jsonl"), cut_offs=(1, 2, 50), buckets="1-2,3-5", engine="plain"
        )
        self.assertEqual((result["users"], result["users_without_answer"], result["cut_offs"]), (3, 1, [1, 2]))
        self.assertAlmostEqual(result["metrics"]["HR@2"], 1 / 3)
        self.assertAlmostEqual(result["metrics"]["NDCG@2"], 1 / math.log2(3) / 3)
        self.assertAlmostEqual(result["if_semantic_ids_counted"]["HR@2"], 2 / 3)
        self.assertEqual(result["items_sharing_a_semantic_id"], 2)
        self.assertEqual(
            [(b["bucket"], b["users"], b["HR@2"]) for b in result["by_history_length"]],
            [("1-2", 1, 1.0), ("3-5", 1, 0.0), ("other", 1, 0.0)],
        )
        self.assertEqual([entry["file"].split("/")[-1] for entry in result["inputs"]],
                         ["a.jsonl", "prepare.json", "qrels.txt", "requests.jsonl", "items.jsonl", "catalog.jsonl"])
        self.assertIn("history items stay", evaluate.table(result))

    def test_a_run_of_other_data_is_refused(self):
        with self.assertRaisesRegex(EvalError, "not in"):
            evaluate.evaluate(self.at("data"), self.put("x.run", "77 Q0 a 1 1 t\n"), engine="plain")

    def test_sample(self):
        self.put_lines("a.jsonl", [{"id": "1", "items": [{"item_id": "d"}]}])
        result = evaluate.evaluate(self.at("data"), self.at("a.jsonl"), cut_offs=(1,), sample=1, engine="plain")
        self.assertEqual((result["users"], result["metrics"]["HR@1"], result["sampled"]), (1, 1.0, True))

    def test_without_the_library_it_falls_back(self):
        with mock.patch.object(measures, "installed", lambda: False), contextlib.redirect_stderr(io.StringIO()):
            result = evaluate.evaluate(self.at("data"), self.put("x.run", "1 Q0 d 1 1 t\n"), cut_offs=(1,))
        self.assertEqual((result["computed_by"], result["metrics"]["HR@1"]), ("plain", 1 / 3))

    def test_a_run_of_nothing_keeps_its_cut_offs(self):
        result = evaluate.evaluate(self.at("data"), self.put("x.run", ""), cut_offs=(1, 2, 50), engine="plain")
        self.assertEqual((result["cut_offs"], result["metrics"]["HR@2"], result["users_without_answer"]), ([1, 2], 0.0, 3))

    def test_only_the_users_of_another_run(self):
        self.put_lines("a.jsonl", [{"id": "1", "items": [{"item_id": "d"}]}])
        path = self.put("some.run", "1 Q0 z 1 1 t\n2 Q0 z 1 1 t\n")
        result = evaluate.evaluate(self.at("data"), self.at("a.jsonl"), cut_offs=(1,), users_of=path, engine="plain")
        self.assertEqual((result["users"], result["users_without_answer"], result["metrics"]["HR@1"]), (2, 1, 0.5))

    def test_buckets(self):
        self.assertEqual(evaluate.parse_buckets("1-5,6-"), [("1-5", 1, 5), ("6-", 6, float("inf"))])
        for wrong in ("a-b", "1-5,5-9"):
            with self.assertRaises(EvalError):
                evaluate.parse_buckets(wrong)

    def test_catalog(self):
        catalog = Catalog(self.at("catalog.jsonl"))
        self.assertEqual((len(catalog), "a" in catalog, "z" in catalog), (5, True, False))
        self.assertEqual(Prepared(self.at("data")).counts(), {"a": 2, "b": 3, "c": 1, "d": 1, "e": 2})


if __name__ == "__main__":
    unittest.main()
