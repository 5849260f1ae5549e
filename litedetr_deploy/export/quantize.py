"""INT8: explicit symmetric QuantizeLinear and DequantizeLinear around the layers that tolerate it, placed by ONNX
Runtime's quantizer; `precision` then gives everything else its type.

Weights have one step a channel, activations one a tensor, found on calibration images.  Steps are whole float16
numbers, so that a graph whose floats are half quantizes exactly as it was calibrated.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from ..errors import LiteDetrError
from ..files import replaced_when_done
from ..model.deployed import Deployed
from ..model.detector import Detector
from ..model.resnet import fold_frozen_batch_norm
from ..runtime.images import load_image, prepare
from ..runtime.session import create_session
from ..verify.typed import fake_quantized, fake_quantized_weight, step_of, steps_of
from . import precision

# Beside the precision islands (norms, softmax, query selection, heads, post-processing), which are FP32.
EXCLUDED = (
    "*.sampling_offsets",  # of the deformable attention: pixels
    "*.attention_weights",  # logits of a softmax
    "detector.decoder",  # few queries, each of them a detection; holds the MLP of the reference points
)
SENSITIVITY_IMAGES = 4
_HISTOGRAM_BINS = 1024
# What a calibration table is of, by key.
_ITEMS = {"model": "model", "method": "method", "images": "number of images", "digest": "set of images"}


@dataclasses.dataclass
class Calibration:
    """What the graph is calibrated on: images as paths, PIL images or arrays, and the graph's input."""

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
    """Return the names of the nodes that are quantized: convolutions and matrix products with a weight of their own,
    outside of the islands of precision, of EXCLUDED and of the patterns `keep`."""
    left_out = precision.matching(graph, (*precision.ISLANDS, *EXCLUDED, *keep))
    return [
        node.name
        for node in graph
        if node.op_type in ("Conv", "MatMul")
        and node not in left_out
        and node.inputs[1].is_initializer()
        and len(node.inputs[1].uses()) == 1
        and not node.inputs[0].is_initializer()
    ]


def load_or_calibrate(
    model: ir.Model,
    names: Sequence[str],
    calibration: Calibration | None,
    method: str,
    table: Path,
    progress: Callable[[str], None],
) -> dict[str, float]:
    """Return the largest magnitude of the input of every node of `names`, by tensor.

    table: the file (JSON) where they are kept; what it has is used where it was made of the same model, images
        and method.  calibration: None to use the file whatever its images and method were.
    Raises LiteDetrError where there are neither images nor a table of this model.
    """
    wanted: dict[str, Any] = {"model": _digest([ir.to_proto(model).SerializeToString(deterministic=True)])}
    if calibration is not None:
        wanted |= {"method": method, "images": len(calibration.images), "digest": calibration.digest()}
    found = _read(table)
    chosen = set(names)
    tensors = {node.inputs[0].name for node in model.graph if node.name in chosen}
    differing = [_ITEMS[key] for key, value in wanted.items() if found.get(key) != value]
    if not tensors <= found.get("ranges", {}).keys():
        differing.append("set of layers")
    if not differing:
        progress(f"calibrate: {table.name} has it")
        return found["ranges"]
    if calibration is None:
        raise _needs_images(table, f"is of another {differing[0]}, or damaged")
    reason = f" again, {table.name} is of another {differing[0]}" if found else ""
    progress(f"calibrate{reason}: {len(calibration.images)} images, {method}")
    found = wanted | {"ranges": _calibrate(model, tensors, calibration.feeds(), method)}
    with replaced_when_done(table) as temporary:
        temporary.write_text(json.dumps(found, indent=1) + "\n")
    return found["ranges"]


def check_table(table: Path) -> None:
    """Raise LiteDetrError where there is no file that could stand for calibration images."""
    if not table.is_file():
        raise _needs_images(table, "does not exist")


def apply(model: ir.Model, names: Sequence[str], ranges: dict[str, float]) -> ir.Model:
    """Return the FP32 `model` with QuantizeLinear and DequantizeLinear around the inputs and weights of some nodes.

    names: of the nodes.
    ranges: the largest magnitude of their inputs, by tensor.
    """
    from onnxruntime.quantization import CalibrationMethod, QuantType
    from onnxruntime.quantization.calibrate import TensorData, TensorsData
    from onnxruntime.quantization.qdq_quantizer import QDQQuantizer
    from onnxruntime.quantization.quant_utils import add_infer_metadata

    precision.refuse_typed(model.graph)
    zero = np.array(0, np.int8)
    chosen = set(names)
    steps: dict[str, list[dict]] = {}
    tensors = {}
    for node in model.graph:
        if node.name in chosen:
            data, weight = node.inputs[:2]
            largest = np.float32(ranges[data.name])
            tensors[data.name] = TensorData(lowest=-largest, highest=largest)
            steps[data.name] = [{"scale": step_of(largest), "zero_point": zero}]
            axis = weight_axis(node)
            steps[weight.name] = [
                {"axis": axis, "scale": step, "zero_point": zero}
                for step in steps_of(weight.const_value.numpy(), axis).ravel()
            ]
    proto = ir.to_proto(model)
    add_infer_metadata(proto)  # the shapes are all known
    quantizer = QDQQuantizer(
        proto,
        per_channel=True,
        reduce_range=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QInt8,
        tensors_range=TensorsData(CalibrationMethod.MinMax, tensors),
        nodes_to_quantize=list(names),
        nodes_to_exclude=[],
        op_types_to_quantize=["Conv", "MatMul"],
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "OpTypesToExcludeOutputQuantization": ["Conv", "MatMul"],
            "TensorQuantOverrides": steps,
        },
    )
    quantized = ir.from_proto(quantizer.quantize_model())
    quantized.metadata_props.clear()
    quantized.graph.sort()
    for node in quantized.graph:
        if node.op_type == "QuantizeLinear":
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.INT8), node.inputs[0].shape
        elif node.op_type == "DequantizeLinear":
            node.outputs[0].type, node.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), node.inputs[0].shape
            quantize = node.inputs[0].producer()
            # The quantizer gives the rounded value to all readers, residual sums among them.
            for user, i in list(node.outputs[0].uses()) if quantize is not None else ():
                if user.name not in chosen:
                    user.replace_input_with(i, quantize.inputs[0])
    return quantized


def sensitivity(
    model: Detector, graph: ir.Graph, names: Sequence[str], ranges: dict[str, float], calibration: Calibration
) -> list[dict]:
    """Return what quantizing each layer alone does to the outputs of PyTorch, the worst first.

    Rows with layer (a node of `names`), logits (root mean square of the difference over that of the logits) and boxes
    (mean difference, of the image's side), on SENSITIVITY_IMAGES of the images.  The queries are those of the FP32
    model throughout.
    """
    calibration = dataclasses.replace(calibration, images=calibration.images[:SENSITIVITY_IMAGES])
    model = copy.deepcopy(model)
    fold_frozen_batch_norm(model)
    modules = dict(model.named_modules())
    normalise = Deployed(model, "raw").normalise
    feeds = [{name: torch.from_numpy(array) for name, array in feed.items()} for feed in calibration.feeds()]

    def run(expected):
        for feed, reference in zip(feeds, expected):
            mask = feed.get("pixel_mask")
            yield model(normalise(feed["images"], mask), mask, reference["topk_indices"] if reference else None)

    rows = []
    with torch.inference_mode():
        expected = list(run([None] * len(feeds)))
        inputs = {node.name: node.inputs[0].name for node in graph}
        for name in names:
            module = modules[name.rpartition("/")[0].removeprefix("detector.")]
            weight = module.weight.data
            step = float(step_of(ranges[inputs[name]]))
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


def within_budget(
    ranking: Sequence[dict], ap_of: Callable[[list[str]], float], wanted: float, progress: Callable[[str], None]
) -> list[str]:
    """Return the layers to quantize for an AP of at least `wanted`: all but the worst of `ranking`, of which none, one,
    two, four, eight and so on are left out until AP suffices.

    ap_of: the AP (0..1) of the graph with these layers quantized.
    Raises LiteDetrError where it does not suffice with half of them left out either.
    """
    order = [row["layer"] for row in ranking]
    left_out = 0
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


def weight_axis(node: ir.Node) -> int:
    """Return the axis of the output channels of a node's weight."""
    return 0 if node.op_type == "Conv" else 1


def _calibrate(model: ir.Model, tensors: set[str], feeds: Iterable[dict], method: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):  # the calibrators print
        path = Path(folder) / "model.onnx"
        ir.save(model, path)
        calibrator = _calibrator(method, tensors, path)
        for feed in feeds:  # one at a time: the calibrator keeps every tensor of what it is given at once
            calibrator.collect_data(_Reader([feed]))
        data = calibrator.compute_data()
    ranges = {name: float(max(abs(np.max(v)) for v in data[name].range_value)) for name in sorted(tensors)}
    bad = [name for name, largest in ranges.items() if not np.isfinite(largest)]
    if bad:
        raise LiteDetrError(
            f"calibration: the value {bad[0]!r} is infinite or not a number on the calibration images. Verify the "
            "model in FP32 first, and check the images."
        )
    return ranges


def _calibrator(method: str, tensors: set[str], path: Path):
    """Return ONNX Runtime's calibrator for `method`, on `tensors` alone and with the attention ops registered."""
    from onnxruntime.quantization import calibrate

    base, options = {
        "minmax": (calibrate.MinMaxCalibrater, {}),
        "entropy": (calibrate.EntropyCalibrater, {"num_bins": _HISTOGRAM_BINS}),
        "percentile": (calibrate.PercentileCalibrater, {}),
    }[method]

    class Calibrator(base):  # type: ignore[valid-type,misc]
        def select_tensors_to_calibrate(self, model):
            _, infos = super().select_tensors_to_calibrate(model)
            return tensors, infos

        def create_inference_session(self):
            self.infer_session = create_session(self.augmented_model_path)

    calibrator = Calibrator(path, None, str(path.with_name("augmented.onnx")), symmetric=True, **options)
    calibrator.augment_graph()
    calibrator.create_inference_session()
    return calibrator


def _needs_images(table: Path, state: str) -> LiteDetrError:
    return LiteDetrError(
        f"precision 'int8' needs calibration images: there are none, and the calibration table {table} {state}. Give a "
        "folder of images like those that the model will see (--calibration)."
    )


class _Reader:
    """What the calibrators read from."""

    def __init__(self, feeds: Iterable[dict]):
        self._feeds = iter(feeds)

    def get_next(self) -> dict | None:
        return next(self._feeds, None)


def _read(table: Path) -> dict:
    """Return the table, or nothing where there is none that can be read."""
    try:
        found = json.loads(table.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("ranges"), dict) else {}


def _digest(parts: Iterable[bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()
