"""Deformable attention as others write it, alone in a small ONNX file: every form, and forms that are almost right."""

from __future__ import annotations

import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SIZES = ((8, 12), (4, 6), (2, 3))
CHANNELS, HEADS, QUERIES = 32, 4, 10


class Attention(nn.Module):
    """forward(tokens [N, S, C], queries [N, Q, C], references [N, Q, 2 or 4]) -> [N, Q, C].

    form: 'stacked' or 'concatenated' levels; boxes: references with extents; locations: 'offsets', or 'absolute' ones
    that the queries give; weights: 'softmax', or 'given' by other means; wrong: what is permuted, '' for nothing.
    """

    def __init__(
        self, form="stacked", boxes=False, points=(4, 4, 4), locations="offsets", weights="softmax", wrong="",
        sampling=None, heads=HEADS, channels=CHANNELS,
    ):  # fmt: skip
        super().__init__()
        torch.manual_seed(5)
        self.form, self.boxes, self.points, self.locations, self.weights = form, boxes, points, locations, weights
        self.wrong, self.heads = wrong, heads
        self.sampling = {"mode": "bilinear", "padding_mode": "zeros", "align_corners": False} | (sampling or {})
        self.value_proj = nn.Linear(channels, channels)
        self.offsets = nn.Linear(channels, heads * sum(points) * 2)
        self.logits = nn.Linear(channels, heads * sum(points))
        self.output_proj = nn.Linear(channels, channels)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.mul_(4.0)

    def forward(self, tokens: Tensor, queries: Tensor, references: Tensor) -> Tensor:
        n, _, channels = tokens.shape
        q, heads, points = queries.shape[1], self.heads, self.points
        value = self.value_proj(tokens).view(n, -1, heads, channels // heads)
        places = self._places(queries, references)
        weights = self.logits(queries).view(n, q, heads, sum(points))
        if self.weights == "softmax":
            weights = weights.softmax(-1)
        elif self.weights == "given":
            weights = weights.exp() / weights.exp().sum(-1, keepdim=True)
        else:
            weights = weights.sigmoid()
        if self.wrong == "order":
            weights = weights.roll(1, -1)
        samples, grids = [], 2 * places - 1  # [N, Q, M, samples, 2]
        maps = value.split([height * width for height, width in SIZES], 1)
        for one, grid, (height, width) in zip(maps, grids.split(points, 3), SIZES):
            if self.wrong != "value":
                one = one.flatten(2).transpose(1, 2)
            if self.wrong != "grid":
                grid = grid.transpose(1, 2)
            one = one.reshape(n * heads, channels // heads, height, width)
            samples.append(F.grid_sample(one, grid.reshape(n * heads, q, -1, 2), **self.sampling))
        samples = torch.stack(samples, -2).flatten(-2) if self.form == "stacked" else torch.cat(samples, -1)
        weights = weights.transpose(1, 2).reshape(n * heads, 1, q, sum(points))
        total = (samples * weights).sum(-1)
        if self.wrong == "output":
            return self.output_proj(total.view(n, q, channels))
        return self.output_proj(total.view(n, channels, q).transpose(1, 2))

    def _places(self, queries: Tensor, references: Tensor) -> Tensor:
        n, q = queries.shape[:2]
        points = self.points
        offsets = self.offsets(queries).view(n, q, self.heads, sum(points), 2)
        if self.locations == "absolute":
            return offsets.sigmoid()
        if self.boxes and self.form == "stacked":
            offsets = offsets.view(n, q, self.heads, len(points), points[0], 2)
            centres, extents = references[:, :, None, None, None, :2], references[:, :, None, None, None, 2:]
            return (centres + offsets / points[0] * extents * 0.5).flatten(3, 4)
        if self.boxes:
            scale = torch.tensor([1 / count for count in points for _ in range(count)])[:, None].to(offsets.dtype)
            return references[:, :, None, None, :2] + offsets * scale * references[:, :, None, None, 2:] * 0.5
        sizes = torch.tensor([size[::-1] for size, count in zip(SIZES, points) for _ in range(count)]).to(offsets.dtype)
        return references[:, :, None, None, :2] + offsets / sizes


def inputs(n: int = 1, boxes: bool = False, dtype=torch.float32, channels: int = CHANNELS) -> dict[str, Tensor]:
    tokens = sum(height * width for height, width in SIZES)
    random = torch.Generator().manual_seed(1)
    shapes = {
        "tokens": (n, tokens, channels),
        "queries": (n, QUERIES, channels),
        "references": (n, QUERIES, 2 + 2 * boxes),
    }
    return {name: torch.rand(shape, generator=random).to(dtype) for name, shape in shapes.items()}


def export(path: Path, batch: bool = False, dtype=torch.float32, opset: int = 17, **options) -> Path:
    """Write an attention with TorchScript's exporter."""
    model = Attention(**options).eval().to(dtype)
    given = inputs(2 if batch else 1, options.get("boxes", False), dtype, options.get("channels", CHANNELS))
    axes = {name: {0: "batch"} for name in given} if batch else {}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, tuple(given.values()), path, dynamo=False, opset_version=opset, input_names=list(given),
            output_names=["output"], dynamic_axes=axes,
        )  # fmt: skip
    return path
