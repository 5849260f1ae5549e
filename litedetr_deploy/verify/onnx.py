"""An ONNX model against the PyTorch model that it was made from.

The detector picks its queries by a top-k over tokens, and each query slot has content of its own: where two tokens
score the same to rounding, two runtimes may pick them in another order and then differ in those queries entirely.
So the scores of all tokens are compared, then the choice, then logits and boxes of PyTorch given the same choice.

A typed model is compared with PyTorch in FP32 as well; what it may differ by is measured on a PyTorch model whose
modules round as the graph's nodes do.  Such rounding can throw single queries far off, so that there the mean
difference of logits and boxes counts.  ONNX Runtime's CPU has half kernels for few operators and computes runs of the
others in FP32, so that a half model also runs as its float twin, which rounds every value; bfloat16 runs as that alone.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from ..artifact import METADATA_KEY
from ..errors import LiteDetrError
from ..model.attention import SelfAttention
from ..model.deployed import PROBES, Deployed, postprocess
from ..model.detector import Detector
from ..model.resnet import fold_frozen_batch_norm
from ..ops import reference, schema, torch_op
from ..runtime.images import load_image, prepare
from ..runtime.sample import sample_images
from ..runtime.session import create_session
from . import typed

# What float32 rounding may change.  The floors are twenty times what the official code's outputs move with other
# threads or kernels on small images.  A model can amplify rounding further: PyTorch's own spread is measured, and
# SPREADS of it are allowed, up to the caps, beyond which a difference could show in a detection.
SPREADS = 4
FLOORS = {"proposal_scores": 2e-4, "pred_logits": 2e-4, "pred_boxes": 3e-4}  # logits: of the largest magnitude;
CAPS = {"proposal_scores": 1e-2, "pred_logits": 1e-2, "pred_boxes": 3e-3}  # boxes: of the image's side
NAMES = {"proposal_scores": "token scores", "pred_logits": "logits", "pred_boxes": "boxes"}
# Of a typed model: the floors are in epsilons of its half type, and what passes the caps is another result.  The
# largest difference over all tokens, the mean over all queries.  INT8 has no caps: what it saturates is a matter of
# the calibration, and what that costs, of an evaluation.
TYPED_FLOORS = {"proposal_scores": 4, "pred_logits": 0.25, "pred_boxes": 0.25}
TYPED_CAPS = {"proposal_scores": 0.3, "pred_logits": 0.1, "pred_boxes": 0.05}
RAN = {"fp32": "the model", "fp16": "the model and its float twin", "bf16": "the model's float twin"}
RAN["int8"] = RAN["fp16"]
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float16}

DYNAMIC_SIZES = ((480, 640), (512, 384))  # tried where the graph takes any size


@dataclass
class Verification:
    """rows: dicts with case, quantity, difference, tolerance, passed; ran: what the figures were taken on."""

    rows: list[dict] = field(default_factory=list)
    ran: str = "the model"

    @property
    def passed(self) -> bool:
        return all(row["passed"] for row in self.rows)

    def add(self, case: str, quantity: str, difference: float, tolerance: float) -> None:
        difference = float(difference)
        passed = difference <= tolerance  # NaN fails
        finite = difference if np.isfinite(difference) else float(np.finfo(np.float32).max)
        self.rows.append(
            {"case": case, "quantity": quantity, "difference": finite, "tolerance": tolerance, "passed": passed}
        )

    def summary(self) -> dict:
        """For the model's metadata: the verdict, and the largest difference of every quantity."""
        quantities = dict.fromkeys(row["quantity"] for row in self.rows)
        largest = {q: max(row["difference"] for row in self.rows if row["quantity"] == q) for q in quantities}
        return {"passed": self.passed, "ran": self.ran, "largest_difference": largest}

    def to_dict(self) -> dict:
        return {"verification": self.rows, "passed": self.passed}


def verify_onnx(
    path: str | os.PathLike,
    model: Detector,
    images: Sequence | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> Verification:
    """Runs the ONNX model in ONNX Runtime and `model` in PyTorch FP32, both on the CPU, and compares.

    Inputs are pictures (`images`, else drawn ones) and noise; batches of one and of three with two identical rows;
    at two sizes where the graph takes any.  The attention op alone is compared with its definition in float64, in
    float32 and in the graph's half type.  What typed models run as: see above.
    Raises LiteDetrError for a model that `litedetr export` did not make.
    """
    path = Path(path)
    graph = _ProbedGraph(path)
    size = graph.metadata["image_size"]
    verification = Verification(ran=graph.ran)
    if graph.metadata["attention"] == "op":
        progress("verify: the attention op against float64")
        for dtype in (torch.float32, graph.half) if graph.half else (torch.float32,):
            _verify_op(verification, model, dtype)
    rounding = _rounding(model, graph) if graph.half else None
    pictures = [load_image(image) for image in (images or sample_images(1))]
    for height, width in DYNAMIC_SIZES if size is None else [size]:
        name = f"{height}x{width}, " if size is None else ""
        cases = [
            (f"{name}picture {i + 1}" if len(pictures) > 1 else f"{name}picture", *_picture(p, height, width, graph))
            for i, p in enumerate(pictures)
        ]
        cases.append((f"{name}noise", *_noise(height, width, graph)))
        expected, yardsticks = [], []
        for case, image, mask in cases:
            progress(f"verify: {case}")
            outputs = graph.run(image, mask)
            wanted = _run_pytorch(model, image, mask, outputs["topk_indices"])
            if rounding is not None:  # what saturates depends on the picture
                yardsticks.append(_typed_yardstick(rounding, graph.precision, image, mask, wanted))
            else:
                yardsticks.append(yardsticks[0] if yardsticks else _yardstick(model, image, mask, wanted))
            _compare(verification, case, outputs, wanted, yardsticks[-1])
            expected.append(wanted)
        progress(f"verify: {name}batch of 3")
        first, last = cases[0], cases[-1]
        batch = graph.run(
            *(None if first[i] is None else np.concatenate((first[i], last[i], first[i])) for i in (1, 2))
        )
        ends = [(expected[i], yardsticks[i]) for i in (0, -1)]
        _compare_batch(verification, f"{name}batch of 3", batch, ends)
        if graph.precision in ("fp16", "int8"):
            progress(f"verify: {name}every value rounded")
            case, image, mask = cases[0]
            outputs = _ProbedGraph(path, as_twin=True).run(image, mask)
            wanted = _run_pytorch(model, image, mask, outputs["topk_indices"])
            _compare(verification, f"{case}, all rounded", outputs, wanted, yardsticks[0])
    return verification


class _ProbedGraph:
    """The model, or its float twin, with the values of PROBES as further outputs."""

    def __init__(self, path: Path, as_twin: bool = False):
        try:
            proto = onnx.load(path)
        except Exception as error:  # protobuf's own error classes differ between its implementations
            raise LiteDetrError(f"{path} is not an ONNX model, or a damaged one: {error}.") from error
        self.metadata = _metadata(proto, path)
        self.outputs = [output.name for output in proto.graph.output]
        known = {name for node in proto.graph.node for name in node.output}
        if missing := [name for name in PROBES if name not in known]:
            raise LiteDetrError(
                f"{path} has no value {missing[0]!r} to compare. Verify the file that `litedetr export` wrote, before "
                "other tools rewrite it."
            )
        self.precision = self.metadata.get("precision", "fp32")
        self.half = HALVES.get(self.precision)
        self.proto = proto
        proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in PROBES if name not in self.outputs)
        self.ran = RAN[self.precision]
        if as_twin or self.precision == "bf16":  # of which ONNX Runtime's CPU has few kernels
            proto = typed.float_twin(proto)
        self.session = create_session(proto.SerializeToString())

    def run(self, image: np.ndarray, mask: np.ndarray | None) -> dict[str, np.ndarray]:
        """image [N, 3, H, W] in 0..1, mask [N, H, W] or None -> inputs, outputs and probes by name."""
        n, _, height, width = image.shape
        feed = {"images": image}
        if "labels" in self.outputs:
            feed["orig_target_sizes"] = np.array([[width, height]] * n, np.int64)
        if mask is not None:
            feed["pixel_mask"] = mask
        names = list(dict.fromkeys([*self.outputs, *PROBES]))
        return feed | dict(zip(names, self.session.run(names, feed)))


def _metadata(proto: onnx.ModelProto, path: Path) -> dict:
    for entry in proto.metadata_props:
        if entry.key == METADATA_KEY:
            return json.loads(entry.value)
    raise LiteDetrError(
        f"{path} was not made by `litedetr export` (it has no metadata {METADATA_KEY!r}): nothing to verify."
    )


def _picture(picture, height: int, width: int, graph: _ProbedGraph):
    masked = graph.metadata["pixel_mask"]
    prepared = prepare(picture, "letterbox" if masked else "stretch", (height, width))
    return prepared.pixels[None], prepared.mask[None] if masked else None


def _noise(height: int, width: int, graph: _ProbedGraph):
    rng = np.random.default_rng(0)
    image = rng.random((1, 3, height, width), np.float32)
    if not graph.metadata["pixel_mask"]:
        return image, None
    mask = np.zeros((1, height, width), bool)
    mask[:, height * 7 // 8 :], mask[:, :, width * 5 // 6 :] = True, True
    return image, mask


def _run_pytorch(model: Detector, image, mask, topk_indices) -> dict[str, np.ndarray]:
    """What PyTorch makes of the same image with the same choice of queries."""
    normalise = Deployed(model, "raw").normalise
    mask = None if mask is None else torch.from_numpy(mask)
    with torch.inference_mode():
        values = model(normalise(torch.from_numpy(image), mask), mask, torch.from_numpy(topk_indices))
    return {name: values[name].numpy() for name in PROBES}


@dataclass
class _Yardstick:
    """tolerances: largest differences that rounding explains, by value; typed: whether those of logits and boxes are
    means over all queries."""

    tolerances: dict[str, float]
    typed: bool = False

    def quantity(self, name: str) -> str:
        return f"{NAMES[name]}, mean" if self.typed and name != "proposal_scores" else NAMES[name]

    def measure(self, name: str, difference: np.ndarray) -> float:
        return _mean(difference) if self.typed and name != "proposal_scores" else _largest(difference)


def _yardstick(model: Detector, image, mask, wanted) -> _Yardstick:
    """PyTorch against itself with other threads and with the last bit of every pixel changed at random."""
    bits = np.random.default_rng(2).integers(-1, 2, image.shape, np.int32)
    nudged = np.abs((image.view(np.int32) + bits * (image > 0)).view(np.float32))
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        other = _run_pytorch(model, nudged, mask, wanted["topk_indices"])
    finally:
        torch.set_num_threads(threads)
    tolerances = {}
    for name in NAMES:
        scale = 1.0 if name == "pred_boxes" else _scale(wanted[name])
        spread = _largest(other[name] - wanted[name])
        tolerances[name] = float(np.clip(SPREADS * spread, FLOORS[name] * scale, CAPS[name] * scale))
    return _Yardstick(tolerances)


def _typed_yardstick(rounding: Detector, typed_as: str, image, mask, wanted) -> _Yardstick:
    """PyTorch in FP32 against what `_rounding` made of it for the precision `typed_as`."""
    other = _run_pytorch(rounding, image, mask, wanted["topk_indices"])
    yardstick = _Yardstick({}, typed=True)
    eps = torch.finfo(HALVES[typed_as]).eps
    for name in NAMES:
        scale = 1.0 if name == "pred_boxes" else _scale(wanted[name])
        spread = yardstick.measure(name, other[name] - wanted[name]) if np.isfinite(other[name]).all() else 0.0
        tolerance = max(SPREADS * spread, TYPED_FLOORS[name] * eps * scale)
        cap = np.inf if typed_as == "int8" else TYPED_CAPS[name] * scale
        yardstick.tolerances[name] = float(min(tolerance, cap))
    return yardstick


def _rounding(model: Detector, graph: _ProbedGraph) -> Detector:
    """A copy of `model` of which every module that the graph has in half rounds its weights, inputs and outputs to
    half, and every one that it has in INT8 its inputs and weights to the graph's steps."""
    model = copy.deepcopy(model)
    fold_frozen_batch_norm(model)
    steps = typed.modules(graph.proto)

    def rounded(x, step=None):
        return x.to(graph.half).float() if step is None else typed.fake_quantized(x, step)

    for name, module in model.named_modules():
        name = f"detector.{name}"
        if not isinstance(module, (nn.Conv2d, nn.Linear, SelfAttention)) or name not in steps:
            continue
        step = steps[name]
        for parameter in module.parameters(recurse=False):
            quantized = step is not None and parameter.ndim > 1
            parameter.data = (typed.fake_quantized_weight if quantized else rounded)(parameter.data)
        module.register_forward_pre_hook(
            lambda _, inputs, step=step: tuple(x if x is None else rounded(x, step) for x in inputs)
        )
        module.register_forward_hook(lambda _, inputs, output: rounded(output))
    return model


def _compare(verification: Verification, case: str, outputs, wanted, yardstick: _Yardstick) -> None:
    scores = wanted["proposal_scores"]
    for name in NAMES:
        difference = yardstick.measure(name, outputs[name] - wanted[name])
        verification.add(case, yardstick.quantity(name), difference, yardstick.tolerances[name])
    error = _choice_error(scores, outputs["topk_indices"])
    verification.add(case, "choice of queries", error, yardstick.tolerances["proposal_scores"])
    if "labels" in outputs:
        _compare_detections(verification, case, outputs)


def _compare_detections(verification: Verification, case: str, outputs) -> None:
    """The graph's post-processing against PyTorch's on the same logits: equal but for the order of equal scores."""
    logits, boxes = torch.from_numpy(outputs["pred_logits"]), torch.from_numpy(outputs["pred_boxes"])
    sizes = torch.from_numpy(outputs["orig_target_sizes"])
    labels, corners, scores = (value.numpy() for value in postprocess(logits, boxes, sizes))
    eps = float(np.finfo(np.float32).eps)
    verification.add(case, "detections: scores", _largest(outputs["scores"] - scores), 4 * eps)
    distinct = np.diff(scores, axis=1, prepend=2.0) != 0
    distinct[:, :-1] &= distinct[:, 1:]
    verification.add(case, "detections: labels", (outputs["labels"] != labels)[distinct].sum(), 0.0)
    difference = _largest((outputs["boxes"] - corners)[distinct])
    verification.add(case, "detections: boxes", difference, 4 * eps * _scale(corners))


def _compare_batch(verification: Verification, case: str, batch, ends) -> None:
    """A batch of rows A, B, A against single runs of A and B, and its two equal rows against each other; ends: the
    values and the yardsticks of A and B."""
    yardstick = ends[0][1]
    for name in ("pred_logits", "pred_boxes"):
        difference = yardstick.measure(name, batch[name][0] - batch[name][2])
        verification.add(case, f"identical rows: {yardstick.quantity(name)}", difference, yardstick.tolerances[name])
    for row, (wanted, yardstick) in enumerate(ends):
        error = _choice_error(wanted["proposal_scores"], batch["topk_indices"][row : row + 1])
        verification.add(f"{case}, row {row + 1}", "choice of queries", error, yardstick.tolerances["proposal_scores"])
        if (batch["topk_indices"][row] == wanted["topk_indices"][0]).all():
            for name in ("pred_logits", "pred_boxes"):
                difference = yardstick.measure(name, batch[name][row] - wanted[name][0])
                tolerance = yardstick.tolerances[name]
                verification.add(f"{case}, row {row + 1}", yardstick.quantity(name), difference, tolerance)


def _choice_error(scores: np.ndarray, indices: np.ndarray) -> float:
    """By how much scores [N, S] speak against having picked `indices` [N, Q], in this order, as the top ones."""
    best = -np.sort(-scores, axis=1)[:, : indices.shape[1]]
    return _largest(np.take_along_axis(scores, indices, axis=1) - best)


def _largest(difference: np.ndarray) -> float:
    """The largest magnitude; NaN counts as infinite."""
    return float(np.nan_to_num(np.abs(difference), nan=np.inf).max(initial=0.0))


def _mean(difference: np.ndarray) -> float:
    """The mean magnitude; NaN counts as infinite."""
    return float(np.nan_to_num(np.abs(difference), nan=np.inf).mean())


def _scale(values: np.ndarray) -> float:
    return max(1.0, float(np.abs(values).max()))


def _verify_op(verification: Verification, model: Detector, dtype: torch.dtype) -> None:
    """The op in ONNX Runtime and in PyTorch at the model's shapes, on three rows of which two are identical; `dtype`
    is the type T of its values."""
    config = model.config
    shapes = torch.tensor([[100 >> i, 168 >> i] for i in range(config.num_levels)])
    rng = np.random.default_rng(1)
    n, tokens, queries, dim = 3, int(shapes.prod(1).sum()), 256, config.hidden_dim
    samples = config.num_heads * config.num_levels * config.decoder_points
    first = "query" if config.key_aware else "attention_logits"
    arrays = {
        first: rng.standard_normal((n, queries, dim if config.key_aware else samples)),
        "value": rng.standard_normal((n, tokens, dim)),
        "reference_points": rng.random((n, queries, config.num_levels, 4)),
        "sampling_offsets": rng.standard_normal((n, queries, samples * 2)) * 2,
    }
    feed = {}
    for name, array in arrays.items():
        array[2] = array[0]
        feed[name] = torch.from_numpy(array).to(torch.float32 if name == "reference_points" else dtype)
    feed["spatial_shapes"] = shapes
    op_type = schema.KEY_AWARE if config.key_aware else schema.PLAIN
    attributes = {"num_heads": config.num_heads, "num_points": config.decoder_points}
    session = create_session(_one_node(op_type, feed, attributes))
    arrays = {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in feed.items()}
    output = session.run(None, arrays)[0]
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in feed.items()}
    if config.key_aware:
        wanted = reference.key_aware_deform_attn(**doubles, **attributes)
        in_torch = torch_op.key_aware_deform_attn(**feed, **attributes)
    else:
        wanted = reference.ms_deform_attn(**doubles, **attributes)
        in_torch = torch_op.ms_deform_attn(**feed, **attributes)
    # A float32 location is off by an eps or so of its map, hence by this many pixels, and a value by as much of its
    # range of several units per pixel.  What is stored in half is off by an eps of half besides.
    largest = float(feed["value"].abs().max())
    tolerance = 4 * float(np.finfo(np.float32).eps) * float(shapes.max()) * max(1.0, largest)
    if dtype != torch.float32:
        tolerance += torch.finfo(dtype).eps * float(wanted.abs().max())
    case = "attention op alone" + ("" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}")
    verification.add(case, "ONNX Runtime against float64", _largest(output - wanted.numpy()), tolerance)
    verification.add(case, "PyTorch against float64", _largest((in_torch.double() - wanted).numpy()), tolerance)
    verification.add(case, "identical rows, bit for bit", _largest(output[0] - output[2]), 0.0)


def _one_node(op_type: str, feed: dict[str, torch.Tensor], attributes: dict[str, int]) -> bytes:
    """A model of the op alone, whose floats come and go as float32 and are cast to the op's types inside."""
    helper, kinds = onnx.helper, onnx.TensorProto
    types = {torch.float32: kinds.FLOAT, torch.float16: kinds.FLOAT16, torch.bfloat16: kinds.BFLOAT16}
    inputs, nodes = [], []
    for name, tensor in feed.items():
        kind = kinds.FLOAT if tensor.is_floating_point() else kinds.INT64
        inputs.append(helper.make_tensor_value_info(name, kind, tuple(tensor.shape)))
        nodes.append(helper.make_node("Cast", [name], [f"{name}_cast"], to=types.get(tensor.dtype, kind)))
    cast = [f"{name}_cast" for name in feed]
    nodes.append(
        helper.make_node(op_type, cast, ["stored"], domain=schema.DOMAIN, **attributes, **schema.PLUGIN_ATTRIBUTES)
    )
    nodes.append(helper.make_node("Cast", ["stored"], [schema.OUTPUT], to=kinds.FLOAT))
    output = helper.make_tensor_value_info(schema.OUTPUT, kinds.FLOAT, None)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    graph = helper.make_graph(nodes, op_type, inputs, [output])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
