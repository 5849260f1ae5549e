"""Operations and parameters of a detector, by part, counted from shapes: nothing is computed and no memory is used.

Two conventions, both with one multiply-add as the unit:

fvcore: the paper's, as fvcore counts the official PyTorch code.  Convolutions, linear layers and matrix products; 5 for
    every number that is normalised over a layer or group; 4 for every number that grid_sample makes, keys and values
    sampled separately.  No softmax, no sums, no activations.  The outputs that the official code computes for training
    only count as well, in parts of their own.
all: what this package runs, everything counted.  Sampling is 4 for a bilinear number, once where key and value are the
    same; softmax is 5 for a number, as a norm is; sums, products, activations and reductions are 1 for a number.  Batch
    norms are folded.  Copies, comparisons and sorting are not arithmetic.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..ops import schema
from .config import DetectorConfig
from .detector import Detector
from .resnet import fold_frozen_batch_norm

PAPER_SIZE = (850, 1040)  # height, width of the image that the paper counts with
CONVENTIONS = ("fvcore", "all")
NORM = SOFTMAX = 5  # for every number, as fvcore counts norms
BILINEAR = 4  # for every number sampled

aten = torch.ops.aten
_MOVES = {aten.clone, aten._to_copy, aten.copy, aten.copy_, aten.where, aten.masked_fill, aten.fill, aten.zeros_like}
_ATTENTIONS = {
    torch.ops.litedetr.key_aware_deform_attn: schema.KEY_AWARE,
    torch.ops.litedetr.ms_deform_attn: schema.PLAIN,
}
_REDUCTIONS = {aten.sum, aten.mean, aten.amax, aten.amin, aten.cumsum, aten.all}


@dataclass(frozen=True)
class Cost:
    """What one kind of operation in one module costs."""

    module: str  # its name in the detector, '' for the detector itself
    kind: str
    fvcore: int
    all: int


@dataclass(frozen=True)
class FlopCount:
    """costs: in the order in which they first occur; parameters: of every module that has some of its own."""

    config: DetectorConfig
    image_size: tuple[int, int]
    costs: tuple[Cost, ...]
    parameters: dict[str, int]

    def total(self, convention: str) -> int:
        return sum(getattr(cost, convention) for cost in self.costs)

    def encoder(self, convention: str) -> int:
        return sum(getattr(cost, convention) for cost in self.costs if cost.module.startswith("encoder"))

    def parts(self) -> dict[str, dict[str, int]]:
        """Return part -> operations by convention, and parameters; in the order of the data's flow."""
        names = _part_names(self.config)
        parts = {name: dict.fromkeys((*CONVENTIONS, "parameters"), 0) for name in names}
        for cost in self.costs:
            for convention in CONVENTIONS:
                parts[_part(cost.module, self.config)][convention] += getattr(cost, convention)
        for module, count in self.parameters.items():
            parts[_part(module, self.config)]["parameters"] += count
        return {name: part for name, part in parts.items() if any(part.values())}

    def encoder_items(self) -> dict[str, int]:
        """Return the encoder's operations in fvcore's convention, by what they are for."""
        items: Counter[str] = Counter()
        for cost in self.costs:
            if cost.module.startswith("encoder"):
                items[_ITEMS.get(cost.module.rsplit(".", 1)[-1], "norms")] += cost.fvcore
        return {name: count for name, count in items.items() if count}

    def to_dict(self) -> dict:
        return {
            "variant": self.config.name,
            "image_size": list(self.image_size),
            "total": {convention: self.total(convention) for convention in CONVENTIONS},
            "encoder": {convention: self.encoder(convention) for convention in CONVENTIONS},
            "parameters": sum(self.parameters.values()),
            "parts": self.parts(),
            "encoder_items": self.encoder_items(),
        }


_ITEMS = {
    "value_proj": "value projections",
    "key_proj": "key projections",
    "query_proj": "query projections or attention weights",
    "attention_weights": "query projections or attention weights",
    "sampling_offsets": "offsets",
    "output_proj": "output projections",
    "self_attn": "sampling and attention",
    "linear1": "feed-forward",
    "linear2": "feed-forward",
    "linear12": "light feed-forward",
    "linear22": "light feed-forward",
}  # fmt: skip

TRAINING_SELECTION = "query selection, for training"
TRAINING_HEADS = "heads, for training"


def _part_names(config: DetectorConfig) -> list[str]:
    layers = [f"encoder layer {i + 1} ({'HF'[full]})" for i, full in enumerate(config.full_layers)]
    return ["backbone", "projections", *layers, "encoder, residual sums", "query selection", TRAINING_SELECTION,
            "decoder", "heads", TRAINING_HEADS, "positions and boxes"]  # fmt: skip


def _part(module: str, config: DetectorConfig) -> str:
    first, *rest = module.split(".")
    if first == "encoder":
        return _part_names(config)[2 + int(rest[1])] if rest else "encoder, residual sums"
    if first in ("enc_output", "enc_output_norm", "enc_out_class_embed", "enc_out_bbox_embed", "pos_trans",
                 "pos_trans_norm", "tgt_embed"):  # fmt: skip
        return "query selection"
    if first in ("class_embed", "bbox_embed"):
        return "heads"
    known = {"backbone": "backbone", "input_proj": "projections", "decoder": "decoder"}
    return first if first in (TRAINING_SELECTION, TRAINING_HEADS) else known.get(first, "positions and boxes")


def count_flops(config: DetectorConfig, image_size: tuple[int, int] = PAPER_SIZE) -> FlopCount:
    """Count one image of (height, width) without padding."""
    with torch.device("meta"):
        model = Detector(config).eval()
        parameters = {
            name: sum(p.numel() for p in module.parameters(recurse=False)) for name, module in model.named_modules()
        }
        fold_frozen_batch_norm(model)
        with torch.no_grad(), _Counting(model) as counting:
            memory = model(torch.empty(1, 3, *image_size))["memory"]
    costs = [Cost(module, kind, fvcore, everything) for (module, kind), (fvcore, everything) in counting.costs.items()]
    costs += _training_outputs(config, memory.shape[1])
    return FlopCount(config, image_size, tuple(costs), {k: v for k, v in parameters.items() if v})


class _Counting(TorchDispatchMode):
    """Count every operator that runs, under the name of the innermost module that runs it."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.costs: dict[tuple[str, str], list[int]] = {}
        self._running = [""]
        for name, module in model.named_modules():
            module.register_forward_pre_hook(lambda *_, name=name: self._running.append(name))
            module.register_forward_hook(self._finished)

    def _finished(self, *_) -> None:
        self._running.pop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        kind, fvcore, everything = _cost(func, args, output)
        if fvcore or everything:
            count = self.costs.setdefault((self._running[-1], kind), [0, 0])
            count[0] += fvcore
            count[1] += everything
        return output


def _cost(func, args: tuple, output) -> tuple[str, int, int]:
    """Return kind, and operations in both conventions, of one call."""
    op = func.overloadpacket
    if op is aten.convolution:
        count = output.numel() * math.prod(args[1].shape[1:])
        return "convolution", count, count
    if op in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
        left = args[1] if op in (aten.addmm, aten.baddbmm) else args[0]
        count = output.numel() * left.shape[-1]
        return "matrix product", count, count
    if op in (aten.native_layer_norm, aten.native_group_norm):
        return "norm", NORM * args[0].numel(), NORM * args[0].numel()
    if op is aten._softmax:
        return "softmax", 0, SOFTMAX * output.numel()
    if op is aten.max_pool2d_with_indices:
        return "pooling", 0, output[0].numel() * math.prod(args[1])
    if op in _ATTENTIONS:
        _, value, _, offsets, _, num_heads, _, *key = args
        has_key = bool(key) and key[0] is not None
        costs = attention_cost(_ATTENTIONS[op], offsets.numel() // 2, value.shape[2] // num_heads, has_key)
        return "deformable attention", *costs
    if op in _REDUCTIONS:
        return "reduction", 0, args[0].numel() if args[0].is_floating_point() else 0
    if op not in _MOVES and torch.Tag.pointwise in func.tags and output.is_floating_point():
        return "pointwise", 0, output.numel()
    return "", 0, 0


def attention_cost(op_type: str, samples: int, head_dim: int, has_key: bool) -> tuple[int, int]:
    """Return an attention op's operations in both conventions; samples: of all queries, heads, levels and points."""
    numbers = samples * head_dim
    if op_type == schema.PLAIN:
        return BILINEAR * numbers, (BILINEAR + 1) * numbers + SOFTMAX * samples
    # Products with query and with attention weights; the official code samples keys and values separately.
    gathers = 2 if has_key else 1
    return (2 * BILINEAR + 2) * numbers, (gathers * BILINEAR + 2) * numbers + SOFTMAX * samples


def _training_outputs(config: DetectorConfig, tokens: int) -> list[Cost]:
    """Return what the official code computes at inference too, though only the losses of training read it: the heads
    of all decoder layers but the last, and classes (Deformable DETR: and boxes of all tokens) of the proposals."""
    dim, queries = config.hidden_dim, config.num_queries
    box = 2 * dim * dim + 4 * dim
    if config.is_dino:
        selection, head = queries * dim * config.num_classes, dim * config.num_classes + box + NORM * dim
    else:
        selection = tokens * dim * (config.num_classes - 1) + (tokens - queries) * box
        head = dim * config.num_classes + box
    return [
        Cost(TRAINING_SELECTION, "matrix product", selection, 0),
        Cost(TRAINING_HEADS, "matrix product", (config.decoder_layers - 1) * queries * head, 0),
    ]
