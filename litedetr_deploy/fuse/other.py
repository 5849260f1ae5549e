"""What looks like deformable attention and is something else."""

from __future__ import annotations

import onnx_ir as ir

from .match import Left
from .movement import MOVING

_CLAMPING = {"Add", "Clip", "Max", "Min", "Mul", "Where"}


def others(graph: ir.Graph) -> list[Left]:
    """Return deformable convolutions, and samples of the nearest pixel (RT-DETRv2's method 'discrete')."""
    found = []
    convolutions = [node.name for node in graph if node.op_type == "DeformConv"]
    if convolutions:
        found.append(Left(tuple(convolutions), "deformable convolutions, which the op does not compute"))
    nearest = [
        node.name for node in graph if node.op_type in ("Gather", "GatherND", "GatherElements") and _is_rounded(node)
    ]
    if nearest:
        why = "'discrete' sampling, which reads the nearest pixel and clamps at the border; the op interpolates"
        found.append(Left(tuple(nearest), why))
    return found


def _is_rounded(node: ir.Node) -> bool:
    """Whether a node reads at places that are rounded locations, clamped to the map."""
    seen, clamped, waiting = set(), False, [node.inputs[1]]
    while waiting:
        value = waiting.pop()
        maker = value.producer() if value is not None else None
        if maker is None or maker in seen:
            continue
        seen.add(maker)
        clamped |= maker.op_type in ("Clip", "Max", "Min")
        if maker.op_type == "Cast" and maker.attributes["to"].as_int() in (ir.DataType.INT64, ir.DataType.INT32):
            before = maker.inputs[0].producer()
            if clamped and before is not None and before.op_type in ("Add", "Floor", "Round", "Mul"):
                return True
        if maker.op_type in MOVING | _CLAMPING:
            waiting.extend(maker.inputs)
    return False
