"""Every attention of a graph by itself: what its projections and the op make of their own inputs, in float64.

With random weights, what attention adds to a token is within the rounding of the final outputs.  Whether its own output
tells enough is measured: with its offsets or its logits off by one percent, the comparison must fail.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor

from ..model.attention import DeformableAttention
from ..model.detector import Detector
from ..ops import reference, schema
from .typed import fake_quantized_bias, fake_quantized_weight
from .verdict import Verdict

QUERIES = 256  # of each attention, evenly spread: float64 takes its time
WRONG = 1.01  # times offsets or logits: must be noticed
# What an output may be off by, root mean square, as a part of it: so many times what the definition itself is off by in
# float32, so many epsilons of float32 and, where it is stored in half, of the half type.
SPREADS, FLOOR, HALF_FLOOR = 4, 8, 0.75
# Input of the op -> the Linear that makes it.
_PROJECTIONS = {
    "query": "query_proj", "attention_logits": "attention_weights", "value": "value_proj",
    "sampling_offsets": "sampling_offsets", "key": "key_proj",
}  # fmt: skip


@dataclass(frozen=True)
class Region:
    """One attention of a graph."""

    module: str
    op_type: str
    projections: dict[str, tuple[str, str]]  # name of a Linear -> the graph's values that go in and come out
    inputs: dict[str, str]  # of the op -> a value of the graph; those that it lacks are folded away
    output: str

    @property
    def values(self) -> set[str]:
        return {self.output, *self.inputs.values(), *(value for pair in self.projections.values() for value in pair)}


def find_regions(proto: onnx.ModelProto, model: Detector) -> list[Region]:
    """Return the attentions of `model` that the graph has, as nodes of the op or in standard ops."""
    nodes = {node.name: node for node in proto.graph.node}
    made = {output: node.name for node in proto.graph.node for output in node.output}
    last = {}  # value that a module, or an attention in standard ops, makes in the end
    for node in proto.graph.node:
        module, _, rest = node.name.partition("/")
        last[module] = last[f"{module}/{rest.partition('/')[0]}"] = node.output[0]
    regions = []
    for name, module in _attentions(model):
        op_type = schema.PLAIN if module.query_proj is None else schema.KEY_AWARE
        scope = f"detector.{name}/{op_type}"
        linears = {child: f"detector.{name}.{child}" for child in _PROJECTIONS.values()}
        projections = {
            child: (nodes[f"{linear}/{product}"].input[0], last[linear])
            for child, linear in linears.items()
            for product in ("MatMul", "Gemm")
            if f"{linear}/{product}" in nodes
        }
        if scope not in last or not {"value_proj", "sampling_offsets"} <= projections.keys():
            continue  # what another tool has renamed
        if scope in nodes and nodes[scope].domain == schema.DOMAIN:
            names = (name for name, _, _ in schema.INPUTS[op_type])
            inputs = {name: value for name, value in zip(names, nodes[scope].input) if value}
        else:
            inputs = {key: projections[child][1] for key, child in _PROJECTIONS.items() if child in projections}
            sliced = [node.input[0] for node in proto.graph.node if node.name.startswith(f"{scope}/Slice")]
            outside = [value for value in sliced if value in made and f"/{op_type}/" not in made[value]]
            if outside:
                inputs["reference_points"] = outside[0]
        regions.append(Region(name, op_type, projections, inputs, last[scope]))
    return regions


def _attentions(model: Detector) -> Iterator[tuple[str, DeformableAttention]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, DeformableAttention))


@contextlib.contextmanager
def geometry(model: Detector):
    """Give a dict that holds, after `model` ran inside, reference points, map sizes and padding of every attention."""
    found: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    with contextlib.ExitStack() as hooks:
        for name, module in _attentions(model):
            hook = module.register_forward_pre_hook(lambda _, x, name=name: found.update({name: (x[1], x[3], x[4])}))
            hooks.callback(hook.remove)
        yield found


@torch.inference_mode()
def compare_regions(verdict: Verdict, case: str, regions: list[Region], values, seen, model: Detector, half, types):
    """Add a row for every attention to `verdict`, and say there where a wrong attention would pass.

    values: of the graph, by name, as float32; seen: as `geometry` gives it, on the same input; half: the graph's half
    type; types: of its modules, as `typed.modules` gives them.
    """
    modules, blind = dict(_attentions(model)), []
    floor = FLOOR * torch.finfo(torch.float32).eps + (0.0 if half is None else HALF_FLOOR * torch.finfo(half).eps)
    for region in regions:
        module = modules[region.module]
        checks = []  # what the graph has, what is right, and what that is in float32
        for child, (source, result) in region.projections.items():
            linear = getattr(module, child)
            x = _rows(values[source].reshape(*values[result].shape[:2], -1))  # a Gemm's has rows of all images
            found = _rows(values[result]).double()
            weight, bias = linear.weight.detach(), linear.bias.detach()
            if (rounding := types.get(f"detector.{region.module}.{child}")) is not None:
                if rounding.int32_bias:
                    bias = fake_quantized_bias(bias, weight, rounding.input)
                weight = fake_quantized_weight(weight) if rounding.input else weight.to(half).float()
            checks.append((found, F.linear(x.double(), weight.double(), bias.double()), F.linear(x, weight, bias)))
        inputs = _inputs(region, module, values, *seen[region.module])
        counts: dict[str, Any] = {"num_heads": module.num_heads, "num_points": module.num_points}
        keyed = region.op_type == schema.KEY_AWARE
        compute = functools.partial(reference.key_aware_deform_attn if keyed else reference.ms_deform_attn, **counts)
        found, wanted = _rows(values[region.output]).double(), compute(**inputs)
        singles = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        checks.append((found, wanted, compute(**singles)))
        difference = max(relative(found - right, right) for found, right, _ in checks)
        tolerance = SPREADS * max(relative(rounded - right, right) for _, right, rounded in checks) + floor
        verdict.add(f"{case}, attention alone, relative", region.module, difference, tolerance)
        names = ("sampling_offsets", schema.INPUTS[region.op_type][0][0])
        wrong = (compute(**inputs | {name: inputs[name] * WRONG}) for name in names)
        if all(relative(found - other, wanted) <= tolerance for other in wrong):
            blind.append(region.module)
    if len(regions) < len(modules):
        verdict.undecided = (
            "its attentions are not found by their names, which another tool may have changed, so that an error inside "
            "them might not show. Verify the file that `litedetr export` wrote."
        )
    elif blind:
        others = f" ({len(blind)} of {len(modules)} attentions)" if len(blind) > 1 else ""
        verdict.undecided = (
            f"it would pass with the offsets or logits of {blind[0]} off by 1 % as well{others}. Weights that are "
            "zero or untrained do that, and images in which there is nothing: give trained weights, or other images."
        )


def relative(difference: Tensor, wanted: Tensor) -> float:
    """Return the root mean square of `difference` as a part of that of `wanted`."""
    return float(difference.square().mean().sqrt() / (wanted.square().mean().sqrt() or 1.0))


def _inputs(region: Region, module: DeformableAttention, values, references, shapes, mask) -> dict[str, Tensor]:
    """Return the op's inputs in float64, at QUERIES of its queries."""
    inputs = {name: torch.from_numpy(values[value]).double() for name, value in region.inputs.items()}
    if "spatial_shapes" not in inputs:  # what lies between the modules and the op, where it is lowered
        for name in {"value", "key"} & inputs.keys() if mask is not None else ():
            inputs[name] = inputs[name].masked_fill(mask[..., None], 0.0)
        if module.same_loc:
            offsets = inputs["sampling_offsets"].unflatten(-1, (module.num_heads, 1, -1))
            inputs["sampling_offsets"] = offsets.expand(-1, -1, -1, module.num_levels, -1).flatten(2)
    inputs["spatial_shapes"] = shapes
    inputs.setdefault("reference_points", references.double())
    for name in (schema.INPUTS[region.op_type][0][0], "sampling_offsets", "reference_points"):
        inputs[name] = _rows(inputs[name])
    return inputs


def _rows(values: np.ndarray | Tensor) -> Tensor:
    """Return QUERIES of the Q rows of values [N, Q, ...], or all where there are fewer."""
    chosen = np.linspace(0, values.shape[1] - 1, min(QUERIES, values.shape[1])).astype(np.int64)
    return torch.as_tensor(values[:, chosen])
