"""The same models in OpenVINO: PyTorch's plain way, traced and converted for the shapes of one case."""
import warnings

import torch

try:
    import openvino
except ImportError:
    openvino = None


class Traced(torch.nn.Module):
    """A function of tensors, as a module, so that it can be traced."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *inputs):
        return self.function(*inputs)


def available():
    """Whether this Python has OpenVINO."""
    return openvino is not None


def converted(function, example, threads):
    """The function, compiled by OpenVINO in single precision for inputs of the example's shapes. It returns tensors."""
    with warnings.catch_warnings():
        # Tracing warns that sizes become constants. They are: one model a case.
        warnings.simplefilter("ignore")
        model = openvino.convert_model(Traced(function), example_input=example)
    settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
    compiled = openvino.Core().compile_model(model, "CPU", settings)

    def run(*inputs):
        found = compiled([tensor.numpy() for tensor in inputs])
        return [torch.from_numpy(found[output]) for output in compiled.outputs]

    return run
