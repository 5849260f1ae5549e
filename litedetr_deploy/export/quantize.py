"""INT8: explicit QuantizeLinear and DequantizeLinear around the layers that tolerate it.

Weights have one step a channel, activations one a tensor, found on calibration images.  Steps are whole float16
numbers, so that a graph whose floats are half quantizes exactly as it was calibrated.

For GPUs everything is symmetric, and `precision` gives all else half types.  For CPUs all else is FP32, and the graph
is what their runtimes have kernels for: a convolution from INT8 to INT8 (hence what is added to its output is read from
INT8 as well), matrix products as Gemm, biases in INT32, and unsigned activations, for on x86 ONNX Runtime has no fast
kernel for signed ones.  Their zero point is 0 behind a ReLU, and 128 elsewhere, where steps are symmetric nevertheless.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common

from ..artifact import json_object
from ..errors import LiteDetrError
from ..files import replaced_when_done
from ..model.deployed import Deployed
from ..model.detector import Detector
from ..model.resnet import folded
from ..runtime.images import load_image, prepare
from ..runtime.session import create_session
from ..verify.typed import Grid, fake_quantized_weight, steps_of
from . import precision
from .graph import constant

# Beside the precision islands (norms, softmax, query selection, heads, post-processing), which are FP32.
EXCLUDED = (
    "*.sampling_offsets",  # of the deformable attention: pixels
    "*.attention_weights",  # logits of a softmax
    "detector.decoder",  # few queries, each of them a detection; holds the MLP of the reference points
)
# For a CPU also the stem: its input needs the steps of 8-bit pixels, and few channels gain little.  But not the values
# of the decoder's cross-attentions, which are of all tokens, and its feed-forward networks, half of its other products.
EXCLUDED_ON_CPU = ("detector.backbone.conv1",)
INCLUDED_ON_CPU = tuple(f"detector.decoder.layers.*.{name}" for name in ("cross_attn.value_proj", "linear1", "linear2"))
SENSITIVITY_IMAGES = 4
# What a calibration table is of, by key.
_ITEMS = {"model": "model", "method": "method", "images": "number of images", "digest": "set of images"}


@dataclasses.dataclass
class Calibration:
    """What a graph is calibrated on: images as paths, PIL images or arrays, and the export's options of its inputs."""

    images: list
    image_size: tuple[int, int] | None
    pixel_mask: bool
    outputs: str

    def digest(self) -> str:
        return _digest(
            Path(image).read_bytes() if isinstance(image, (str, os.PathLike)) else np.asarray(image).tobytes()
            for image in self.images
        )

    def feeds(self) -> Iterator[dict[str, np.ndarray]]:
        """Give the graph's inputs, one image at a time."""
        for image in self.images:
            mode = "shortest_edge" if self.image_size is None else "letterbox" if self.pixel_mask else "stretch"
            pixels, mask, size = prepare(load_image(image), mode, self.image_size)
            feed = {"images": pixels[None]}
            if self.outputs == "detections":
                feed["orig_target_sizes"] = np.array([size], np.int64)
            if self.pixel_mask:
                feed["pixel_mask"] = mask[None]
            yield feed


def layers(graph: ir.Graph, keep: Sequence[str] = (), target: str = "gpu") -> list[str]:
    """Return the names of the nodes to quantize: convolutions and matrix products with a weight of their own, outside
    precision.ISLANDS, EXCLUDED (with the exceptions for a CPU) and the patterns `keep`."""
    left_out = precision.matching(graph, (*precision.ISLANDS, *EXCLUDED))
    if target == "cpu":
        left_out |= precision.matching(graph, EXCLUDED_ON_CPU)
        left_out -= precision.matching(graph, INCLUDED_ON_CPU)
    left_out |= precision.matching(graph, keep)
    return [
        node.name for node in graph
        if node.op_type in ("Conv", "MatMul") and node not in left_out and not node.inputs[0].is_initializer()
        and node.inputs[1].is_initializer() and len(node.inputs[1].uses()) == 1
    ]  # fmt: skip


def load_or_calibrate(
    model: ir.Model, names: Sequence[str], calibration: Calibration | None, method: str, table: Path,
    progress: Callable, target: str = "gpu",
) -> dict[str, float]:  # fmt: skip
    """Return the largest magnitude of every tensor that quantizing the nodes `names` takes, by its name.
    They are kept in the file `table` (JSON), and taken from it where it is of the same model, images and method.
    Without `calibration` the model is enough, and a table of another one is a LiteDetrError."""
    wanted: dict[str, Any] = {"model": _digest([ir.to_proto(model).SerializeToString(deterministic=True)])}
    if calibration is not None:
        wanted |= {"method": method, "images": len(calibration.images), "digest": calibration.digest()}
    found: dict[str, Any] = {}
    with contextlib.suppress(OSError):
        found = json_object(table.read_text(errors="replace")) or {}
    if not isinstance(found.get("ranges"), dict):
        found = {}
    tensors = observed(model.graph, names, target)
    differing = [_ITEMS[key] for key, value in wanted.items() if found.get(key) != value]
    if not tensors <= found.get("ranges", {}).keys():
        differing.append("set of layers")
    if not differing:
        progress(f"calibrate: {table.name} has it")
        return found["ranges"]
    if calibration is None:
        raise needs_images(table, f"is of another {differing[0]}, or damaged")
    reason = f" again, {table.name} is of another {differing[0]}" if found else ""
    progress(f"calibrate{reason}: {len(calibration.images)} images, {method}")
    found = wanted | {"ranges": _calibrate(model, tensors, calibration.feeds(), method)}
    with replaced_when_done(table) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    return found["ranges"]


def needs_images(table: Path, state: str) -> LiteDetrError:
    """Return the error of an export without calibration images, whose table is in that state."""
    return LiteDetrError(
        f"precision 'int8' needs calibration images: there are none, and the calibration table {table} {state}. Give a "
        "folder of images like those that the model will see (--calibration)."
    )


def grid_of(value: ir.Value, ranges: dict[str, float], target: str) -> Grid:
    """Return the whole steps that `value` is quantized to."""
    return Grid.of(ranges[value.name], unsigned=target == "cpu" and _is_positive(value))


def zero_point(grid: Grid, target: str) -> np.ndarray:
    """Return the integer that stands for 0."""
    return np.array(0, np.int8) if target == "gpu" else np.array(128 if grid.low else 0, np.uint8)


def _is_positive(value: ir.Value) -> bool:
    node = value.producer()
    return node is not None and (
        node.op_type == "Relu" or (node.op_type in ("MaxPool", "Reshape", "Transpose") and _is_positive(node.inputs[0]))
    )


def observed(graph: ir.Graph, names: Sequence[str], target: str) -> set[str]:
    """Return the tensors whose ranges quantizing the nodes `names` takes."""
    nodes = [node for node in graph if node.name in set(names)]
    outputs = {node.outputs[0].name for node in nodes if target == "cpu" and _gives_quantized(node)}
    return {node.inputs[0].name for node in nodes} | outputs


def _gives_quantized(node: ir.Node) -> bool:
    """Whether the output is to be quantized at once: of a convolution, where no ReLU is in between."""
    return node.op_type == "Conv" and [user.op_type for user, _ in node.outputs[0].uses()] != ["Relu"]


def apply(model: ir.Model, names: Sequence[str], ranges: dict[str, float], target: str = "gpu") -> ir.Model:
    """Return the FP32 `model` with QuantizeLinear and DequantizeLinear around the inputs and weights of the nodes
    `names`, and for a CPU around what their convolutions give; `ranges` is the largest magnitude, by tensor."""
    precision.refuse_typed(model.graph)
    quantized, chosen = ir.from_proto(ir.to_proto(model)), set(names)
    graph, dequantized, ranges = quantized.graph, {}, dict(ranges)
    nodes = [node for node in graph if node.name in chosen]
    if target == "cpu":
        _pool_before_relu(graph)
        nodes, rows = _with_gemms(quantized, nodes)
        ranges |= {value.name: ranges[name] for name, value in rows.items() if name in ranges}

    def add(place: ir.Node, op_type: str, source: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes):
        output = ir.val(f"{source}_{op_type}_Output", dtype, inputs[0].shape)
        name = f"{source}_{op_type}"
        graph.insert_before(place, ir.node(op_type, inputs, attributes, outputs=[output], name=name))
        return output

    def stored(source: str, array: np.ndarray, steps: np.ndarray, place: ir.Node, **attributes) -> ir.Value:
        step = constant(graph, f"{source}_scale", steps)
        whole = constant(graph, f"{source}_quantized", array)
        zero = (
            [] if array.dtype == np.int32 else [constant(graph, f"{source}_zero_point", np.zeros_like(steps, np.int8))]
        )
        return add(place, "DequantizeLinear", source, [whole, step, *zero], ir.DataType.FLOAT, **attributes)

    def rounded(value: ir.Value, place: ir.Node) -> ir.Value:
        if value not in dequantized:
            grid = grid_of(value, ranges, target)
            step = constant(graph, f"{value.name}_scale", np.array(grid.step, np.float32))
            zero = constant(graph, f"{value.name}_zero_point", zero_point(grid, target))
            whole = add(place, "QuantizeLinear", value.name, [value, step, zero], zero.dtype)
            dequantized[value] = add(place, "DequantizeLinear", value.name, [whole, step, zero], ir.DataType.FLOAT)
        return dequantized[value]

    def bias_of(node: ir.Node, bias: ir.Value, data: ir.Value, steps: np.ndarray) -> ir.Value:
        """What is added to whole products: in steps that are the product of the data's and the weight's."""
        steps = steps.ravel() * np.float32(grid_of(data, ranges, target).step)
        whole = np.rint(bias.const_value.numpy() / steps).astype(np.int32)
        result = stored(bias.name, whole, steps, node, axis=0)
        graph.initializers.pop(bias.name)
        return result

    def finish_for_cpu(node: ir.Node, data: ir.Value, steps: np.ndarray) -> None:
        """Quantize the node's bias, and what a convolution gives."""
        given, bias = node.outputs[0], node.inputs[2] if len(node.inputs) > 2 else None
        users = list(given.uses())
        # Where OpenVINO asks such an output for its shape, it gives all channels the bias of the first one, unless
        # the bias is added to what was quantized.  Sums of the backbone read INT8, and are not asked.
        gives_quantized = _gives_quantized(node)
        is_apart = bias is not None and gives_quantized and users[0][0].op_type != "Add"
        if is_apart:
            node.resize_inputs(2)
            ranges[given.name] += float(np.abs(bias.const_value.numpy()).max())
        elif bias is not None:
            node.replace_input_with(2, bias_of(node, bias, data, steps))
        if gives_quantized:
            result = rounded(given, users[0][0])
            if is_apart:
                columns = constant(graph, f"{bias.name}_column", bias.const_value.numpy().reshape(-1, 1, 1))
                result = add(users[0][0], "Add", given.name, [result, columns], ir.DataType.FLOAT)
                graph.initializers.pop(bias.name)
            for user, i in users:
                user.replace_input_with(i, result)

    for node in nodes:
        data, weight = node.inputs[:2]
        reader = node
        if node.op_type == "Gemm" and (maker := data.producer()).op_type == "Reshape":
            data, reader = maker.inputs[0], maker  # OpenVINO takes twice as long to quantize rows
        axis, array = 0 if node.op_type == "Conv" else 1, weight.const_value.numpy()  # axis of the output channels
        steps = steps_of(array, axis)
        reader.replace_input_with(0, rounded(data, reader))
        whole = np.rint(array / steps).astype(np.int8)
        node.replace_input_with(1, stored(weight.name, whole, steps.ravel(), node, axis=axis))
        graph.initializers.pop(weight.name)
        if target == "cpu":
            finish_for_cpu(node, data, steps)
    if target == "cpu":
        for value, result in dequantized.items():  # what is added to a convolution's output is read from INT8 too
            if (maker := value.producer()) is not None and maker.op_type == "Relu":
                for user, i in list(value.uses()):
                    if user.op_type in ("Add", "Conv"):
                        user.replace_input_with(i, result)
    return quantized


def _pool_before_relu(graph: ir.Graph) -> None:
    """Put a MaxPool that follows a ReLU before it.  ONNX Runtime moves the quantization of what a MaxPool gives to
    before it, where nothing but data movement is in between, and its INT8 MaxPool takes ten times as long as FP32's."""
    for pool in list(graph):
        relu = pool.inputs[0].producer() if pool.op_type == "MaxPool" else None
        if relu is None or relu.op_type != "Relu" or len(relu.outputs[0].uses()) > 1:
            continue
        before, after = pool.outputs[0], relu.outputs[0]
        pool.replace_input_with(0, relu.inputs[0])
        before.replace_all_uses_with(after)
        relu.replace_input_with(0, before)
        before.name, after.name = after.name, before.name  # by which ranges are known
        after.shape = before.shape
        graph.remove(relu)
        graph.insert_after(pool, relu)


def _with_gemms(model: ir.Model, nodes: Sequence[ir.Node]) -> tuple[list[ir.Node], dict[str, ir.Value]]:
    """Make every MatMul of `nodes` a Gemm with the bias that is added to it, between Reshapes to rows and back; a ReLU
    that follows comes before the second.  Return the nodes, and the rows that they give by the name of what they were.

    Of a Gemm in INT8 ONNX Runtime makes one kernel from its INT8 input to its output, which is INT8 as well where that
    is what is read; of MatMul, Add and Relu it makes three, with FP32 in between.
    """
    graph, rows, whole, taken = model.graph, {}, {}, {node.name for node in model.graph}

    def add(place: ir.Node, op_type: str, inputs: list[ir.Value], name: str, shape, dtype=ir.DataType.FLOAT, **kwargs):
        output, node_name = ir.val(name, dtype, shape), f"{place.name.rpartition('/')[0]}/{op_type}"
        while node_name in taken:
            node_name += "_rows"
        taken.add(node_name)
        graph.insert_before(place, ir.node(op_type, inputs, kwargs, outputs=[output], name=node_name))
        return output

    def follower(value: ir.Value, op_type: str) -> ir.Node | None:
        users = [user for user, _ in value.uses()]
        return users[0] if len(users) == 1 and users[0].op_type == op_type else None

    def whole_shape(data: ir.Value, columns: int, place: ir.Node) -> ir.Value:
        """That of `data`, but for the last size."""
        sizes = [size if isinstance(size, int) else -1 for size in data.shape[:-1]]
        if sizes.count(-1) < 2:
            sizes.append(columns)
            return constant(graph, "shape_" + "_".join(map(str, sizes)), np.array(sizes, np.int64))
        last = constant(graph, f"shape_{columns}", np.array([columns], np.int64))
        name, rank = place.outputs[0].name, len(sizes)
        first = add(place, "Shape", [data], f"{name}_sizes", [rank], ir.DataType.INT64, end=rank)
        return add(place, "Concat", [first, last], f"{name}_shape", [rank + 1], ir.DataType.INT64, axis=0)

    def gemm(node: ir.Node) -> ir.Node:
        data, weight = node.inputs
        before, after = weight.shape
        of_that_shape = whole.get(data.name, data)
        if (source := rows.get(data.name)) is None:
            shape = constant(graph, f"shape_-1_{before}", np.array([-1, before], np.int64))
            source = add(node, "Reshape", [data, shape], f"{node.outputs[0].name}_of_rows", [None, before])
        inputs, end = [source, weight], node.outputs[0]
        sum_ = follower(end, "Add")
        if sum_ is not None and sum_.inputs[1].is_initializer() and len(sum_.inputs[1].uses()) == 1:
            inputs, end = [*inputs, sum_.inputs[1]], sum_.outputs[0]
        found = add(node, "Gemm", inputs, f"{end.name}_rows", [None, after])
        result = found.producer()
        if (relu := follower(end, "Relu")) is not None:
            end = relu.outputs[0]
            found = add(relu, "Relu", [found], f"{end.name}_rows", [None, after])
        name, place = end.name, end.producer()
        end.name = f"{name}_before"  # and without users
        rows[name], whole[name] = found, of_that_shape
        shape = whole_shape(of_that_shape, after, place)
        back = add(place, "Reshape", [found, shape], name, end.shape)
        end.replace_all_uses_with(back, replace_graph_outputs=True)
        return result

    nodes = [gemm(node) if node.op_type == "MatMul" else node for node in nodes]
    common.RemoveUnusedNodesPass()(model)
    return nodes, rows


def sensitivity(
    model: Detector, graph: ir.Graph, names: Sequence[str], ranges: dict[str, float], calibration: Calibration,
    target: str = "gpu",
) -> list[dict]:  # fmt: skip
    """Return what quantizing each layer alone does to the outputs of PyTorch, on SENSITIVITY_IMAGES, the worst first.

    Rows with layer (a node of `names`), logits (root mean square of the difference over that of the logits) and boxes
    (mean difference, of the image's side).  The queries are those of the FP32 model throughout.
    """
    calibration = dataclasses.replace(calibration, images=calibration.images[:SENSITIVITY_IMAGES])
    model = folded(model)
    modules = dict(model.named_modules())
    normalise = Deployed(model, "raw").normalise
    feeds = [{name: torch.from_numpy(array) for name, array in feed.items()} for feed in calibration.feeds()]

    def run(expected):
        for feed, reference in zip(feeds, expected):
            mask = feed.get("pixel_mask")
            yield model(normalise(feed["images"], mask), mask, reference.get("topk_indices"))

    rows, inputs = [], {node.name: node.inputs[0] for node in graph}
    with torch.inference_mode():
        expected = list(run([{}] * len(feeds)))
        for name in names:
            module = modules[name.rpartition("/")[0].removeprefix("detector.")]
            weight, grid = module.weight.data, grid_of(inputs[name], ranges, target)
            module.weight.data = fake_quantized_weight(weight)
            hook = module.register_forward_pre_hook(lambda _, x, grid=grid: (grid.rounded(x[0]),))
            logits = boxes = scale = 0.0
            for found, wanted in zip(run(expected), expected):
                logits += (found["pred_logits"] - wanted["pred_logits"]).square().mean().item()
                scale += wanted["pred_logits"].square().mean().item()
                boxes += (found["pred_boxes"] - wanted["pred_boxes"]).abs().mean().item()
            hook.remove()
            module.weight.data = weight
            rows.append({"layer": name, "logits": (logits / scale) ** 0.5, "boxes": boxes / len(feeds)})
    return sorted(rows, key=lambda row: -row["logits"])


def within_budget(ranking: Sequence[dict], ap_of: Callable, wanted: float, progress: Callable) -> list[str]:
    """Return the layers to quantize for an AP of at least `wanted`: all but the worst of `ranking`, of which none, one,
    two, four and so on are left out until `ap_of` the rest (0..1) suffices; LiteDetrError where it never does."""
    order, left_out = [row["layer"] for row in ranking], 0
    while left_out < len(order):
        progress(f"AP with {left_out} of {len(order)} layers left out")
        found = ap_of(order[left_out:])
        if found >= wanted:
            return order[left_out:]
        left_out = 2 * left_out or 1
    raise LiteDetrError(
        f"the AP budget cannot be met: AP is {found:.4f} with {len(order) - left_out // 2} of {len(order)} layers in "
        f"INT8, and {wanted:.4f} is wanted. Give a larger budget, more calibration images, or another method."
    )


def _calibrate(model: ir.Model, tensors: set[str], feeds: Iterable[dict], method: str) -> dict[str, float]:
    from onnxruntime.quantization import calibrate

    kinds: dict[str, Callable] = {
        "minmax": calibrate.MinMaxCalibrater,
        "entropy": functools.partial(calibrate.EntropyCalibrater, num_bins=1024),
        "percentile": calibrate.PercentileCalibrater,
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # the calibrators print
        path, augmented = Path(folder) / "model.onnx", f"{folder}/augmented.onnx"
        ir.save(model, path)
        calibrator = kinds[method](path, None, augmented, symmetric=True)
        infos = calibrator.select_tensors_to_calibrate
        calibrator.select_tensors_to_calibrate = lambda proto: (tensors, infos(proto)[1])
        calibrator.augment_graph()
        calibrator.infer_session = create_session(augmented)  # with the attention ops registered
        for feed in feeds:  # one at a time: the calibrator keeps every tensor of what it is given at once
            calibrator.collect_data(SimpleNamespace(get_next=iter([feed, None]).__next__))
        data = calibrator.compute_data()
    ranges = {name: float(max(abs(np.max(v)) for v in data[name].range_value)) for name in sorted(tensors)}
    for name, largest in ranges.items():
        if not np.isfinite(largest):
            raise LiteDetrError(
                f"calibration: the value {name!r} is infinite or not a number on the calibration images. Verify the "
                "model in FP32 first, and check the images."
            )
    return ranges


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
