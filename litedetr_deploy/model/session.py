"""A checkpoint as it runs in PyTorch, behind the same interface as an exported model."""

from __future__ import annotations

import copy

import numpy as np
import torch

from ..machine import bounded_threads
from .deployed import OUTPUTS, Deployed
from .detector import Detector
from .resnet import fold_frozen_batch_norm


class TorchSession:
    """Run what `export_onnx` exports, before it is exported: of dynamic size, with a pixel mask (see OnnxSession).

    model: as `load_model` returns it.
    threads: of PyTorch, in the whole process; PyTorch's choice when not given.
    """

    def __init__(self, model: Detector, threads: int | None = None):
        if threads is not None:
            torch.set_num_threads(bounded_threads(threads))
        model = copy.deepcopy(model)
        fold_frozen_batch_norm(model)
        self._deployed = Deployed(model, "detections").eval()
        self.inputs = {
            "images": ("batch", 3, "height", "width"),
            "orig_target_sizes": ("batch", 2),
            "pixel_mask": ("batch", "height", "width"),
        }
        self.outputs = OUTPUTS["detections"]
        self.metadata = {
            "variant": model.config.name,
            "num_classes": model.config.num_classes,
            "class_names": list(model.class_names) if model.class_names else None,
        }

    def run(self, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on a dict of name -> array; return a dict of name -> array."""
        feed = dict(feed)
        if not feed["pixel_mask"].any():
            del feed["pixel_mask"]  # the model is the same without, and faster
        with torch.inference_mode():
            values = self._deployed(**{name: torch.from_numpy(value) for name, value in feed.items()})
        return {name: values[name].numpy() for name in self.outputs}
