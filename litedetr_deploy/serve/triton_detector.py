"""model.py of Triton's Python back end: a detector in ONNX Runtime.

`litedetr serve triton` copies this file beside model.onnx, the op library and what it imports of this package.
"""

import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
# What was copied here counts, whatever else is installed; and some servers start Python without its environment.
sys.path = [str(HERE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]
os.environ["LITEDETR_LIBRARY_PATH"] = str(HERE)

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402

from litedetr_deploy.artifact import distrust  # noqa: E402
from litedetr_deploy.machine import usable_cores  # noqa: E402
from litedetr_deploy.runtime.session import OnnxSession  # noqa: E402


class TritonPythonModel:
    def initialize(self, args):
        if int(np.__version__.partition(".")[0]) > 1:  # whose arrays a back end of NumPy 1 takes for empty ones
            raise RuntimeError(f"NumPy {np.__version__} is installed; Triton's Python back end takes NumPy 1.26.")
        config = json.loads(args["model_config"])
        instances = int(config["instance_group"][0]["count"])
        providers = None
        if args["model_instance_kind"] == "GPU":
            device = {"device_id": args["model_instance_device_id"]}
            providers = [("CUDAExecutionProvider", device), "CPUExecutionProvider"]
        # Threads of several instances would wait for each other.
        threads = None if instances == 1 else max(1, usable_cores() // instances)
        file = HERE / "model.onnx"
        self.session = OnnxSession(file, providers, threads)
        self.batches = int(config["max_batch_size"]) > 0
        if why := distrust(file, self.session.metadata):
            pb_utils.Logger.log_warn(f"{file} {why}: its results are not proven")

    def execute(self, requests):
        """Return a response for each request; those that Triton put into one batch run as one."""
        batches = [requests] if self.batches else [[request] for request in requests]
        return [response for batch in batches for response in self._run(batch)]

    def _run(self, requests):
        try:
            feeds = [{name: _array(request, name) for name in self.session.inputs} for request in requests]
            together = {name: np.concatenate([feed[name] for feed in feeds]) for name in self.session.inputs}
            outputs = self.session.run(together)
        except Exception as error:  # of ONNX Runtime, whose classes share no base
            if len(requests) == 1:
                return [pb_utils.InferenceResponse(error=pb_utils.TritonError(str(error)))]
            # One of them is at fault, and the others get their answers.
            return [response for request in requests for response in self._run([request])]
        responses, start = [], 0
        for feed in feeds:
            # Without batches the outputs are of one request, whatever their first size is.
            end = start + len(next(iter(feed.values()))) if self.batches else None
            tensors = [pb_utils.Tensor(name, array[start:end]) for name, array in outputs.items()]
            responses.append(pb_utils.InferenceResponse(tensors))
            start = end
        return responses


def _array(request, name):
    return pb_utils.get_input_tensor_by_name(request, name).as_numpy()
