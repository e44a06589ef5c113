"""The description of the API, judged by the validator that client generators use."""

import json
import os
import unittest

from server import ROOT, Server, needs


@needs("openapi_spec_validator")
class Description(unittest.TestCase):
    def test_the_committed_description_is_valid(self):
        from openapi_spec_validator import validate

        with open(os.path.join(ROOT, "crates", "server", "openapi.json"), encoding="utf-8") as file:
            validate(json.load(file))

    def test_what_the_server_gives_is_the_committed_one(self):
        import urllib.request

        with open(os.path.join(ROOT, "crates", "server", "openapi.json"), encoding="utf-8") as file:
            committed = json.load(file)
        with Server() as server, urllib.request.urlopen(f"{server.url}/openapi.json") as answer:
            self.assertEqual(json.load(answer), committed)

    def test_every_example_of_a_request_is_answered(self):
        import urllib.request

        with Server() as server:
            with urllib.request.urlopen(f"{server.url}/openapi.json") as answer:
                paths = json.load(answer)["paths"]
            for path in ["/v1/recommend", "/v1/rank", "/v1/warm"]:
                content = paths[path]["post"]["requestBody"]["content"]["application/json"]
                body = json.dumps(content["example"]).encode()
                headers = {"content-type": "application/json"}
                request = urllib.request.Request(f"{server.url}{path}", body, headers)
                with urllib.request.urlopen(request) as answer:
                    self.assertEqual(answer.status, 200, path)


if __name__ == "__main__":
    unittest.main()
