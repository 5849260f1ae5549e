"""What a graph's values are for one set of inputs: the shape of each, and the content of those that do not depend on
the inputs' content."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from ..runtime.session import create_session
from .types import unoptimised

_SEQUENCES = {"SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SplitToSequence"}
_RANDOM = {"Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
           "RandomUniformLike"}  # fmt: skip
_SHAPES = {"Shape", "Size"}  # depend on no content
_ADDED = "/shape of litedetr"


class Facts:
    """shapes: by the name of a value; known: contents, by name, of values that sizes and constants alone determine."""

    def __init__(self, graph: ir.Graph, proto: onnx.ModelProto, feed: Mapping[str, np.ndarray]):
        """Run `proto`, whose graph is `graph`, on `feed`."""
        known = {value.name for value in graph.initializers.values()}
        edge = []  # computed contents that a node of unknown result reads
        for node in graph:
            names = [value.name for value in node.inputs if value is not None]
            closed = not any(
                attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
                for attribute in node.attributes.values()
            )
            if node.op_type in _SHAPES or (closed and node.op_type not in _RANDOM and known.issuperset(names)):
                known.update(value.name for value in node.outputs)
            else:
                edge += [name for name in names if name in known and name not in graph.initializers]
        edge += [value.name for value in graph.outputs if value.name in known]
        self.shapes, contents = _run(proto, list(dict.fromkeys(edge)), feed)
        for value in graph.initializers.values():
            self.shapes[value.name] = tuple(value.const_value.shape)
        self._constants = {value.name: value.const_value for value in graph.initializers.values()}
        self._contents = contents

    def known(self, value: ir.Value | None) -> np.ndarray | None:
        """Return the content of a value that the inputs' content does not change; None for another."""
        if value is None:
            return None
        if value.name in self._constants:
            return self._constants[value.name].numpy()
        return self._contents.get(value.name)

    def shape(self, value: ir.Value) -> tuple[int, ...] | None:
        return self.shapes.get(value.name)


def _run(proto: onnx.ModelProto, names: list[str], feed: Mapping[str, np.ndarray]):
    """Return the shapes of all values and the contents of `names`."""
    probed = onnx.ModelProto()
    probed.CopyFrom(proto)
    graph, shaped = probed.graph, []
    del probed.metadata_props[:], graph.output[:]
    for node in list(graph.node):
        for name in node.output if node.op_type not in _SEQUENCES else ():
            if name:
                graph.node.append(onnx.helper.make_node("Shape", [name], [f"{name}{_ADDED}"]))
                shaped.append(name)
    for name in [*(f"{name}{_ADDED}" for name in shaped), *names]:
        graph.output.append(onnx.ValueInfoProto(name=name))
    import onnxruntime

    # What is asked for is nearly every value: to optimise costs more than it saves.
    options = unoptimised()
    # Shapes first: otherwise every value waits in memory for its own.
    options.execution_order = onnxruntime.ExecutionOrder.PRIORITY_BASED
    arrays = create_session(probed.SerializeToString(), options=options).run(None, dict(feed))
    shapes = {name: tuple(map(int, shape)) for name, shape in zip(shaped, arrays)}
    shapes |= {name: array.shape for name, array in feed.items()}
    return shapes, dict(zip(names, arrays[len(shaped) :]))
