"""INT8: explicit symmetric QuantizeLinear and DequantizeLinear around the layers that tolerate it; `precision` then
gives everything else its type.

Weights have one step a channel, activations one a tensor, found on calibration images.  Steps are whole float16
numbers, so that a graph whose floats are half quantizes exactly as it was calibrated.
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

from ..artifact import json_object
from ..errors import LiteDetrError
from ..files import replaced_when_done
from ..model.deployed import Deployed
from ..model.detector import Detector
from ..model.resnet import folded
from ..runtime.images import load_image, prepare
from ..runtime.session import create_session
from ..verify.typed import fake_quantized, fake_quantized_weight, step_of, steps_of
from . import precision
from .graph import constant

# Beside the precision islands (norms, softmax, query selection, heads, post-processing), which are FP32.
EXCLUDED = (
    "*.sampling_offsets",  # of the deformable attention: pixels
    "*.attention_weights",  # logits of a softmax
    "detector.decoder",  # few queries, each of them a detection; holds the MLP of the reference points
)
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


def layers(graph: ir.Graph, keep: Sequence[str] = ()) -> list[str]:
    """Return the names of the nodes to quantize: convolutions and matrix products with a weight of their own, outside
    precision.ISLANDS, EXCLUDED and the patterns `keep`."""
    left_out = precision.matching(graph, (*precision.ISLANDS, *EXCLUDED, *keep))
    return [
        node.name for node in graph
        if node.op_type in ("Conv", "MatMul") and node not in left_out and not node.inputs[0].is_initializer()
        and node.inputs[1].is_initializer() and len(node.inputs[1].uses()) == 1
    ]  # fmt: skip


def load_or_calibrate(
    model: ir.Model, names: Sequence[str], calibration: Calibration | None, method: str, table: Path, progress: Callable
) -> dict[str, float]:
    """Return the largest magnitude of the input of every node of `names`, by tensor.
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
    chosen = set(names)
    tensors = {node.inputs[0].name for node in model.graph if node.name in chosen}
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


def apply(model: ir.Model, names: Sequence[str], ranges: dict[str, float]) -> ir.Model:
    """Return the FP32 `model` with QuantizeLinear and DequantizeLinear around the inputs and weights of the nodes
    `names`; `ranges` is the largest magnitude of their inputs, by tensor."""
    precision.refuse_typed(model.graph)
    quantized, chosen = ir.from_proto(ir.to_proto(model)), set(names)
    graph, dequantized = quantized.graph, {}

    def add(op_type: str, source: str, inputs: list[ir.Value], dtype: ir.DataType, **attributes) -> ir.Value:
        output = ir.val(f"{source}_{op_type}_Output", dtype, inputs[0].shape)
        name = f"{source}_{op_type}"
        graph.insert_before(node, ir.node(op_type, inputs, attributes, outputs=[output], name=name))
        return output

    for node in list(graph):
        if node.name not in chosen:
            continue
        data, weight = node.inputs[:2]
        if data not in dequantized:
            step = constant(graph, f"{data.name}_scale", step_of(ranges[data.name]))
            zero = constant(graph, f"{data.name}_zero_point", np.array(0, np.int8))
            stored = add("QuantizeLinear", data.name, [data, step, zero], ir.DataType.INT8)
            dequantized[data] = add("DequantizeLinear", data.name, [stored, step, zero], ir.DataType.FLOAT)
        node.replace_input_with(0, dequantized[data])
        axis, array = 0 if node.op_type == "Conv" else 1, weight.const_value.numpy()  # axis of the output channels
        steps = steps_of(array, axis)
        step = constant(graph, f"{weight.name}_scale", steps.ravel())
        zero = constant(graph, f"{weight.name}_zero_point", np.zeros(steps.size, np.int8))
        stored = constant(graph, f"{weight.name}_quantized", np.rint(array / steps).astype(np.int8))
        given = add("DequantizeLinear", weight.name, [stored, step, zero], ir.DataType.FLOAT, axis=axis)
        node.replace_input_with(1, given)
        graph.initializers.pop(weight.name)
    return quantized


def sensitivity(
    model: Detector, graph: ir.Graph, names: Sequence[str], ranges: dict[str, float], calibration: Calibration
) -> list[dict]:
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

    rows, inputs = [], {node.name: node.inputs[0].name for node in graph}
    with torch.inference_mode():
        expected = list(run([{}] * len(feeds)))
        for name in names:
            module = modules[name.rpartition("/")[0].removeprefix("detector.")]
            weight, step = module.weight.data, float(step_of(ranges[inputs[name]]))
            module.weight.data = fake_quantized_weight(weight)
            hook = module.register_forward_pre_hook(lambda _, x, step=step: (fake_quantized(x[0], step),))
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
