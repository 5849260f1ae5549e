"""ONNX artifacts of a few standard ops with a detector's inputs, outputs and metadata, for tests of what runs them."""

import json

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from litedetr_deploy import artifact

# Fractions of the image's width and height.
BOXES = np.array([[0.25, 0.25, 0.75, 0.5], [0.0, 0.0, 1.0, 1.0], [0.5, 0.5, 0.6, 0.6]], np.float32)
LABELS = np.array([18, 1, 95], np.int64)  # 'dog', 'person', and one that COCO does not have
NAMES = ["N/A", "person", *(f"thing {label}" for label in range(2, 18)), "dog"]
SCORE = 0.9

METADATA = {
    "tool_version": "0",
    "op_version": 1,
    "variant": "lite-dino-r50-h3l1-2+1x3",
    "attention": "gather",
    "precision": "fp32",
    "outputs": "detections",
    "class_names": NAMES,
    "verification": {"verdict": artifact.VERIFIED},
}


def save_detector(path, size=(64, 96), pixel_mask=False, **metadata):
    """Write a detector of three constant detections to `path`.

    The scores are 0.9, the mean of `images`, and (with `pixel_mask`) the share of padding, else 0.
    """
    height, width = size or ("height", "width")
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "one"], ["second"]),
        helper.make_node("Mul", ["second", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "score"], ["first"]),
        helper.make_node("Concat", ["first", "second", "third"], ["scores"], axis=1),
        helper.make_node("Mul", ["scores", "zero"], ["nothings"]),
        helper.make_node("Cast", ["nothings"], ["label_zeros"], to=TensorProto.INT64),
        helper.make_node("Add", ["label_zeros", "label_values"], ["labels"]),
        helper.make_node("Cast", ["orig_target_sizes"], ["sizes"], to=TensorProto.FLOAT),
        helper.make_node("Concat", ["sizes", "sizes"], ["corners"], axis=1),
        helper.make_node("Unsqueeze", ["corners", "one"], ["scale"]),
        helper.make_node("Mul", ["scale", "fractions"], ["boxes"]),
    ]
    inputs = [
        helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, height, width]),
        helper.make_tensor_value_info("orig_target_sizes", TensorProto.INT64, ["batch", 2]),
    ]
    if pixel_mask:
        inputs.append(helper.make_tensor_value_info("pixel_mask", TensorProto.BOOL, ["batch", height, width]))
        nodes = [
            helper.make_node("Cast", ["pixel_mask"], ["padding"], to=TensorProto.FLOAT),
            helper.make_node("ReduceMean", ["padding"], ["share"], axes=[1, 2], keepdims=0),
            helper.make_node("Unsqueeze", ["share", "one"], ["third"]),
            *nodes,
        ]
    else:
        nodes.insert(3, helper.make_node("Identity", ["nothing"], ["third"]))
    outputs = [
        helper.make_tensor_value_info("labels", TensorProto.INT64, ["batch", 3]),
        helper.make_tensor_value_info("boxes", TensorProto.FLOAT, ["batch", 3, 4]),
        helper.make_tensor_value_info("scores", TensorProto.FLOAT, ["batch", 3]),
    ]
    constants = {
        "one": np.array([1]),
        "zero": np.float32(0),
        "score": np.float32(SCORE),
        "fractions": BOXES[None],
        "label_values": LABELS[None],
    }
    return _save(path, nodes, inputs, outputs, constants, METADATA | metadata)


def save_raw_detector(path, logits, boxes, size=(64, 96), **metadata):
    """Write a detector to `path` that gives the constant `logits` [Q, C] and `boxes` [Q, 4] for every image."""
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[1, 2, 3], keepdims=0),
        helper.make_node("Unsqueeze", ["mean", "axes"], ["column"]),
        helper.make_node("Mul", ["column", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "logits"], ["pred_logits"]),
        helper.make_node("Add", ["nothing", "boxes"], ["pred_boxes"]),
    ]
    inputs = [helper.make_tensor_value_info("images", TensorProto.FLOAT, ["batch", 3, *size])]
    outputs = [
        helper.make_tensor_value_info("pred_logits", TensorProto.FLOAT, ["batch", *logits.shape]),
        helper.make_tensor_value_info("pred_boxes", TensorProto.FLOAT, ["batch", *boxes.shape]),
    ]
    constants = {"axes": np.array([1, 2]), "zero": np.float32(0), "logits": logits[None], "boxes": boxes[None]}
    return _save(path, nodes, inputs, outputs, constants, METADATA | {"outputs": "raw"} | metadata)


def save_with_attention_op(path, op_type="KeyAwareDeformAttn", **metadata):
    """Write a model of one node in this package's op domain to `path`; nothing can run it."""
    node = helper.make_node(op_type, ["x"], ["y"], domain="litedetr")
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 3])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)]
    return _save(path, [node], inputs, outputs, {}, METADATA | {"attention": "op"} | metadata)


def _save(path, nodes, inputs, outputs, constants, metadata):
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("litedetr", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    seal(model, path, metadata)
    return path


def seal(model, path, metadata):
    """Write a model with its metadata, as `litedetr export` does when the verification has passed."""
    helper.set_model_props(model, {"litedetr": json.dumps(metadata | {"digest": artifact.NO_DIGEST})})
    onnx.save(model, path)
    artifact.seal(path)
