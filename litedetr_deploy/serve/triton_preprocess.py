"""model.py of Triton's Python back end: JPEG and other image files to what a detector takes.

`litedetr serve triton` copies this file beside what it imports of this package.
"""

import json
import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
# As in the detector's model.py.
sys.path = [str(HERE), *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep)), *sys.path]

import numpy as np  # noqa: E402
import triton_python_backend_utils as pb_utils  # noqa: E402

from litedetr_deploy.errors import LiteDetrError  # noqa: E402
from litedetr_deploy.runtime.images import load_image, prepare  # noqa: E402


class TritonPythonModel:
    def initialize(self, args):
        if int(np.__version__.partition(".")[0]) > 1:  # whose arrays a back end of NumPy 1 takes for empty ones
            raise RuntimeError(f"NumPy {np.__version__} is installed; Triton's Python back end takes NumPy 1.26.")
        config = json.loads(args["model_config"])
        self.resize = config["parameters"]["resize"]["string_value"]
        self.size = json.loads(config["parameters"]["image_size"]["string_value"])  # [height, width], or null
        self.outputs = [output["name"] for output in config["output"]]

    def execute(self, requests):
        """Return a response for each request: an image that cannot be read fails its own request alone."""
        return [self._answer(request) for request in requests]

    def _answer(self, request):
        files = pb_utils.get_input_tensor_by_name(request, "image").as_numpy().reshape(-1)
        try:
            prepared = [prepare(load_image(bytes(file)), self.resize, self.size) for file in files]
            sizes = sorted({f"{image.pixels.shape[1]}x{image.pixels.shape[2]}" for image in prepared})
            if len(sizes) > 1:
                raise LiteDetrError(
                    f"the images of one request become inputs of {' and '.join(sizes)}, and a batch has one size. Send "
                    "each in a request of its own."
                )
        except (LiteDetrError, MemoryError) as error:
            wrong = pb_utils.TritonError(str(error), pb_utils.TritonError.INVALID_ARG)
            return pb_utils.InferenceResponse(error=wrong)
        arrays = {
            "images": np.stack([image.pixels for image in prepared]),
            "orig_target_sizes": np.array([image.original_size for image in prepared], np.int64),
            "pixel_mask": np.stack([image.mask for image in prepared]),
        }
        return pb_utils.InferenceResponse([pb_utils.Tensor(name, arrays[name]) for name in self.outputs])
