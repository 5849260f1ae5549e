"""The traced graph made into the graph that is shipped: folded, named and typed for the asked opset."""

from __future__ import annotations

import ast
import collections
import itertools
import re

import numpy as np
import onnx_ir as ir
from onnx.reference import ReferenceEvaluator
from onnx_ir.passes import common
from onnxscript import optimizer, rewriter

from ..ops import schema

# Everything that follows from the weights and a fixed image size is folded: at 800x1333 the position encoding is
# the largest such constant (22 MB).
FOLD_LIMIT = 1 << 30
TRACE_OPSET = 18  # what the exporter writes by itself
_SCOPES = "pkg.torch.onnx.name_scopes"  # metadata that the exporter leaves on every node
# As the exporter names the two ops' nodes.
_OPERATIONS = {schema.KEY_AWARE: "key_aware_deform_attn", schema.PLAIN: "ms_deform_attn"}


def finish(model: ir.Model, opset: int, outputs: tuple[str, ...]) -> None:
    """Optimise the exporter's model and bring it to `opset`, in place.  Of the trace's outputs, those that are not in
    `outputs` remain as named values inside."""
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
    _set_opset(model, opset)
    common.RemoveUnusedOpsetsPass()(model)
    _name_nodes(model.graph)
    common.ClearMetadataAndDocStringPass()(model)
    _name_sizes(model.graph)


def _name_sizes(graph: ir.Graph) -> None:
    """Rename the trace's symbols of dynamic sizes wherever they occur, and drop what else it noted on values."""
    sizes = zip(graph.inputs[0].shape, ("batch", "channels", "height", "width"))
    names = {str(size.value): name for size, name in sizes if isinstance(size, ir.SymbolicDim)}
    pattern = "|".join(rf"\b{re.escape(symbol)}\b" for symbol in names)

    def renamed(size):
        if isinstance(size, ir.SymbolicDim) and size.value is not None:
            return re.sub(pattern, lambda match: names[match[0]], str(size.value))
        return size

    for value in [*graph.inputs, *(output for node in graph for output in node.outputs)]:
        value.metadata_props.clear()
        if value.shape is not None:
            value.shape = ir.Shape(map(renamed, value.shape))


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
        if node.op_type not in ("Slice", "Transpose") or node.inputs[0].name not in graph.initializers:
            continue
        tensors = {value.name: ir.convenience.get_const_tensor(value) for value in node.inputs}
        if any(tensor is None for tensor in tensors.values()):
            continue
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        (folded,) = ReferenceEvaluator(ir.to_proto(node)).run(None, arrays)
        weight = node.inputs[0].name
        if len(node.inputs[0].uses()) == 1:
            graph.initializers.pop(weight)
        names = (f"{weight}.{i}" if i else weight for i in itertools.count())
        name = next(name for name in names if name not in graph.initializers)
        node.outputs[0].replace_all_uses_with(constant(graph, name, np.ascontiguousarray(folded)))
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
                    weight.name = name


def _name_nodes(graph: ir.Graph) -> None:
    """Name nodes after the module that they come from: 'detector.encoder.layers.0.linear1/MatMul'.  What belongs to
    no module of the detector is in 'deployed'; an attention op in standard ops has a level of its own."""
    numbers = collections.Counter()
    for node in graph:
        # Modules from the outermost to the innermost, by their names, then the operation.
        scopes: list[str] = ast.literal_eval(node.metadata_props.get(_SCOPES, "[]"))
        *_, module, operation = ["", "", *scopes]
        name = f"{module if module.startswith('detector') else 'deployed'}/"
        for op_type, function in _OPERATIONS.items():
            if operation.startswith(function) and node.op_type != op_type:
                name += f"{op_type}/"
        name += node.op_type
        node.name = f"{name}_{numbers[name]}" if numbers[name] else name
        numbers[name] += 1


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
        node.replace_input_with(1, constant(graph, "shape_" + "_".join(map(str, sizes)), np.array(sizes, np.int64)))


def constant(graph: ir.Graph, name: str, array: np.ndarray, dtype: ir.DataType | None = None) -> ir.Value:
    """Return the graph's initializer of that name; where there is none, it is made of `array`."""
    if name not in graph.initializers:
        graph.initializers.add(ir.val(name, const_value=ir.tensor(array, dtype, name)))
    return graph.initializers[name]


def _set_opset(model: ir.Model, opset: int) -> None:
    """From the trace's opset to the asked one.  Between 17 and 19 only the form of the axes of a few reductions
    differs among the operators that the detectors use."""
    model.opset_imports[""] = opset
    for node in model.graph:
        node.version = None
        if opset >= TRACE_OPSET:
            continue
        if node.op_type in ("ReduceMax", "ReduceMin", "ReduceMean", "ReduceProd"):
            node.attributes.pop("noop_with_empty_axes", None)
            if len(node.inputs) > 1:
                axes = ir.convenience.get_const_tensor(node.inputs[1])
                node.resize_inputs(1)
                node.attributes["axes"] = ir.AttrInt64s("axes", axes.numpy().tolist())
        elif node.op_type == "Split":
            node.attributes.pop("num_outputs", None)  # equal parts are the default of opset 13
