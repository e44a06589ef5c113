"""Statistics, agreement, baselines, the page and the command line."""

import contextlib
import html.parser
import io
import os
import subprocess
import sys
import unittest
from unittest import mock

from helpers import Folder, needs

from beamline_eval import agreement, baselines, cli, engine, evaluate, hf, report, runs, statistics, svg
from beamline_eval.errors import EvalError
from beamline_eval.files import digest, writing
from beamline_eval.prepare import prepare
from beamline_eval.prepared import Prepared


class Statistics(unittest.TestCase):
    def test_holm_by_hand(self):
        # .01*4, .03*3, max(.09, .04*2), .9*1
        self.assertEqual([round(p, 6) for p in statistics.holm([0.03, 0.01, 0.9, 0.04])], [0.09, 0.04, 0.9, 0.09])
        self.assertEqual(statistics.holm([0.6, 0.7]), [1.0, 1.0])

    @needs("numpy")
    def test_randomisation_is_the_share_of_sign_patterns(self):
        # All 8 patterns of (1, 1, 1): only +++ and --- reach 3, so p is 1/4. Zeros change nothing.
        p = statistics.randomisation([[1.0], [1.0], [1.0], [0.0]], 40000, 1)[0]
        self.assertAlmostEqual(p, 0.25, delta=0.01)
        self.assertEqual(statistics.randomisation([[0.0], [0.0]], 100, 1)[0], 1.0)

    @needs("numpy")
    def test_bootstrap(self):
        import numpy as np

        draw = np.random.default_rng(3).normal(0.1, 1.0, (4000, 1))
        low, high = statistics.bootstrap(draw, 2000, 5)
        error = draw.std() / 4000**0.5
        self.assertAlmostEqual(low[0], draw.mean() - 1.96 * error, delta=0.15 * error)
        self.assertAlmostEqual(high[0], draw.mean() + 1.96 * error, delta=0.15 * error)
        again = statistics.bootstrap(draw, 2000, 5)
        self.assertEqual((low[0], high[0]), (again[0][0], again[1][0]))

    @needs("numpy")
    def test_no_difference_is_seldom_significant(self):
        import numpy as np

        draw = np.random.default_rng(11)
        found = sum(statistics.randomisation(draw.normal(0, 1, (60, 1)), 400, n)[0] < 0.05 for n in range(200))
        self.assertLess(found, 22)


class Agreement(unittest.TestCase):
    def test_overlap(self):
        self.assertEqual(agreement.overlap(list("abc"), list("cba"), 3), 1.0)
        self.assertEqual(agreement.overlap(list("abc"), list("cba"), 1), 0.0)
        self.assertEqual(agreement.overlap([], ["a"], 3), 0.0)
        self.assertEqual(agreement.overlap([], [], 3), 1.0)

    def test_rbo_against_the_definition(self):
        def plain(one, other, p):
            depth = len(one)
            share = [len(set(one[:d]) & set(other[:d])) / d for d in range(1, depth + 1)]
            return (1 - p) / p * sum(x * p ** (d + 1) for d, x in enumerate(share)) + share[-1] * p**depth

        self.assertAlmostEqual(agreement.rbo(list("abcde"), list("abcde")), 1.0)
        self.assertAlmostEqual(agreement.rbo(list("abc"), list("xyz")), 0.0)
        for other in ("bacde", "edcba", "axbyc"):
            self.assertAlmostEqual(agreement.rbo(list("abcde"), list(other)), plain("abcde", other, 0.9))
        # A prefix agrees fully with what it is a prefix of, and the order of arguments does not matter.
        self.assertAlmostEqual(agreement.rbo(list("ab"), list("abcd")), 1.0)
        self.assertAlmostEqual(agreement.rbo(list("ab"), list("xbad")), agreement.rbo(list("xbad"), list("ab")))
        self.assertEqual((agreement.rbo([], []), agreement.rbo([], ["a"])), (1.0, 0.0))


class Small(Folder):
    """Five users over a few items, prepared."""

    def setUp(self):
        super().setUp()
        with contextlib.redirect_stderr(io.StringIO()):
            self.prepare("data")
            self.prepare("masked", exclude_seen=True)

    def prepare(self, name, **settings):
        prepare(
            self.put("s.txt", "1 a b c d\n2 a b b c a\n3 a c b c\n4 x a b c\n5 b a c b\n"),
            self.at(name),
            num_items=3,
            beam_width=3,
            **settings,
        )


class Baselines(Small):
    def make(self, name, data="data"):
        with contextlib.redirect_stderr(io.StringIO()):
            return runs.read(baselines.write(Prepared(self.at(data)), self.at("runs"), [name])[name]).slates

    def test_popularity(self):
        # training: a b | a b b | a c | x a | b a: a 5, b 4, then c and x once each: the id decides
        self.assertEqual(self.make("popularity")["1"], ["a", "b", "c"])
        self.assertEqual(self.make("popularity", "masked")["1"], ["x"])

    def test_repeat_last(self):
        self.assertEqual(self.make("repeat-last")["2"], ["c", "b", "a"])
        self.assertEqual(self.make("repeat-last")["4"], ["b", "a", "x"])
        # With seen items excluded it has nothing to say: a run without a line, and all users miss.
        self.assertEqual(self.make("repeat-last", "masked"), {})

    def test_co_occurrence(self):
        # User 3's last item is b; after b in training: b once, a once: the more popular first, then popularity.
        self.assertEqual(self.make("co-occurrence")["3"], ["a", "b", "c"])
        # User 5's last item is c, which nothing follows in training: popularity.
        self.assertEqual(self.make("co-occurrence")["5"], ["a", "b", "c"])

    def test_no_training_part(self):
        rows = self.put_lines("r.jsonl", [{"user_id": "A", "history": ["1"], "target": "2"}])
        with contextlib.redirect_stderr(io.StringIO()):
            prepare(rows, self.at("given"))
        with self.assertRaisesRegex(EvalError, "--train"):
            self.make("popularity", "given")

    def test_hugging_face_obeys_the_filter(self):
        """With a stand-in for weights/tools/hf_reference.py that answers with the catalog in order."""
        tool = self.put(
            "tool.py",
            "class Reference:\n"
            "    def __init__(self, directory, width, threads):\n        self.items_of = {(1,): ['a', 'z'], (2,): ['b']}\n"
            "    def answer(self, body):\n        return {'items': list(self.items_of.values()), 'wall_s': 0.5}\n"
            "def exact_trie(paths):\n    return {}\n",
        )
        self.put("ck/config.json", "{}")
        for data, expected in (("data", ["a", "z", "b"]), ("masked", ["z"])):
            with contextlib.redirect_stderr(io.StringIO()):
                run, timing = hf.write(Prepared(self.at(data)), self.at("ck"), ["1"], self.at("hf"), tool=tool)
            self.assertEqual(runs.read(run).slates, {"1": expected})
            self.assertTrue(os.path.isfile(timing))


class Text(html.parser.HTMLParser):
    """Tags that refer elsewhere, and the nesting."""

    def __init__(self):
        super().__init__()
        self.outside, self.open = [], []

    def handle_starttag(self, tag, attributes):
        self.outside += [value for name, value in attributes if name in ("src", "href", "xlink:href", "srcset")]
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag, tag


class Page(Small):
    def results(self):
        with contextlib.redirect_stderr(io.StringIO()):
            paths = baselines.write(Prepared(self.at("data")), self.at("runs"))
        return [
            evaluate.evaluate(self.at("data"), path, None, f"<{name}>", (1, 3), engine="plain") for name, path in paths.items()
        ]

    def test_one_page_that_needs_nothing(self):
        results = self.results()
        results[0]["timing"] = {"requests": 5, "beam_width": 3, "threads": 1, "users_per_second": 100.0, "cpu_s": 0.5,
                                "latency_ms": {"p50": 1.0, "p90": 2.0, "p99": 3.0}, "load_average_before": 9.0, "cores": 2}
        points = [
            {
                "beam_width": width,
                "users": 5,
                "measure": "NDCG@3",
                "NDCG@3": 0.5,
                "HR": 0.5,
                "users_per_second": 50.0,
                "cpu_ms_per_request": 2.0,
                "latency_ms": {"p50": float(width), "p99": 9.0},
            }
            for width in (2, 4)
        ]
        page = report.page(results, (), points, 3.6, "EUR", "T", ["a < b"])
        parser = Text()
        parser.feed(page)
        self.assertEqual((parser.outside, parser.open), ([], []))
        self.assertNotIn("<script", page)
        self.assertNotIn("url(", page)
        self.assertIn("&lt;popularity&gt;", page)
        self.assertIn("a &lt; b", page)
        self.assertIn("prefers-color-scheme", page)
        self.assertIn("busy with other work", page)
        # 3.6 an hour at 100 a second: 0.001 a second, 10,000 seconds for a million
        self.assertIn("10.00", page)
        self.assertNotIn("no slate", page)

    def test_a_phone_shows_it_whole(self):
        page = report.page(self.results())
        # Descriptions stand outside of what scrolls, every measure has a table of its own, digests break.
        self.assertNotIn("<caption", page)
        self.assertIn("<p class=caption>", page)
        for head in ("HR@1</th><th scope=col>HR@3", "NDCG@1</th><th scope=col>NDCG@3", "MRR@1</th><th scope=col>MRR@3"):
            self.assertIn(head, page)
        self.assertIn("overflow-wrap:anywhere", page)

    def test_words_and_no_internal_names(self):
        said = report.alike({"overlap@10": 0.416, "rbo_0.9@10": 0.5, "identical_slates@10": 0.25})
        self.assertEqual(
            said,
            "41.6% of the first 10 places hold items of both; rank-biased overlap of the first 10 is 0.500 (p = 0.9; 1: the same order); "
            "25.0% of users see the same first 10",
        )

    def test_commands_name_no_machine(self):
        given = [
            "report",
            "/srv/me/work/m.json",
            "--out=/srv/me/work/report.html",
            "--cut-offs",
            "1,5",
            "data/x.json",
            "--title",
            "a=/b",
        ]
        with mock.patch("sys.argv", ["beamline-eval", *given]):
            self.assertEqual(
                report.typed(), "beamline-eval report work/m.json --out=work/report.html --cut-offs 1,5 data/x.json --title a=/b"
            )

    def test_labels_are_off_the_curve(self):
        # A steep rise to the right: the curve passes above the first point, so its label goes below.
        points = [(100.0, 150.0), (110.0, 60.0), (300.0, 55.0)]
        self.assertGreater(svg.beside(points, 0)[1], 150)
        self.assertLess(svg.beside(points, 2)[1], 55)
        for place in range(3):
            x, y = svg.beside([(64.0, 16.0), (616.0, 250.0), (616.0, 16.0)], place)
            self.assertTrue(svg.LEFT <= x - 26 and x + 26 <= svg.WIDTH and 0 < y < svg.HEIGHT - svg.BOTTOM)

    def test_errors_are_said_before_the_means_they_pull_down(self):
        results = self.results()
        results[1]["run_notes"] = {"errors": 3, "error_types": {"deadline_exceeded": 3}}
        page = report.page(results)
        self.assertIn("&lt;repeat-last&gt;: 0 users without an answer, 3 errors (3 deadline_exceeded)", page)
        self.assertLess(page.index("3 deadline_exceeded"), page.index("means over users"))

    def test_different_protocols_do_not_share_a_table(self):
        results = self.results()
        results[1]["protocol"] = {**results[1]["protocol"], "exclude_seen": True}
        with self.assertRaisesRegex(EvalError, "protocols"):
            report.page(results)

    @needs("numpy")
    def test_compare(self):
        from beamline_eval.compare import compare, table

        a = self.put("a.run", "".join(f"{user} Q0 q 1 1 t\n" for user in "12345"))
        b = self.put("b.run", "1 Q0 d 1 1 t\n2 Q0 a 1 1 t\n3 Q0 q 1 1 t\n")
        result = compare(self.at("data"), a, b, [1], ("HR",), engine="plain")
        row = result["measures"][0]
        self.assertEqual((row["a"], row["b"], row["users_won"], row["users_lost"]), (0.0, 0.4, 2, 0))
        self.assertEqual((result["missing_in_b"], result["agreement"]["overlap@1"]), (2, 0.2))
        self.assertIn("HR@1", table(result))
        self.assertEqual(compare(self.at("data"), a, b, [1], ("HR",), answered_only=True, engine="plain")["users"], 3)
        self.assertEqual(result, compare(self.at("data"), a, b, [1], ("HR",), engine="plain"))
        with self.assertRaisesRegex(EvalError, "2000"):
            compare(self.at("data"), a, b, resamples=100)


class CommandLine(Small):
    def test_commands_in_a_row(self):
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            self.assertEqual(cli.main(["baselines", self.at("data"), "--out", self.at("runs")]), 0)
            for name in ("popularity", "co-occurrence"):
                self.assertEqual(
                    cli.main(
                        [
                            "evaluate",
                            self.at("data"),
                            self.at(f"runs/{name}.run"),
                            "--engine",
                            "plain",
                            "--out",
                            self.at(f"{name}.json"),
                        ]
                    ),
                    0,
                )
            self.assertEqual(
                cli.main(["report", self.at("co-occurrence.json"), self.at("popularity.json"), "--out", self.at("r.html")]), 0
            )
        self.assertTrue(os.path.isfile(self.at("r.html")))

    def test_a_closed_pipe_ends_it_quietly(self):
        package = os.path.dirname(os.path.dirname(os.path.abspath(cli.__file__)))
        command = [
            sys.executable,
            "-m",
            "beamline_eval",
            "evaluate",
            self.at("data"),
            self.put("x.run", "1 Q0 d 1 1 t\n"),
            "--engine",
            "plain",
        ]
        read, write = os.pipe()
        os.close(read)
        done = subprocess.run(command, stdout=write, stderr=subprocess.PIPE, text=True, cwd=package)
        os.close(write)
        self.assertEqual((done.returncode, "Traceback" in done.stderr, "Broken" in done.stderr), (141, False, False), done.stderr)

    def test_errors_are_one_line(self):
        err = io.StringIO()
        with contextlib.redirect_stderr(err):
            self.assertEqual(cli.main(["evaluate", self.at("nowhere"), "x"]), 2)
        self.assertRegex(err.getvalue(), r"^error: .*no prepare\.json.*\n$")

    def test_every_command_explains_itself(self):
        for command in cli.COMMANDS:
            out = io.StringIO()
            with contextlib.redirect_stdout(out), self.assertRaises(SystemExit) as ended:
                cli.main([command, "--help"])
            self.assertEqual(ended.exception.code, 0)
            self.assertGreater(len(out.getvalue()), 500)


class Files(Folder):
    def test_a_file_appears_whole_or_not_at_all(self):
        with self.assertRaises(RuntimeError), writing(self.at("x")) as file:
            file.write("half")
            raise RuntimeError
        self.assertEqual(os.listdir(self.folder), [])

    def test_digest(self):
        found = digest(self.put("d/e/f.txt", "abc"))
        self.assertEqual(found["file"], "e/f.txt")
        self.assertTrue(found["sha256"].startswith("ba7816bf"))

    def test_a_binary_that_is_not_there(self):
        with self.assertRaisesRegex(EvalError, "no such program"):
            engine.binary(self.at("beamline"))

    def test_percentiles(self):
        self.assertEqual(engine.percentiles(range(100)), {"p50": 50, "p90": 90, "p99": 99})


if __name__ == "__main__":
    unittest.main()
