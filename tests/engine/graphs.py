"""ONNX graphs of a few nodes with a detector's input and the metadata of `litedetr export`."""

from onnx import TensorProto, helper

from ..runtime.tiny_artifact import METADATA, seal


def save(path, nodes, opset=17, **metadata):
    """Write a graph from `images` [batch, 3, 64, 96] to `output`, both FP32."""
    shape = ["batch", 3, 64, 96]
    graph = helper.make_graph(
        nodes, "graph",
        [helper.make_tensor_value_info("images", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, None)],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=9)
    seal(model, path, METADATA | metadata)
    return path


def save_half(path, **metadata):
    """Write a graph that adds in half."""
    return save(
        path,
        [
            helper.make_node("Cast", ["images"], ["half"], to=TensorProto.FLOAT16),
            helper.make_node("Add", ["half", "half"], ["sum"]),
            helper.make_node("Cast", ["sum"], ["output"], to=TensorProto.FLOAT),
        ],
        **metadata,
    )


def save_grid_sample(path, opset=17):
    """Write a graph that samples the image at places that it takes from the image."""
    mode = "linear" if opset >= 20 else "bilinear"
    return save(
        path,
        [
            helper.make_node("Constant", [], ["two"], value_ints=[2]),
            helper.make_node("Constant", [], ["zero"], value_ints=[0]),
            helper.make_node("Constant", [], ["one"], value_ints=[1]),
            helper.make_node("Slice", ["images", "zero", "two", "one"], ["channels"]),
            helper.make_node("Transpose", ["channels"], ["grid"], perm=[0, 2, 3, 1]),
            helper.make_node("GridSample", ["images", "grid"], ["output"], mode=mode),
        ],
        opset,
        attention="gridsample",
    )
