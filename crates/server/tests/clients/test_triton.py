"""The stock Triton client, as an operator of a fleet uses it."""

import json
import os
import shutil
import tempfile
import unittest

from server import DEMO, Server, needs


@needs("tritonclient.http")
class TritonClient(unittest.TestCase):
    def setUp(self):
        from tritonclient.http import InferenceServerClient

        made = tempfile.TemporaryDirectory()
        self.addCleanup(made.cleanup)
        shutil.copytree(DEMO, os.path.join(made.name, "shop"))
        self.server = Server("--model-root", made.name)
        self.addCleanup(self.server.close)
        self.client = InferenceServerClient(self.server.address)
        self.addCleanup(self.client.close)

    def test_health_and_metadata(self):
        client = self.client
        self.assertTrue(client.is_server_live())
        self.assertTrue(client.is_server_ready())
        self.assertEqual(client.get_server_metadata()["name"], "beamline")
        self.assertTrue(client.is_model_ready("default"))
        metadata = client.get_model_metadata("default")
        self.assertEqual(metadata["inputs"], [{"name": "request", "datatype": "BYTES", "shape": [1]}])
        self.assertEqual(metadata["outputs"], [{"name": "answer", "datatype": "BYTES", "shape": [1]}])

    def test_models_are_loaded_and_unloaded(self):
        client = self.client

        def names():
            return [model["name"] for model in client.get_model_repository_index()]

        client.load_model("shop")
        self.assertIn("shop", names())
        self.assertTrue(client.is_model_ready("shop"))
        client.load_model("shop", config="{}")
        client.unload_model("shop")
        self.assertNotIn("shop", names())
        client.load_model("shop")
        client.unload_model("shop", unload_dependents=True)
        self.assertNotIn("shop", names())

    def test_errors_can_be_printed(self):
        from tritonclient.utils import InferenceServerException

        client = self.client
        for call in [
            lambda: client.get_model_config("default"),
            lambda: client.get_inference_statistics("default"),
            lambda: client.get_model_metadata("nothing"),
            lambda: client.load_model("nothing"),
            lambda: client.load_model("shop", config='{"backend": "onnxruntime"}'),
            lambda: client.load_model("shop", config="{}", files={"file:1/model.onnx": b"x"}),
            lambda: client.unload_model("nothing"),
        ]:
            with self.assertRaises(InferenceServerException) as caught:
                call()
            self.assertGreater(len(caught.exception.message()), 10)
            self.assertTrue(str(caught.exception))

    def infer(self, request, binary, wanted):
        import numpy
        from tritonclient.http import InferInput, InferRequestedOutput

        tensor = InferInput("request", [1], "BYTES")
        tensor.set_data_from_numpy(numpy.array([json.dumps(request).encode()], dtype=numpy.object_), binary_data=binary)
        outputs = None if wanted is None else [InferRequestedOutput("answer", binary_data=wanted)]
        result = self.client.infer("default", [tensor], outputs=outputs, request_id="r7")
        response = result.get_response()
        self.assertEqual((response["model_name"], response["id"]), ("default", "r7"))
        text = result.as_numpy("answer")[0]
        return json.loads(text)

    def test_inference_is_a_request_for_items(self):
        request = {"history": ["soft-baby-blanket-dogs"], "num_items": 3}
        answers = [
            self.infer(request, binary, wanted) for binary in (False, True) for wanted in (None, False, True)
        ]
        for answer in answers:
            self.assertEqual(answer["items"], answers[0]["items"])
        self.assertEqual(len(answers[0]["items"]), 3)

    def test_wrong_requests_are_told(self):
        from tritonclient.utils import InferenceServerException

        with self.assertRaises(InferenceServerException) as caught:
            self.infer({"histroy": []}, True, None)
        self.assertIn("did you mean `history`?", str(caught.exception))


if __name__ == "__main__":
    unittest.main()
