"""An ONNX model against the PyTorch model that it was made from.

Each query slot has content of its own: where two tokens score the same to rounding, runtimes may pick them in another
order and then differ in those queries entirely.  So the scores of all tokens are compared, then the choice, then logits
and boxes of PyTorch given the same choice.

A typed model is compared with PyTorch in FP32 as well; what it may differ by is measured on a PyTorch model whose
modules round as the graph's nodes do.  That can throw single queries far off: the mean difference counts there.  ONNX
Runtime's CPU has half kernels for few operators and computes runs of the others in FP32, so that a half model also runs
as its float twin, which rounds every value; bfloat16 runs as that alone.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import onnx
import torch

from ..artifact import load_onnx, onnx_metadata
from ..errors import CheckFailed, LiteDetrError
from ..model.checkpoints.official import official_key
from ..model.deployed import PROBES, postprocess
from ..model.detector import Detector
from ..ops import reference, schema, torch_op
from ..runtime.session import open_session
from . import typed
from .probes import Probe, feed, make_probes, nudged, stack
from .reference import BOXES, INDICES, INT8_CAPS, LARGEST, LOGITS, MEAN, SCORES, choice_error, run_pytorch, tolerances
from .regions import compare_regions, find_regions, geometry
from .verdict import Verdict, check_finite, compare, largest, mean

NAMES = {SCORES: "token scores", LOGITS: "logits", BOXES: "boxes"}
# Of a typed model: the floors are in epsilons of its half type, and what passes the caps is another result.  The
# largest difference over all tokens, the mean over all queries.
TYPED_DISTANCES = MEAN | {SCORES: largest}
TYPED_FLOORS = {SCORES: 4, LOGITS: 0.25, BOXES: 0.25}
TYPED_CAPS = {SCORES: 0.3, LOGITS: 0.1, BOXES: 0.05}
RAN = {"fp32": "the model", "fp16": "the model and its float twin", "bf16": "the model's float twin"}
RAN["int8"] = RAN["fp16"]
RUNTIME_NAMES = {None: "ONNX Runtime", "onnxruntime": "ONNX Runtime", "openvino": "OpenVINO"}
HALVES = {"fp16": torch.float16, "bf16": torch.bfloat16, "int8": torch.float16}

LISTED = 4  # weights that a message names
DYNAMIC_SIZES = ((480, 640), (512, 384))  # tried where the graph takes any size


def verify_onnx(
    path: str | os.PathLike, model: Detector, images=None, progress=lambda stage: None, runtime: str | None = None
) -> Verdict:
    """Run what `export_onnx` wrote in `runtime`, of `RUNTIMES`, and `model` in PyTorch FP32, both on the CPU; compare.

    Inputs are images and noise; batches of one and of three with two identical rows; at two sizes where the graph
    takes any.  The attention op alone is compared with its definition in float64, in float32 and in the graph's half
    type, and every attention of the graph on its own inputs.  For `images` and `progress`, see `verify.verify`.
    """
    proto = load_onnx(path)
    metadata = onnx_metadata(proto, path)
    known = {name for node in proto.graph.node for name in node.output}
    learned = model.config.num_queries if model.config.is_one_stage else None
    expected = PROBES if learned is None else (LOGITS, BOXES)
    precision, missing = metadata.get("precision", "fp32"), [name for name in expected if name not in known]
    if missing or precision not in RAN:
        what = f"has no value {missing[0]!r} to compare" if missing else f"is of an unknown precision, {precision!r}"
        advice = "Verify the file that `litedetr export` wrote, before other tools rewrite it."
        raise LiteDetrError(f"{path} {what}. {advice}")
    on_cpu = metadata.get("target") == "cpu"  # where INT8 stands in FP32
    verdict = Verdict(ran=RAN["fp32" if on_cpu else precision] + (f" in {RUNTIME_NAMES[runtime]}" if runtime else ""))
    for key, trouble in _not_finite(model).items():
        verdict.add("weights", key, np.inf, 0.0, f"{trouble} in the checkpoint itself")
    if verdict.rows:
        return verdict
    half = None if on_cpu else HALVES.get(precision)
    if metadata.get("attention") == "op":
        progress("verify: the attention op against float64")
        for dtype in (torch.float32, half) if half else (torch.float32,):
            _verify_op(verdict, model, dtype, runtime)
    rounding = None if precision == "fp32" else typed.rounding_twin(model, proto, half)
    # ONNX Runtime's CPU has few kernels for bfloat16.
    graph = _Graph(typed.float_twin(proto) if precision == "bf16" else proto, (), runtime, learned)
    regions = find_regions(proto, model)
    values = set().union(*(region.values for region in regions))
    probed = _Graph(typed.float_twin(proto) if half else proto, values, runtime, learned)
    for size in [graph.size] if graph.size else DYNAMIC_SIZES:
        name = "" if graph.size else f"{size[0]}x{size[1]}, "
        probes = make_probes(images, size, graph.masked)
        compared, seen = [], {}
        for probe in probes:
            case = name + probe.name
            progress(f"verify: {case}")
            outputs = graph.run(probe.image, probe.mask)
            with geometry(model) as found:
                wanted = run_pytorch(model, probe.image, outputs["topk_indices"], mask=probe.mask)
            seen = seen or found
            if not check_finite(verdict, case, outputs, wanted, NAMES):
                return verdict
            if rounding is not None:  # what saturates depends on the image
                yardstick = _typed_yardstick(rounding, precision, probe, wanted)
            elif not compared:
                yardstick = _yardstick(model, probe, wanted)
            _compare(verdict, case, outputs, wanted, yardstick)
            compared.append((wanted, yardstick))
        progress(f"verify: {name}batch of 3")
        batch = graph.run(*stack([probes[0], probes[-1], probes[0]]))
        _compare_batch(verdict, f"{name}batch of 3", batch, [compared[0], compared[-1]])
        progress(f"verify: {name}each attention alone")
        case = name + probes[0].name
        outputs = probed.run(probes[0].image, probes[0].mask)
        if half == torch.float16:
            wanted = run_pytorch(model, probes[0].image, outputs["topk_indices"], mask=probes[0].mask)
            _compare(verdict, f"{case}, all rounded", outputs, wanted, compared[0][1])
        compare_regions(verdict, case, regions, outputs, seen, model, half, typed.modules(proto))
    return verdict


def check_weights(model: Detector) -> None:
    """Raise LiteDetrError for a weight that is not float32, CheckFailed for one that is not finite."""
    for name, tensor in model.named_parameters():
        if tensor.dtype != torch.float32:
            raise LiteDetrError(
                f"the weight {official_key(name, model.config)} is of type {str(tensor.dtype).removeprefix('torch.')}; "
                "it must be float32. Give the weights as they were trained: what is stored smaller is chosen at the "
                "export, with --precision (precision=)."
            )
    bad = [f"{key} {trouble}" for key, trouble in _not_finite(model).items()]
    if bad:
        others = f" and {len(bad) - LISTED} more" if len(bad) > LISTED else ""
        raise CheckFailed(
            f"the checkpoint's own weights are not finite: {', '.join(bad[:LISTED])}{others}. PyTorch computes nothing "
            "useful with them either, and nothing was exported. Take an earlier checkpoint, or repair these tensors."
        )


def _not_finite(model: Detector) -> dict[str, str]:
    """Return what is wrong with the weights that hold NaN or an infinity, by their keys in official checkpoints."""
    bad = {}
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_floating_point() and not tensor.isfinite().all():
            kind, count = "NaN" if tensor.isnan().any() else "an infinity", int((~tensor.isfinite()).sum())
            bad[official_key(name, model.config)] = f"holds {kind} in {count:,} of {tensor.numel():,} values"
    return bad


class _Graph:
    """A graph in a runtime, with the values of PROBES, and `values` in float32, as further outputs.

    learned: how many queries a one-stage model has, whose graph chooses none: it gets the scores and the choice that
    PyTorch gives, all 0 and all of them.
    """

    def __init__(self, proto: onnx.ModelProto, values: Iterable[str], runtime: str | None, learned: int | None):
        proto = copy.deepcopy(proto)
        del proto.metadata_props[:]  # it describes the graph without further outputs
        graph = proto.graph
        shapes = {value.name: [side.dim_value for side in value.type.tensor_type.shape.dim] for value in graph.input}
        self.inputs, self.masked = shapes.keys(), "pixel_mask" in shapes
        self.size = tuple(shapes["images"][2:]) if all(shapes["images"][2:]) else None
        widened = {f"{name}/float": name for name in values}
        for name, value in widened.items():
            graph.node.append(onnx.helper.make_node("Cast", [value], [name], to=onnx.TensorProto.FLOAT))
        known = [output.name for output in graph.output]
        self._learned = learned
        probes = PROBES if learned is None else (LOGITS, BOXES)
        further = [name for name in (*probes, *widened) if name not in known]
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in further)
        self._names = {name: widened.get(name, name) for name in (*known, *further)}
        self._session = open_session(proto.SerializeToString(), runtime=runtime)

    def run(self, image: np.ndarray, mask: np.ndarray | None) -> dict[str, np.ndarray]:
        """image [N, 3, H, W] in 0..1, mask [N, H, W] or None -> inputs, outputs, probes and values by name."""
        inputs = feed(self.inputs, image, mask)
        outputs = self._session.run(inputs)
        if self._learned is not None:
            indices = np.tile(np.arange(self._learned), (len(image), 1))
            inputs = inputs | {SCORES: np.zeros(indices.shape, np.float32), INDICES: indices}
        return inputs | {value: outputs[name] for name, value in self._names.items()}


class _Yardstick(NamedTuple):
    """What rounding explains of each value's difference, and how that is measured."""

    tolerances: dict[str, float]
    distances: Mapping[str, Callable[[np.ndarray], float]] = LARGEST

    def add(self, verdict: Verdict, case: str, name: str, found, wanted, prefix: str = "") -> None:
        """Compare the value `name` and add the row."""
        distance = self.distances[name]
        quantity = prefix + NAMES[name] + (", mean" if distance is mean else "")
        allowed = {quantity: self.tolerances[name]}
        compare({quantity: found}, {quantity: wanted}, allowed, verdict, case, distance)


def _yardstick(model: Detector, probe: Probe, wanted) -> _Yardstick:
    """Compare PyTorch with itself with other threads and with the last bit of every pixel changed at random."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, threads // 2))
    try:
        other = run_pytorch(model, nudged(probe.image), wanted["topk_indices"], mask=probe.mask)
    finally:
        torch.set_num_threads(threads)
    return _Yardstick(tolerances(other, wanted))


def _typed_yardstick(rounding: Detector, precision: str, probe: Probe, wanted) -> _Yardstick:
    """Compare PyTorch in FP32 with what `_rounding` made of it."""
    other = run_pytorch(rounding, probe.image, wanted["topk_indices"], mask=probe.mask)
    floors = {name: floor * torch.finfo(HALVES[precision]).eps for name, floor in TYPED_FLOORS.items()}
    caps = INT8_CAPS if precision == "int8" else TYPED_CAPS
    return _Yardstick(tolerances(other, wanted, floors, caps, TYPED_DISTANCES), TYPED_DISTANCES)


def _compare(verdict: Verdict, case: str, outputs, wanted, yardstick: _Yardstick) -> None:
    for name in NAMES:
        yardstick.add(verdict, case, name, outputs[name], wanted[name])
    error = choice_error(wanted[SCORES], outputs["topk_indices"])
    verdict.add(case, "choice of queries", error, yardstick.tolerances[SCORES])
    if "labels" in outputs:
        _compare_detections(verdict, case, outputs)


def _compare_detections(verdict: Verdict, case: str, outputs) -> None:
    """Compare the graph's post-processing with PyTorch's on the same logits: equal but for how equal scores follow."""
    logits, boxes = torch.from_numpy(outputs["pred_logits"]), torch.from_numpy(outputs["pred_boxes"])
    sizes = torch.from_numpy(outputs["orig_target_sizes"])
    labels, corners, scores = (value.numpy() for value in postprocess(logits, boxes, sizes))
    eps = float(np.finfo(np.float32).eps)
    verdict.add(case, "detections: scores", largest(outputs["scores"] - scores), 4 * eps)
    distinct = np.diff(scores, axis=1, prepend=2.0) != 0
    distinct[:, :-1] &= distinct[:, 1:]
    verdict.add(case, "detections: labels", (outputs["labels"] != labels)[distinct].sum(), 0.0)
    if check_finite(verdict, case, outputs, {"boxes": corners}, ["boxes"]):
        difference = largest((outputs["boxes"] - corners)[distinct])
        verdict.add(case, "detections: boxes", difference, 4 * eps * max(1.0, float(np.abs(corners).max())))


def _compare_batch(verdict: Verdict, case: str, batch, ends) -> None:
    """Compare a batch of rows A, B, A with `ends`, the values and yardsticks of A and B, and its equal rows."""
    for name in (LOGITS, BOXES):
        ends[0][1].add(verdict, case, name, batch[name][0], batch[name][2], "identical rows: ")
    for row, (wanted, yardstick) in enumerate(ends):
        name = f"{case}, row {row + 1}"
        error = choice_error(wanted[SCORES], batch["topk_indices"][row : row + 1])
        verdict.add(name, "choice of queries", error, yardstick.tolerances[SCORES])
        if (batch["topk_indices"][row] == wanted["topk_indices"][0]).all():
            for quantity in (LOGITS, BOXES):
                yardstick.add(verdict, name, quantity, batch[quantity][row], wanted[quantity][0])


def _verify_op(verdict: Verdict, model: Detector, dtype: torch.dtype, runtime: str | None) -> None:
    """The op in the runtime and in PyTorch at the model's shapes, on three rows of which two are identical."""
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
    inputs: dict[str, Any] = {}
    for name, array in arrays.items():
        array[2] = array[0]
        inputs[name] = torch.from_numpy(array).to(torch.float32 if name == "reference_points" else dtype)
    inputs["spatial_shapes"] = shapes
    op_type = schema.KEY_AWARE if config.key_aware else schema.PLAIN
    attributes: dict[str, Any] = {"num_heads": config.num_heads, "num_points": config.decoder_points}
    session = open_session(_one_node(op_type, inputs, attributes), runtime=runtime)
    arrays = {name: (t.float() if t.is_floating_point() else t).numpy() for name, t in inputs.items()}
    output = session.run(arrays)[schema.OUTPUT]
    doubles = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    function = "key_aware_deform_attn" if config.key_aware else "ms_deform_attn"
    wanted = getattr(reference, function)(**doubles, **attributes)
    in_torch = getattr(torch_op, function)(**inputs, **attributes)
    # A float32 location is off by an eps or so of its map, hence by this many pixels, and a value by as much of its
    # range of several units per pixel.  What is stored in half is off by an eps of half besides.
    magnitude = float(inputs["value"].abs().max())
    tolerance = 4 * float(np.finfo(np.float32).eps) * float(shapes.max()) * max(1.0, magnitude)
    if dtype != torch.float32:
        tolerance += torch.finfo(dtype).eps * float(wanted.abs().max())
    case = "attention op alone" + ("" if dtype == torch.float32 else f", {str(dtype).removeprefix('torch.')}")
    verdict.add(case, f"{RUNTIME_NAMES[runtime]} against float64", largest(output - wanted.numpy()), tolerance)
    verdict.add(case, "PyTorch against float64", largest((in_torch.double() - wanted).numpy()), tolerance)
    verdict.add(case, "identical rows, bit for bit", largest(output[0] - output[2]), 0.0)


def _one_node(op_type: str, tensors: dict[str, torch.Tensor], attributes: dict[str, Any]) -> bytes:
    """A model of the op alone, whose floats come and go as float32 and are cast to the op's types inside."""
    helper, kinds = onnx.helper, onnx.TensorProto
    types = {torch.float32: kinds.FLOAT, torch.float16: kinds.FLOAT16, torch.bfloat16: kinds.BFLOAT16}
    attributes = attributes | schema.PLUGIN_ATTRIBUTES
    nodes = [helper.make_node(op_type, [f"{name}_cast" for name in tensors], ["y"], domain=schema.DOMAIN, **attributes)]
    inputs = []
    for name, tensor in tensors.items():
        kind = kinds.FLOAT if tensor.is_floating_point() else kinds.INT64
        inputs.append(helper.make_tensor_value_info(name, kind, tuple(tensor.shape)))
        nodes.insert(0, helper.make_node("Cast", [name], [f"{name}_cast"], to=types.get(tensor.dtype, kind)))
    nodes.append(helper.make_node("Cast", ["y"], [schema.OUTPUT], to=kinds.FLOAT))
    output = helper.make_tensor_value_info(schema.OUTPUT, kinds.FLOAT, None)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid(schema.DOMAIN, schema.VERSION)]
    graph = helper.make_graph(nodes, op_type, inputs, [output])
    return helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
