"""Shared fixtures: official-format weights made by recipe, and the official implementation's outputs."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest

from .golden import weights

# A shell that runs the tests in its background has them ignore Ctrl-C, which some of them send to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

GOLDEN = Path(__file__).parent / "golden"
VARIANTS = {
    "lite_dino_r50_h3l1_2p1x3": "lite-dino-r50-h3l1-2+1x3",
    "lite_dino_r50_h3l1_6p1x1": "lite-dino-r50-h3l1-6+1x1",
    "dino_r50_4scale_full_nokda": "dino-r50",
}
CASES = [
    ("lite_dino_r50_h3l1_2p1x3", "batch2"),
    ("lite_dino_r50_h3l1_2p1x3", "single"),
    ("lite_dino_r50_h3l1_6p1x1", "batch2"),
    ("dino_r50_4scale_full_nokda", "batch2"),
]
FAST_CASES = {CASES[0], CASES[3]}  # one a family


class Golden:
    """One golden case: the official outputs, and the inputs that made them."""

    def __init__(self, name: str, case: str):
        self.name, self.case = name, case
        with np.load(GOLDEN / f"{name}_{case}.npz") as file:
            self.outputs = dict(file)
        images = [weights.image(*image) for image in weights.CASES[case]]
        height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
        self.images = np.zeros((len(images), 3, height, width), np.float32)
        self.pixel_mask = np.ones((len(images), height, width), bool)
        for i, image in enumerate(images):
            self.images[i, :, : image.shape[1], : image.shape[2]] = image
            self.pixel_mask[i, : image.shape[1], : image.shape[2]] = False


def official_state_dict(name: str) -> dict:
    """The state dict of a golden variant, as torch tensors; aliases of a head share their memory."""
    import torch

    listed = json.loads((GOLDEN / f"state_dict_{name}.json").read_text())["tensors"]
    tensors = {}
    for key, (shape, _) in listed.items():
        canonical = weights.canonical(key)
        if canonical not in tensors:
            tensors[canonical] = torch.from_numpy(weights.make_tensor(canonical, shape, name))
    return {key: tensors[weights.canonical(key)] for key in listed}


@pytest.fixture(scope="session")
def state_dict_of():
    cache = {}

    def get(name: str) -> dict:
        if name not in cache:
            cache[name] = official_state_dict(name)
        return cache[name]

    return get


@pytest.fixture(scope="session")
def model_of(state_dict_of):
    """Golden variant name -> model with the golden weights."""
    import litedetr_deploy as ld

    cache = {}

    def get(name: str):
        if name not in cache:
            cache[name] = ld.load_model(state_dict_of(name), VARIANTS[name])
        return cache[name]

    return get
