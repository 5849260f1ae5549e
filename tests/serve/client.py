"""A client of a Triton server, over HTTP or gRPC."""

from __future__ import annotations

import importlib

import numpy as np

TYPES = {"float32": "FP32", "int64": "INT64", "bool": "BOOL", "object": "BYTES"}


class Client:
    """A context manager: the server waits for open connections when it ends.  Not for several threads at a time."""

    def __init__(self, server, protocol: str):
        self._module = importlib.import_module(f"tritonclient.{protocol}")
        self.raw = self._module.InferenceServerClient(getattr(server, protocol))

    def __enter__(self):
        return self

    def __exit__(self, *raised):
        self.raw.close()

    def detect(self, model: str, feed: dict[str, np.ndarray], outputs=("labels", "boxes", "scores")) -> dict:
        """Return the outputs of one request, a dict of name -> array."""
        inputs = []
        for name, array in feed.items():
            inputs.append(self._module.InferInput(name, list(array.shape), TYPES[array.dtype.name]))
            inputs[-1].set_data_from_numpy(array)
        answer = self.raw.infer(model, inputs)
        return {name: answer.as_numpy(name) for name in outputs}


def largest_difference(answer: dict, wanted, i: int = 0) -> float:
    """Return how far image `i` of an answer is from `Detections`: infinite where a label differs, else the largest of
    the scores' differences and the boxes', in extents of all boxes."""
    if not np.array_equal(answer["labels"][i], wanted.labels):
        return np.inf
    extent = max(1.0, np.abs(wanted.boxes).max())
    boxes = np.abs(answer["boxes"][i] - wanted.boxes).max() / extent
    return float(max(boxes, np.abs(answer["scores"][i] - wanted.scores).max()))
