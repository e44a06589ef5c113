"""The parts of the parity check that need no torch: prompts, the trie, and the comparison with a server's answer."""

import http.server
import json
import os
import sys
import tempfile
import threading
import unittest

sys.path.insert(0, os.path.join(os.path.dirname(os.path.dirname(os.path.abspath(__file__))), "tools"))
import hf_reference as tool  # noqa: E402

FIELDS = {
    "model": "decoder",
    "levels": 2,
    "level_token_patterns": ["<a_{}>", "<b_{}>"],
    "item_begin_token": {"text": "<|b|>", "id": 1},
    "item_end_token": {"text": "<|e|>", "id": 2},
    "item_separator": ", ",
    "prompt_prefix": "Seen: ",
    "prompt_suffix": "\nNext: ",
    "generation_begin": {"text": "<|b|>", "id": 1},
    "tail_tokens": [{"text": "<|e|>", "id": 2}],
}


class Tokenizer:
    """A byte-level one: the newline has another name."""

    def get_vocab(self):
        return {"<|b|>": 1, "<|e|>": 2, "\u010a": 9}

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [9] if text == "\n" else [5, 6]}

    def decode(self, ids):
        return "\n" if ids == [9] else "two words"


class PromptTest(unittest.TestCase):
    def convention(self, **changes):
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "convention.json"), "w", encoding="utf-8") as file:
                json.dump({**FIELDS, **changes}, file)
            return tool.Convention(folder)

    def test_prompt(self):
        convention = self.convention()
        self.assertEqual(
            convention.prompt([[3, 1], ["<a_0>", "<b_7>"]]), "Seen: <|b|><a_3><b_1><|e|>, <|b|><a_0><b_7><|e|>\nNext: <|b|>"
        )
        self.assertEqual(convention.prompt([]), "Seen: \nNext: <|b|>")
        self.assertEqual((convention.steps, convention.fixed("tail", Tokenizer())), (3, [2]))

    def test_absent_tokens(self):
        convention = self.convention(
            item_begin_token=None, item_end_token=None, generation_begin=None, item_separator="", tail_tokens=[]
        )
        self.assertEqual(convention.prompt([[3, 1], [0, 7]]), "Seen: <a_3><b_1><a_0><b_7>\nNext: ")
        self.assertEqual(convention.steps, 2)

    def test_a_preset_is_a_whole_convention(self):
        for fields in ({"preset": "minionerec"}, {"preset": "minionerec", "prompt_prefix": "Seen: "}):
            with tempfile.TemporaryDirectory() as folder:
                with open(os.path.join(folder, "convention.json"), "w", encoding="utf-8-sig") as file:
                    json.dump(fields, file)
                convention = tool.Convention(folder)
            self.assertEqual((convention.fields["model"], convention.steps, convention.fields["levels"]), ("decoder", 5, 3))
            self.assertEqual(convention.newest(list(range(12))), list(range(2, 12)))
        self.assertEqual(convention.prompt([[3, 1, 2], [4, 5, 6]]), "Seen: <a_3><b_1><c_2>, <a_4><b_5><c_6>\n\n### Response:\n")
        self.assertEqual(tool.Convention(folder, "onerec-think").steps, 1 + 4 + 1)

    def test_an_unknown_preset_names_the_known_ones(self):
        with self.assertRaisesRegex(SystemExit, "unknown preset 'minionrec'; known are openonerec, .*minionerec"):
            self.convention(preset="minionrec")

    def test_few_fields_are_enough(self):
        with tempfile.TemporaryDirectory() as folder:
            with open(os.path.join(folder, "convention.json"), "w", encoding="utf-8") as file:
                json.dump({"levels": 1, "level_token_patterns": ["<a_{}>"], "level_code_counts": [4]}, file)
            self.assertEqual(tool.Convention(folder).prompt([[3], [1]]), "<a_3><a_1>")

    def test_tokens_by_text_or_by_text_and_id(self):
        self.assertEqual(
            [tool.token_id(token, Tokenizer()) for token in ("<|e|>", {"text": "<|e|>", "id": 2}, {"text": "<|b|>"}, "\n")],
            [2, 2, 1, 9],
        )
        for wrong in ({"text": "<|e|>", "id": 3}, "two words"):
            with self.assertRaises(SystemExit):
                tool.token_id(wrong, Tokenizer())

    def test_ids_are_text(self):
        self.assertEqual([tool.item_id(value) for value in ("7", 7)], ["7", "7"])

    def test_encoder_decoder_is_refused(self):
        with self.assertRaises(SystemExit):
            self.convention(model="encoder-decoder")

    def test_trie(self):
        self.assertEqual(tool.exact_trie([(5, 7), (5, 6), (4, 7)]), {(): [4, 5], (5,): [6, 7], (4,): [7]})


class CompareTest(unittest.TestCase):
    answer = {"items": [["i1"], ["i2", "i2b"], ["i3"]], "scores": [-1.0, -2.0, -3.0]}

    def complaints(self, *served):
        return tool.compare(self.answer, [{"item_id": item, "score": score} for item, score in served], 1e-3)

    def test_agreement(self):
        self.assertEqual(self.complaints(("i1", -1.0), ("i2", -2.0001), ("i2b", -2.0001), ("i3", -3.0)), [])
        self.assertEqual(self.complaints(("i1", -1.0), ("i2", -2.0)), [], "a shorter list, one item per path")
        self.assertEqual(self.complaints(("i1", -1.0), ("i2", -2.0), ("i4", -3.0002)), [], "a near tie at the cut")

    def test_differences(self):
        self.assertIn("reference", self.complaints(("i1", -1.1))[0])
        self.assertIn("not in the reference", self.complaints(("i1", -1.0), ("i9", -1.5))[0])
        self.assertIn("missing", self.complaints(("i1", -1.0), ("i3", -3.0))[0])
        self.assertIn("listed after", self.complaints(("i2", -2.0), ("i1", -1.0))[0])
        self.assertIn("nothing", self.complaints()[0])


class AskServerTest(unittest.TestCase):
    def test_request_and_reply(self):
        asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                asked.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
                body = json.dumps({"items": [{"item_id": "i1", "sid": [0, 1], "score": -1.0, "rank": 1}]}).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            request = {"user_id": "u", "history": ["i9", {"item_id": "i8", "action": "view", "timestamp": 5}], "num_items": 3}
            items = tool.ask_server(f"http://127.0.0.1:{server.server_address[1]}/", request, 50)
        finally:
            server.shutdown()
            server.server_close()
        self.assertEqual(items[0]["item_id"], "i1")
        path, body = asked[0]
        self.assertEqual(path, "/v1/recommend")
        self.assertEqual(body["history"], [{"item_id": "i9"}, {"item_id": "i8", "action": "view", "timestamp": 5}])
        self.assertEqual((body["num_items"], body["beam_width"], body["normalization"]), (50, 50, "full_vocab"))


if __name__ == "__main__":
    unittest.main()
