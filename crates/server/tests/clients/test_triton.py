"""The stock Triton client, as an operator of a fleet uses it."""

import unittest

from server import Server, needs


@needs("tritonclient.http")
class TritonClient(unittest.TestCase):
    def test_health_and_metadata(self):
        from tritonclient.http import InferenceServerClient

        with Server() as server, InferenceServerClient(server.address) as client:
            self.assertTrue(client.is_server_live())
            self.assertTrue(client.is_server_ready())
            self.assertEqual(client.get_server_metadata()["name"], "beamline")
            self.assertTrue(client.get_model_repository_index())


if __name__ == "__main__":
    unittest.main()
