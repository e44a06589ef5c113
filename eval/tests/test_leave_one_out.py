"""The metrics, on cases small enough to check by hand, and the client against a stand-in server."""

import http.server
import json
import math
import os
import sys
import tempfile
import threading
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(__file__), ".."))
import leave_one_out as loo  # noqa: E402


class Metrics(unittest.TestCase):
    def test_by_hand(self):
        found = loo.metrics([0, 1, 4, 9, None], [5, 10])
        self.assertAlmostEqual(found["HR@5"], 3 / 5)
        self.assertAlmostEqual(found["HR@10"], 4 / 5)
        self.assertAlmostEqual(found["NDCG@5"], (1 + 1 / math.log2(3) + 1 / math.log2(6)) / 5)
        self.assertAlmostEqual(found["NDCG@10"], found["NDCG@5"] + 1 / math.log2(11) / 5)

    def test_nobody(self):
        self.assertEqual(loo.metrics([], [10]), {"HR@10": 0.0, "NDCG@10": 0.0})

    def test_rank(self):
        self.assertEqual(loo.rank_of("b", ["a", "b"]), 1)
        self.assertIsNone(loo.rank_of("c", ["a", "b"]))


class Sequences(unittest.TestCase):
    def test_offset_and_blank_lines(self):
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
            file.write("7 1 2 3\n\n8 4\n")
            file.flush()
            self.assertEqual(loo.read_sequences(file.name, -1), [("7", ["0", "1", "2"]), ("8", ["3"])])
            self.assertEqual(loo.read_sequences(file.name), [("7", ["1", "2", "3"]), ("8", ["4"])])


class Replay(unittest.TestCase):
    def test_answers_come_in_order_and_overload_is_tried_again(self):
        refused = set()

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                first = body["n"] == 3 and body["n"] not in refused
                refused.add(body["n"])
                answer = json.dumps({"error": {}} if first else {"n": body["n"]}).encode()
                self.send_response(429 if first else 200)
                self.send_header("Retry-After", "0")
                self.send_header("Content-Length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        answers = loo.replay(f"http://127.0.0.1:{server.server_port}", [{"n": n} for n in range(20)], 4)
        server.shutdown()
        server.server_close()
        self.assertEqual(answers, [{"n": n} for n in range(20)])


if __name__ == "__main__":
    unittest.main()
