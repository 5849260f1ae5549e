"""The traced graph made into the graph that is shipped: folded, named and typed for the asked opset."""

from __future__ import annotations

import ast
import re

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter

from ..ops import schema

# Everything that follows from the weights and a fixed image size is folded: at 800x1333 the position encoding is
# the largest such constant (22 MB).
FOLD_LIMIT = 1 << 30

_SCOPES = "pkg.torch.onnx.name_scopes"  # metadata that the exporter leaves on every node
# As the exporter names the two ops' nodes.
_OPERATIONS = {schema.KEY_AWARE: "key_aware_deform_attn", schema.PLAIN: "ms_deform_attn"}

TRACE_OPSET = 18  # what the exporter writes by itself


def finish(model: ir.Model, opset: int, outputs: tuple[str, ...], sizes: dict[str, str]) -> None:
    """Optimises the exporter's model and brings it to `opset`, in place.

    outputs: the names of the graph's outputs; the trace's other outputs remain as named values inside.
    sizes: the trace's symbols for dynamic sizes -> the names that a user sees.
    """
    optimizer.fold_constants(model)  # small ones, such as the bounds of slices
    _deduplicate(model)
    _fold_weights(model.graph)
    _fold(model)
    rewriter.rewrite(model)  # slices of everything, pairs of transposes or reshapes
    _fold(model)
    _fix_reshapes(model.graph)
    _name_weights(model.graph)
    kept = [value for value in model.graph.outputs if value.name in outputs]
    model.graph.outputs.clear()
    model.graph.outputs.extend(kept)
    common.RemoveUnusedNodesPass()(model)
    used = {value.name for node in model.graph for value in node.inputs if value is not None}
    for name in set(model.graph.initializers) - used:
        model.graph.initializers.pop(name)
    _set_opset(model, opset)
    common.RemoveUnusedOpsetsPass()(model)
    _name_nodes(model.graph)
    common.ClearMetadataAndDocStringPass()(model)
    for value in [*model.graph.inputs, *(output for node in model.graph for output in node.outputs)]:
        value.metadata_props.clear()
        value.shape = _rename(value.shape, sizes)


def _rename(shape: ir.Shape | None, sizes: dict[str, str]) -> ir.Shape | None:
    if shape is None:
        return None
    pattern = "|".join(rf"\b{re.escape(symbol)}\b" for symbol in sizes)
    return ir.Shape(
        re.sub(pattern, lambda match: sizes[match[0]], str(size.value))
        if isinstance(size, ir.SymbolicDim) and size.value is not None else size
        for size in shape
    )  # fmt: skip


def _fold(model: ir.Model) -> None:
    optimizer.fold_constants(
        model, onnx_shape_inference=True, input_size_limit=FOLD_LIMIT, output_size_limit=FOLD_LIMIT
    )
    _deduplicate(model)


def _deduplicate(model: ir.Model) -> None:
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    common.IdentityEliminationPass()(model)
    # Shapes and bounds, not weights: two biases that happen to be equal keep their names.
    common.DeduplicateInitializersPass(size_limit=8)(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.RemoveUnusedNodesPass()(model)


def _fold_weights(graph: ir.Graph) -> None:
    """Weights transposed and cut at export; the results keep the name of the weight they come from."""
    for node in list(graph):
        source = node.inputs[0] if node.inputs else None
        if source is None or source.const_value is None or source.name not in graph.initializers:
            continue
        if node.op_type == "Transpose":
            folded = source.const_value.numpy().transpose(node.attributes["perm"].as_ints())
        elif node.op_type == "Slice" and all(ir.convenience.get_const_tensor(i) is not None for i in node.inputs[1:]):
            starts, ends, axes, steps = (ir.convenience.get_const_tensor(i).numpy() for i in node.inputs[1:])
            cut = [slice(None)] * len(source.shape)
            for start, end, axis, step in zip(starts, ends, axes, steps):
                cut[axis] = slice(start, end, step)
            folded = source.const_value.numpy()[tuple(cut)]
        else:
            continue
        name, number = source.name, 0
        while name in graph.initializers and not (len(source.uses()) == 1 and name == source.name):
            number += 1
            name = f"{source.name}.{number}"
        if name == source.name:
            graph.initializers.pop(name)
        value = ir.Value(
            name=name,
            shape=ir.Shape(folded.shape),
            type=source.type,
            const_value=ir.tensor(np.ascontiguousarray(folded), name=name),
        )
        graph.initializers[name] = value
        node.outputs[0].replace_all_uses_with(value)
        graph.remove(node, safe=True)


def _name_weights(graph: ir.Graph) -> None:
    """Matrices that the translation transposed lost their names; the bias added behind them still has its own."""
    for node in graph:
        weight = node.inputs[1] if node.op_type == "MatMul" else None
        if weight is None or weight.name not in graph.initializers or ".weight" in weight.name:
            continue
        for add, _ in node.outputs[0].uses():
            if add.op_type == "Add" and add.inputs[1].name in graph.initializers:
                head, dot, tail = add.inputs[1].name.rpartition("bias")
                name = f"{head}weight{tail}"
                named = graph.initializers.get(name)
                if named is not None and np.array_equal(named.const_value.numpy(), weight.const_value.numpy()):
                    weight.replace_all_uses_with(named)  # a head that several layers share
                elif dot and named is None:
                    graph.initializers.pop(weight.name)
                    weight.name = weight.const_value.name = name
                    graph.initializers[name] = weight


def _name_nodes(graph: ir.Graph) -> None:
    """Names nodes after the module that they come from: 'detector.encoder.layers.0.linear1/MatMul'.  What belongs to
    no module of the detector is in 'deployed'; an attention op in standard ops has a level of its own."""
    numbers: dict[str, int] = {}
    for node in graph:
        # Modules from the outermost to the innermost, by their names, then the operation.
        scopes: list[str] = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        *_, module, operation = ["", "", *scopes]
        name = f"{module if module.startswith('detector') else 'deployed'}/"
        for op_type, function in _OPERATIONS.items():
            if operation.startswith(function) and node.op_type != op_type:
                name += f"{op_type}/"
        name += node.op_type
        numbers[name] = numbers.get(name, -1) + 1
        node.name = f"{name}_{numbers[name]}" if numbers[name] else name


def _fix_reshapes(graph: ir.Graph) -> None:
    """Reshapes whose target the trace computed from Shape get a constant one, where at most one size is unknown."""
    for node in graph:
        if node.op_type != "Reshape" or ir.convenience.get_const_tensor(node.inputs[1]) is not None:
            continue
        producer = node.inputs[1].producer()
        whole_shape = producer is not None and producer.op_type == "Shape" and "end" not in producer.attributes
        target = producer.inputs[0].shape if whole_shape else node.outputs[0].shape
        if target is None or sum(not isinstance(size, int) for size in target) > 1:
            continue
        sizes = [size if isinstance(size, int) else -1 for size in target]
        node.outputs[0].shape, node.outputs[0].type = target, node.inputs[0].type
        node.replace_input_with(1, _constant(graph, "shape_" + "_".join(map(str, sizes)), np.array(sizes, np.int64)))


def _constant(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    if name not in graph.initializers:
        tensor = ir.tensor(array, name=name)
        graph.initializers[name] = ir.Value(
            name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor
        )
    return graph.initializers[name]


def _set_opset(model: ir.Model, opset: int) -> None:
    """From the trace's opset to the asked one.  Between 17 and 19 only the form of the axes of a few reductions
    differs among the operators that the detectors use."""
    if opset < TRACE_OPSET:
        for node in model.graph:
            if node.op_type in ("ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd"):
                node.attributes.pop("noop_with_empty_axes", None)
                if len(node.inputs) > 1:
                    axes = ir.convenience.get_const_tensor(node.inputs[1])
                    node.resize_inputs(1)
                    node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
            elif node.op_type == "Split" and "num_outputs" in node.attributes:
                node.attributes.pop("num_outputs")  # equal parts are the default of opset 13
    model.opset_imports[""] = opset
    for node in model.graph:
        node.version = None


def attention_nodes(model: ir.Model) -> int:
    """How many nodes of our domain the graph has."""
    return sum(node.domain == schema.DOMAIN for node in model.graph)
