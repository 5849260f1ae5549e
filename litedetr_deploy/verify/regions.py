"""Every attention of a graph by itself: what it makes of its own inputs, against the definition in float64.

Final outputs alone can say little: with random weights, what attention adds to a token is within the rounding of all
the rest.  An attention's own output tells more, and whether it tells enough is measured: with its offsets or its logits
off by one percent, the comparison must fail.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from torch import Tensor

from ..model.attention import DeformableAttention
from ..model.detector import Detector
from ..ops import reference, schema
from .verdict import Verdict

QUERIES = 256  # of each attention, evenly spread: float64 takes its time
WRONG = 1.01  # times offsets or logits: must be noticed
# What an output may be off by, root mean square, as a part of it: so many times what the definition itself is off by in
# float32, so many epsilons of float32 and, where it is stored in half, of the half type.
SPREADS, FLOOR, HALF_FLOOR = 4, 8, 0.75
_FUNCTIONS = {schema.KEY_AWARE: reference.key_aware_deform_attn, schema.PLAIN: reference.ms_deform_attn}
# The modules whose outputs the op takes, where it is lowered to standard ops.
_MODULES = {
    "query": "query_proj",
    "attention_logits": "attention_weights",
    "value": "value_proj",
    "sampling_offsets": "sampling_offsets",
    "key": "key_proj",
}


@dataclass(frozen=True)
class Region:
    """One attention of a graph.

    inputs: of the op, by its names -> a value of the graph; those that it lacks are folded away.
    """

    module: str
    op_type: str
    inputs: dict[str, str]
    output: str

    @property
    def values(self) -> list[str]:
        return [*self.inputs.values(), self.output]


def find_regions(proto: onnx.ModelProto, model: Detector) -> list[Region]:
    """Return the attentions of `model` as the graph has them, as nodes of the op or in standard ops."""
    nodes = {node.name: node for node in proto.graph.node}
    last = {}  # value that a module makes
    for node in proto.graph.node:
        for scope in {node.name.split("/")[0], "/".join(node.name.split("/")[:2])}:
            last[scope] = node.output[0]
    made = {output: node.name for node in proto.graph.node for output in node.output}
    regions = []
    for name, module in _attentions(model):
        op_type = schema.PLAIN if module.query_proj is None else schema.KEY_AWARE
        scope = f"detector.{name}/{op_type}"
        if scope in nodes and nodes[scope].domain == schema.DOMAIN:
            names = (name for name, _, _ in schema.INPUTS[op_type])
            inputs = {name: value for name, value in zip(names, nodes[scope].input) if value}
        else:
            inputs = {
                key: last[f"detector.{name}.{child}"]
                for key, child in _MODULES.items()
                if f"detector.{name}.{child}" in last
            }
            sliced = [node.input[0] for node in proto.graph.node if node.name.startswith(f"{scope}/Slice")]
            outside = [value for value in sliced if value in made and f"/{op_type}/" not in made[value]]
            if outside:
                inputs["reference_points"] = outside[0]
        if scope in last and {"value", "sampling_offsets"} <= inputs.keys():
            regions.append(Region(name, op_type, inputs, last[scope]))
    return regions


def _attentions(model: Detector) -> Iterator[tuple[str, DeformableAttention]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, DeformableAttention))


@contextlib.contextmanager
def geometry(model: Detector):
    """Give a dict that holds, after `model` ran inside, reference points, map sizes and padding of every attention."""
    found: dict[str, tuple[Tensor, Tensor, Tensor | None]] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, x, name=name: found.update({name: (x[1], x[3], x[4])}))
        for name, module in _attentions(model)
    ]
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def compare_regions(
    verdict: Verdict,
    case: str,
    regions: list[Region],
    values: dict[str, np.ndarray],
    seen: dict[str, tuple[Tensor, Tensor, Tensor | None]],
    model: Detector,
    half: torch.dtype | None,
) -> None:
    """Add a row for every attention to `verdict`, and say there where a wrong attention would pass.

    Args:
        verdict: to add to.
        case: what the values were taken on.
        regions: as `find_regions` gives them.
        values: of the graph, by name, as float32.
        seen: as `geometry` gives it, on the same input.
        model: the detector.
        half: the graph's half type; None in FP32.
    """
    modules, blind = dict(_attentions(model)), []
    for region in regions:
        module = modules[region.module]
        inputs = _inputs(region, module, values, *seen[region.module])
        first = schema.INPUTS[region.op_type][0][0]
        compute = functools.partial(
            _FUNCTIONS[region.op_type], num_heads=module.num_heads, num_points=module.num_points
        )
        wanted = compute(**inputs)
        found = torch.from_numpy(values[region.output])[:, _chosen(values[region.output])].double()
        singles = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
        tolerance = SPREADS * _relative(compute(**singles) - wanted, wanted) + FLOOR * torch.finfo(torch.float32).eps
        if half is not None:
            tolerance += HALF_FLOOR * torch.finfo(half).eps
        verdict.add(f"{case}, attention alone, relative", region.module, _relative(found - wanted, wanted), tolerance)
        wrong = (compute(**inputs | {name: inputs[name] * WRONG}) for name in ("sampling_offsets", first))
        if all(_relative(found - other, wanted) <= tolerance for other in wrong):
            blind.append(region.module)
    if len(regions) < len(modules):
        verdict.undecided = (
            "its attentions are not found by their names, which another tool may have changed, so that an error inside "
            "them might not show. Verify the file that `litedetr export` wrote."
        )
    elif blind:
        others = f" ({len(blind)} of {len(modules)} attentions)" if len(blind) > 1 else ""
        verdict.undecided = (
            f"it would pass with the offsets and logits of {blind[0]} off by 1 % as well{others}. Weights that are "
            "zero or untrained do that, and images in which there is nothing: give trained weights, or other images."
        )


def _relative(difference: Tensor, wanted: Tensor) -> float:
    """Return the root mean square of `difference` as a part of that of `wanted`; of nothing, as it is."""
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
        inputs[name] = inputs[name][:, _chosen(inputs[name])]
    return inputs


def _chosen(values) -> np.ndarray:
    """Return which queries of values [N, Q, ...] are looked at."""
    return np.linspace(0, values.shape[1] - 1, min(QUERIES, values.shape[1])).astype(np.int64)
