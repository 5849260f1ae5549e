"""A detector to a verified ONNX model."""

from __future__ import annotations

import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import onnx
import onnx_ir as ir
import torch
from torch.export import Dim

from .. import __version__
from ..artifact import CANNOT_TELL, FAILED, METADATA_KEY, NO_DIGEST, seal
from ..errors import LiteDetrError
from ..files import replaced_when_done
from ..model.deployed import OUTPUTS, PROBES, Deployed
from ..model.detector import Detector
from ..model.resnet import folded
from ..ops import schema, torch_op
from ..runtime.session import OnnxSession
from ..verify.onnx import check_weights, verify_onnx
from ..verify.verdict import Verdict
from . import graph, limits, quantize
from . import precision as types
from .limits import Int8


@dataclass
class ExportReport:
    """What was made; `<path>.json` beside the model holds the same."""

    path: str
    size_bytes: int
    seconds: float
    attention_nodes: int
    nodes: dict[str, int]  # how many are half, float and int8, and the casts between the first two
    metadata: dict
    verdict: Verdict
    sensitivity: list[dict] = field(default_factory=list)  # see quantize.sensitivity

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the file; one that was not to be verified passes."""
        return self.verdict.status not in (FAILED, CANNOT_TELL)

    def to_dict(self) -> dict:
        return {**asdict(self), "verdict": self.verdict.to_dict(), "passed": self.passed}


def export_onnx(
    model: Detector, path: str | os.PathLike, attention: str = "op", precision: str = "fp32",
    image_size: tuple[int, int] | None = (800, 1333), outputs: str = "detections", pixel_mask: bool = False,
    opset: int = 17, int8: Int8 | None = None, calibration=None, verify: bool = True, images: Sequence | None = None,
    keep_fp32: Sequence[str] = (), progress: Callable[[str], None] = lambda stage: None, target: str = "gpu",
) -> ExportReport:  # fmt: skip
    """Write `model` as ONNX, check the file and compare it with PyTorch.

    A comparison that failed is no error: see `verdict` and `passed` of the report.  Bad options, and weights that
    are not float32, raise LiteDetrError; weights that are not finite raise CheckFailed.

    Args:
        model: as `load_model` returns it.
        path: of the file; it and `<path>.json` beside it appear complete or not at all.
        attention: 'op' writes one node of the domain `litedetr` for every deformable attention; 'gather' and
            'gridsample' write standard ONNX ops.
        precision: 'fp32'; 'fp16' and 'bf16' store in half what is safe in it and keep the islands that
            `precision.ISLANDS` names in FP32; 'int8' quantizes the layers that tolerate it, and elsewhere is 'fp16'
            for the target 'gpu' and FP32 for the target 'cpu'.
        image_size: (height, width) in pixels, or None for dynamic sizes.  The batch is always dynamic.
        outputs: 'detections' (labels, boxes in pixels, scores) or 'raw' (pred_logits, pred_boxes).
        pixel_mask: whether the graph takes a mask of the padding.
        opset: of ONNX; 'bf16' raises it to 22, 'int8' to 19.
        int8, calibration: how to quantize, for precision 'int8'; `calibration` is short for `Int8(images=calibration)`.
        verify, images: whether to compare the file with PyTorch, and with which images (paths, PIL images or arrays);
            None: the package draws one.
        keep_fp32: names of further modules or nodes to keep in FP32, with shell patterns: 'detector.backbone.layer4'.
        progress: called with the name of each stage as it begins.
        target: 'gpu' (TensorRT) or 'cpu' (ONNX Runtime and OpenVINO), which differ in INT8.
    """
    if calibration is not None:
        if int8 is not None:
            raise LiteDetrError("calibration and int8 are both given: put the images into Int8(images=...).")
        int8 = Int8(calibration)
    limits.check(attention, precision, image_size, outputs, opset, int8, target)
    if image_size is not None:
        limits.check_tokens(*image_size, model.config.num_queries, model.config.num_levels)
    check_weights(model)
    path, int8 = Path(path), int8 or Int8()
    table, calibration = path.with_suffix(".calibration.json"), None
    if int8.images is not None:
        calibration = quantize.Calibration(int8.chosen(), image_size, pixel_mask, outputs)
    elif precision == "int8" and not table.is_file():
        raise quantize.needs_images(table, "does not exist")
    start = time.monotonic()
    with replaced_when_done(path) as temporary, replaced_when_done(path.with_suffix(".json")) as temporary_json:
        progress("trace the model")
        program, inputs = _trace(model, image_size, outputs, pixel_mask)
        progress("translate to ONNX")
        onnx_model = _translate(program, attention, inputs, list(dict.fromkeys(OUTPUTS[outputs] + PROBES)))
        progress("optimise the graph")
        if target == "gpu":
            opset = max(opset, limits.TYPED_OPSET.get(precision, opset))
        graph.finish(onnx_model, opset, OUTPUTS[outputs])
        ranking, left_out = [], []
        if precision == "int8":
            chosen = int8, calibration, table, keep_fp32, target, progress
            onnx_model, ranking, left_out = _quantize(onnx_model, model, *chosen)
        elif precision in types.HALVES:
            types.apply(onnx_model, precision, keep_fp32)
        nodes = sum(node.domain == schema.DOMAIN for node in onnx_model.graph)
        expected = model.config.attention_nodes if attention == "op" else 0
        if nodes != expected:  # torch's exporter has dropped custom ops silently before
            raise LiteDetrError(
                f"the exported graph has {nodes} nodes of the domain {schema.DOMAIN!r} and the model {expected} "
                "deformable attentions: the exporter lost some. This is a bug in litedetr-deploy or in this version of "
                f"torch ({torch.__version__})."
            )
        metadata = {
            "tool_version": __version__, "op_version": schema.VERSION, "variant": model.config.name,
            "forced_variant": getattr(model, "forced_variant", None),  # what said otherwise and was overruled
            "attention": attention, "precision": precision, "target": target, "keep_fp32": list(keep_fp32),
            "int8_left_out": left_out,  # for the AP budget
            "nodes": types.count(onnx_model), "opset": opset, "image_size": image_size and list(image_size),
            "outputs": outputs, "pixel_mask": pixel_mask,
            "class_names": list(model.class_names) if model.class_names else None,
        }  # fmt: skip
        progress("write and check the file")
        _write(onnx_model, metadata, temporary)
        _check(temporary)
        verdict = Verdict(skipped="it was not asked for")
        if verify:
            verdict = verify_onnx(temporary, model, images, progress)
            progress("write the verdict into the file")
        metadata |= {"verification": verdict.summary(), "digest": NO_DIGEST}
        _write(onnx_model, metadata, temporary)
        seal(temporary)
        size, seconds = temporary.stat().st_size, round(time.monotonic() - start, 1)
        report = ExportReport(str(path), size, seconds, nodes, metadata["nodes"], metadata, verdict, ranking)
        temporary_json.write_text(json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    return report


def _quantize(onnx_model: ir.Model, model: Detector, int8: Int8, calibration, table: Path, keep_fp32, target, progress):
    """Return the quantized graph, the ranking of the layers where asked for, and the layers left out for the AP."""
    layers, ranking = quantize.layers(onnx_model.graph, keep_fp32, target), []
    ranges = quantize.load_or_calibrate(onnx_model, layers, calibration, int8.method, table, progress, target)

    def typed(names: Sequence[str]) -> ir.Model:
        quantized = quantize.apply(onnx_model, names, ranges, target)
        if target == "gpu":
            types.apply(quantized, "int8", keep_fp32)
        return quantized

    chosen = layers
    if int8.ranks:
        progress(f"quantize each of {len(layers)} layers alone")
        ranking = quantize.sensitivity(model, onnx_model.graph, layers, ranges, calibration, target)
    if int8.ap_budget is not None:
        progress("AP in FP32")
        wanted = _ap(onnx_model, model, int8.ap_of) - int8.ap_budget
        chosen = quantize.within_budget(ranking, lambda names: _ap(typed(names), model, int8.ap_of), wanted, progress)
    progress("quantize")
    return typed(chosen), ranking, [name for name in layers if name not in chosen]


def _ap(onnx_model: ir.Model, model: Detector, ap_of: Callable[[OnnxSession], float]) -> float:
    """Return the AP (0..1) of a graph in ONNX Runtime on the CPU."""
    session = OnnxSession(ir.to_proto(onnx_model).SerializeToString())
    session.metadata["class_names"] = list(model.class_names) if model.class_names else None
    return ap_of(session)


def _trace(model: Detector, image_size, outputs: str, pixel_mask: bool):
    """Return the model as an exported program, and the names of its inputs."""
    model = folded(model)
    batch = 2  # torch.export takes a size of 1 for a constant
    # Any size will do where sizes are dynamic; unlike sides keep height and width apart.
    height, width = image_size or (256, 320)
    inputs = {"images": torch.zeros(batch, 3, height, width)}
    if outputs == "detections":
        inputs["orig_target_sizes"] = torch.tensor([[width, height]]).repeat(batch, 1)
    if pixel_mask:
        inputs["pixel_mask"] = torch.zeros(batch, height, width, dtype=torch.bool)
    sides = {} if image_size else {"images": (2, 3), "pixel_mask": (1, 2)}
    dynamic = {name: dict.fromkeys((0, *sides.get(name, ())), Dim.DYNAMIC) for name in inputs}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about itself
        program = torch.export.export(Deployed(model, outputs).eval(), (), inputs, dynamic_shapes=dynamic, strict=False)
    return program, list(inputs)


def _translate(program, attention: str, input_names: list[str], output_names: list[str]) -> ir.Model:
    # It warns about torchvision's ops, of which the detectors have none.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            program, (), dynamo=True, opset_version=graph.TRACE_OPSET, optimize=False, verbose=False,
            custom_translation_table=torch_op.onnx_translations(attention),
            input_names=input_names, output_names=output_names,
        ).model  # fmt: skip


def _write(model: ir.Model, metadata: dict, path: Path) -> None:
    model.metadata_props[METADATA_KEY] = json.dumps(metadata, allow_nan=False)
    model.producer_name, model.producer_version = "litedetr-deploy", __version__
    ir.save(model, path)


def _check(path: Path) -> None:
    """Run onnx's checker, and infer type and shape of every output."""
    onnx.checker.check_model(path)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
    for output in inferred.graph.output:
        kind = output.type.tensor_type
        if not kind.elem_type or not kind.HasField("shape"):
            raise LiteDetrError(
                f"the exported graph's output {output.name!r} has no type or shape: a bug, please report."
            )
