"""A fused graph against the original in ONNX Runtime: every region on its own inputs, then the whole.

The regions decide: rounding in an early layer can make a detector of noise choose other queries in the end, and what is
wrong inside an attention need not show there.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import onnx
import onnx_ir as ir
import torch

from ..errors import LiteDetrError
from ..ops import reference, schema
from ..runtime.session import create_session
from ..verify.probes import nudged
from ..verify.regions import FLOOR, QUERIES, SPREADS, relative
from ..verify.verdict import Verdict, check_finite, compare, mean
from . import emit
from .emit import Sizes
from .facts import Facts
from .match import Region

# Of whole outputs: the regions of the graph were proven before, and this is about what stands between them.
WHOLE_FLOOR = 1e-4
SPOILT = ("offsets", "logits")
Arrays = Mapping[str, np.ndarray]


def region_graph(
    region: Region, sizes: Sizes, facts: Facts, kinds, attention: str, opset: int, spoilt: str = ""
) -> bytes:
    """Return a model of one written region: the graph's values go in, the op's inputs and the result come out."""
    inputs: dict[str, ir.Value] = {}

    def value_of(name: str) -> ir.Value:
        if name not in inputs:
            inputs[name] = ir.val(name, dtype=kinds[name])
        return inputs[name]

    written = emit.write(region, sizes, facts, kinds, attention, value_of, spoilt)
    graph = ir.Graph(
        list(inputs.values()), [written.output, *(v for v in written.inputs.values() if v.producer() is not None)],
        nodes=written.nodes, initializers=written.constants, opset_imports={"": opset, schema.DOMAIN: schema.VERSION},
    )  # fmt: skip
    return ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()


def run_regions(regions: Sequence[tuple[Region, Sizes]], proto: onnx.ModelProto, feed: Arrays) -> dict:
    """Return what all regions read and make in the original on `feed`, by name."""
    names = [name for region, sizes in regions for name in (*emit.sources(region, sizes), region.name)]
    return run(proto, list(dict.fromkeys(names)), feed)


def compare_region(
    verdict: Verdict, case: str, region: Region, sizes: Sizes, facts: Facts, kinds, attention: str, opset: int,
    values: Arrays,
) -> bool:  # fmt: skip
    """Add a row for a region to `verdict`; return whether one that is wrong by 1 % would pass."""
    wanted = values[region.name]
    names = [*emit.sources(region, sizes), region.name]
    if not check_finite(verdict, case, {}, values, [name for name in names if values[name].dtype.kind == "f"]):
        return False

    def compute(spoilt: str = "") -> tuple[np.ndarray, dict[str, np.ndarray]]:
        session = create_session(region_graph(region, sizes, facts, kinds, attention, opset, spoilt))
        names = [output.name for output in session.get_outputs()]
        feed = {value.name: values[value.name] for value in session.get_inputs()}
        found = dict(zip(names, session.run(names, feed)))
        return found[names[0]].reshape(wanted.shape), found

    def distance(difference: np.ndarray) -> float:
        return relative(torch.from_numpy(difference), torch.from_numpy(wanted.astype(np.float64)))

    found, given = compute()
    tolerance = _tolerance(region, sizes, facts, kinds, attention, values, given)
    quantity = region.name
    compare({quantity: found}, {quantity: wanted}, {quantity: tolerance}, verdict, case, distance)
    return any(
        distance(compute(spoilt)[0].astype(np.float64) - wanted.astype(np.float64)) <= tolerance for spoilt in SPOILT
    )  # fmt: skip


def _tolerance(region: Region, sizes: Sizes, facts: Facts, kinds, attention, values: Arrays, given: Arrays) -> float:
    """Return what rounding may change: some times what the op's definition itself loses in float32."""
    place: dict[str, np.ndarray] = dict(values) | dict(given)
    written = emit.write(region, sizes, facts, kinds, attention, lambda name: ir.val(name, dtype=kinds[name]))
    inputs = {}
    for name, value in written.inputs.items():
        array = place[value.name] if value.name in place else value.const_value.numpy()
        tensor = torch.from_numpy(np.ascontiguousarray(array))
        if name in ("attention_logits", "sampling_offsets", "reference_points"):
            chosen = torch.linspace(0, tensor.shape[1] - 1, min(QUERIES, tensor.shape[1])).long()
            tensor = tensor[:, chosen]
        inputs[name] = tensor.double() if tensor.is_floating_point() else tensor
    attend: Callable[..., torch.Tensor] = functools.partial(
        reference.ms_deform_attn, num_heads=region.heads, num_points=region.num_points
    )
    right = attend(**inputs)
    singles = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in inputs.items()}
    rounded = attend(**singles).double()
    return SPREADS * relative(rounded - right, right) + FLOOR * float(np.finfo(np.float32).eps)


def run(
    proto: onnx.ModelProto, names: Iterable[str] | None, feed: Arrays, forced: Arrays | None = None
) -> dict[str, np.ndarray]:
    """Return values of a graph by name, its outputs when None.  forced: what further values of it are."""
    asked = onnx.ModelProto()
    asked.CopyFrom(proto)
    del asked.metadata_props[:]
    graph = asked.graph
    names = list(names or (output.name for output in graph.output))
    for name, array in (forced or {}).items():
        for node in graph.node:
            for i, output in enumerate(node.output):
                if output == name:
                    node.output[i] = f"{name}/own"
        kind = onnx.helper.np_dtype_to_tensor_dtype(array.dtype)
        graph.input.append(onnx.helper.make_tensor_value_info(name, kind, [None] * array.ndim))
        for i, output in enumerate(graph.output):  # it cannot be an input and an output at once
            if output.name == name:
                graph.output[i].name = f"{name}/own"
    del graph.output[:]
    names = [f"{name}/own" if name in (forced or ()) else name for name in names]
    own = {info.name for info in graph.input} | {tensor.name for tensor in graph.initializer}
    graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in own)
    session = create_session(asked.SerializeToString())
    made = [output.name for output in session.get_outputs()]
    found = dict(zip(made, session.run(made, dict(feed) | dict(forced or {}))))
    found |= {name: feed[name] for name in names if name in feed}
    found |= {t.name: onnx.numpy_helper.to_array(t) for t in graph.initializer if t.name in names}
    return {name.removesuffix("/own"): found[name] for name in names}


def compare_whole(verdict: Verdict, case: str, original: onnx.ModelProto, fused: onnx.ModelProto, feed: Arrays) -> None:
    """Compare all outputs; what the original ranks first decides for both, so that rounding does not choose other
    queries."""
    wanted, forced = _ranked(original, feed)
    found = run(fused, wanted, feed, forced)
    moved = run(original, wanted, {name: _nudged(array) for name, array in feed.items()}, forced)
    _compare_outputs(verdict, case, wanted, found, moved, WHOLE_FLOOR)


def compare_stored(
    verdict: Verdict, wide: onnx.ModelProto, original: onnx.ModelProto, fused: onnx.ModelProto, feed: Arrays,
    stored: Arrays,
) -> bool:  # fmt: skip
    """Compare a half model with its float twin, by what the original loses in half; return whether it runs here.

    feed, stored: the inputs in float and as the model takes them.
    """
    wanted, forced = _ranked(wide, feed)
    try:
        found = {name: _as_float(array) for name, array in run(fused, wanted, stored, forced).items()}
        moved = {name: _as_float(array) for name, array in run(original, wanted, stored, forced).items()}
    except LiteDetrError:
        return False  # the CPU has few kernels of bfloat16
    _compare_outputs(verdict, "in its own types", wanted, found, moved, FLOOR * float(np.finfo(np.float16).eps))
    return True


def _ranked(proto: onnx.ModelProto, feed: Arrays) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return all outputs and what is ranked, and the indices of what is ranked first."""
    ranked = [node.output for node in proto.graph.node if node.op_type == "TopK"]
    chosen = [outputs[1] for outputs in ranked if outputs[1]]
    names = [output.name for output in proto.graph.output]
    names += [outputs[0] for outputs in ranked if outputs[0] and outputs[0] not in names]
    values = run(proto, dict.fromkeys([*names, *chosen]), feed)
    return {name: values[name] for name in names if name not in chosen}, {name: values[name] for name in chosen}


def _compare_outputs(verdict: Verdict, case: str, wanted: dict, found: dict, moved: dict, floor: float) -> None:
    """Add a row for every output; moved: what is right as well, to rounding."""
    tolerances = {}
    for name in wanted:
        sides = [_as_float(values[name]) for values in (wanted, found, moved)]
        # Places that a model fills with -infinity, as those of words that a text has not.
        if np.array_equal(np.isneginf(sides[0]), np.isneginf(sides[1])):
            sides = [np.where(np.isneginf(side), np.float32(0), side) for side in sides]
        wanted[name], found[name], moved[name] = sides
        right, _, other = sides
        rounding = mean(other - right) if other.shape == right.shape else 0.0
        tolerances[name] = SPREADS * (rounding if np.isfinite(rounding) else 0.0) + floor * _size(right)
    compare(found, wanted, tolerances, verdict, case, mean)


def _size(array: np.ndarray) -> float:
    return mean(array) if np.isfinite(array).all() else 0.0


def _as_float(array: np.ndarray) -> np.ndarray:
    return np.asarray(array, np.float64 if array.dtype.kind in "iu" else np.float32)


def _nudged(array: np.ndarray) -> np.ndarray:
    return nudged(array) if array.dtype == np.float32 and array.ndim == 4 and (array >= 0).all() else array
