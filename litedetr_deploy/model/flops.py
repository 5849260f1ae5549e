"""Operations and parameters of a detector, by part, counted from shapes: nothing is computed and no memory is used.

Two conventions, both with one multiply-add as the unit:

fvcore: the paper's, as fvcore counts the official PyTorch code: grid_sample samples keys and values separately; no
    softmax, sums or activations.  What that code computes for training only counts too, in parts of its own.
all: what this package runs.  Sampling counts once where key and value are the same.  Batch norms are folded.  Copies,
    comparisons and sorting are not arithmetic.
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
_COSTS = {  # of every number, in both conventions; a convolution's and a product's are those that are multiplied
    "convolution": (1, 1), "matrix product": (1, 1), "norm": (NORM, NORM), "sampling": (BILINEAR, BILINEAR),
    "softmax": (0, SOFTMAX), "pooling": (0, 1), "reduction": (0, 1), "pointwise": (0, 1),
}  # fmt: skip

aten = torch.ops.aten
_MOVES = {aten.clone, aten._to_copy, aten.copy, aten.copy_, aten.where, aten.masked_fill, aten.fill, aten.zeros_like}
_REDUCTIONS = {aten.sum, aten.mean, aten.amax, aten.amin, aten.cumsum, aten.all}
_ATTENTIONS = {
    torch.ops.litedetr.key_aware_deform_attn: schema.KEY_AWARE,
    torch.ops.litedetr.ms_deform_attn: schema.PLAIN,
}

TRAINING_SELECTION, TRAINING_HEADS = "query selection, for training", "heads, for training"
# First part of a module's name -> part of the detector.
_PARTS = {
    "backbone": "backbone", "input_proj": "projections", "encoder": "encoder, residual sums", "decoder": "decoder",
    "class_embed": "heads", "bbox_embed": "heads", "enc_output": "query selection",
    "enc_output_norm": "query selection", "enc_out_class_embed": "query selection",
    "enc_out_bbox_embed": "query selection", "pos_trans": "query selection", "pos_trans_norm": "query selection",
    "tgt_embed": "query selection", "query_embed": "query selection", "reference_points": "query selection",
    TRAINING_SELECTION: TRAINING_SELECTION, TRAINING_HEADS: TRAINING_HEADS,
}  # fmt: skip
# Last part of a module's name -> what it is for in the encoder.
_ITEMS = {
    "value_proj": "value projections", "key_proj": "key projections", "sampling_offsets": "offsets",
    **dict.fromkeys(("query_proj", "attention_weights"), "query projections or attention weights"),
    "output_proj": "output projections", "self_attn": "sampling and attention", "linear1": "feed-forward",
    "linear2": "feed-forward", "linear12": "light feed-forward", "linear22": "light feed-forward",
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    module: str  # its name in the detector, '' for the detector itself
    kind: str
    fvcore: int
    all: int


@dataclass(frozen=True)
class FlopCount:
    config: DetectorConfig
    image_size: tuple[int, int]
    costs: tuple[Cost, ...]  # in the order in which they first occur
    parameters: dict[str, int]  # of every module that has some of its own

    def total(self, convention: str, within: str = "") -> int:
        return sum(getattr(cost, convention) for cost in self.costs if cost.module.startswith(within))

    def parts(self) -> dict[str, dict[str, int]]:
        """Return part -> operations by convention, and parameters; in the order of the data's flow."""
        layers = [f"encoder layer {i + 1} ({'HF'[full]})" for i, full in enumerate(self.config.full_layers)]
        names = ("backbone", "projections", *layers, "encoder, residual sums", "query selection", TRAINING_SELECTION,
                 "decoder", "heads", TRAINING_HEADS, "positions and boxes")  # fmt: skip
        parts = {name: dict.fromkeys((*CONVENTIONS, "parameters"), 0) for name in names}

        def part(module: str) -> dict[str, int]:
            first, *rest = module.split(".")
            inside = first == "encoder" and rest
            return parts[layers[int(rest[1])] if inside else _PARTS.get(first, "positions and boxes")]

        for cost in self.costs:
            for convention in CONVENTIONS:
                part(cost.module)[convention] += getattr(cost, convention)
        for module, count in self.parameters.items():
            part(module)["parameters"] += count
        return {name: part for name, part in parts.items() if any(part.values())}

    def encoder_items(self) -> dict[str, int]:
        """Return the encoder's operations in fvcore's convention, by what they are for."""
        items: Counter[str] = Counter()
        for cost in self.costs:
            if cost.fvcore and cost.module.startswith("encoder"):
                items[_ITEMS.get(cost.module.rsplit(".", 1)[-1], "norms")] += cost.fvcore
        return dict(items)

    def to_dict(self) -> dict:
        return {
            "variant": self.config.name,
            "image_size": list(self.image_size),
            "total": {convention: self.total(convention) for convention in CONVENTIONS},
            "encoder": {convention: self.total(convention, "encoder") for convention in CONVENTIONS},
            "parameters": sum(self.parameters.values()),
            "parts": self.parts(),
            "encoder_items": self.encoder_items(),
        }


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
    costs = [Cost(*where, *counts) for where, counts in counting.costs.items()]
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
    op = func.overloadpacket
    if op is aten.convolution:
        return cost_of("convolution", output.numel() * math.prod(args[1].shape[1:]))
    if op in (aten.mm, aten.bmm, aten.addmm, aten.baddbmm):
        left = args[1] if op in (aten.addmm, aten.baddbmm) else args[0]
        return cost_of("matrix product", output.numel() * left.shape[-1])
    if op in (aten.native_layer_norm, aten.native_group_norm):
        return cost_of("norm", args[0].numel())
    if op is aten._softmax:
        return cost_of("softmax", output.numel())
    if op is aten.max_pool2d_with_indices:
        return cost_of("pooling", output[0].numel() * math.prod(args[1]))
    if op in _ATTENTIONS:
        _, value, _, offsets, _, num_heads, _, *key = args
        has_key = bool(key) and key[0] is not None
        costs = attention_cost(_ATTENTIONS[op], offsets.numel() // 2, value.shape[2] // num_heads, has_key)
        return "deformable attention", *costs
    if op in _REDUCTIONS and args[0].is_floating_point():
        return cost_of("reduction", args[0].numel())
    if op not in _MOVES and torch.Tag.pointwise in func.tags and output.is_floating_point():
        return cost_of("pointwise", output.numel())
    return "", 0, 0


def cost_of(kind: str, numbers: int) -> tuple[str, int, int]:
    """Return kind, and operations in both conventions."""
    fvcore, everything = _COSTS[kind]
    return kind, fvcore * numbers, everything * numbers


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
    head = dim * config.num_classes + box
    if config.is_dino:
        selection, head = queries * dim * config.num_classes, head + NORM * dim
    elif config.is_one_stage:
        selection = 0
    else:
        selection = tokens * dim * (config.num_classes - 1) + (tokens - queries) * box
    heads = (config.decoder_layers - 1) * queries * head
    counts = {TRAINING_SELECTION: selection, TRAINING_HEADS: heads}
    return [Cost(part, "matrix product", count, 0) for part, count in counts.items()]
