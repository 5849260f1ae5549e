"""A detector to a verified ONNX model."""

from __future__ import annotations

import copy
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
from ..artifact import METADATA_KEY
from ..errors import LiteDetrError
from ..evaluate.data import Dataset
from ..files import replaced_when_done
from ..model.deployed import OUTPUTS, PROBES, Deployed
from ..model.detector import Detector
from ..model.resnet import fold_frozen_batch_norm
from ..ops import schema, torch_op
from ..runtime.session import OnnxSession
from ..verify.onnx import verify_onnx
from . import graph, limits, quantize
from . import precision as types

TRACE_BATCH = 2  # torch.export takes a size of 1 for a constant


@dataclass
class ExportReport:
    path: str
    size_bytes: int
    seconds: float
    attention_nodes: int
    nodes: dict[str, int]  # how many are half, float and int8, and the casts between the first two
    metadata: dict
    verification: list[dict] = field(default_factory=list)
    sensitivity: list[dict] = field(default_factory=list)  # see quantize.sensitivity

    @property
    def passed(self) -> bool:
        return all(row["passed"] for row in self.verification)

    def to_dict(self) -> dict:
        return {**asdict(self), "passed": self.passed}


def export_onnx(
    model: Detector,
    path: str | os.PathLike,
    attention: str = "op",
    precision: str = "fp32",
    image_size: tuple[int, int] | None = (800, 1333),
    outputs: str = "detections",
    pixel_mask: bool = False,
    opset: int = 17,
    calibration=None,
    verify: bool = True,
    images=None,
    keep_fp32: Sequence[str] = (),
    calibration_images: int | None = None,
    calibration_method: str = limits.CALIBRATION_METHODS[0],
    sensitivity: bool = False,
    ap_budget: float | None = None,
    ap_data: Dataset | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> ExportReport:
    """Writes `model` as ONNX, checks the file and compares it with PyTorch.

    attention: 'op' writes one node of the domain `litedetr` for every deformable attention; 'gather' and
        'gridsample' write standard ONNX ops.
    precision: 'fp32'; 'fp16' and 'bf16' store in half what is safe in it and keep the islands that `precision.ISLANDS`
        names in FP32; 'int8' quantizes the layers that bear it and is 'fp16' elsewhere.  'bf16' raises the opset to
        22, 'int8' to 19.
    keep_fp32: names of further modules or nodes to keep in FP32, with shell patterns: 'detector.backbone.layer4'.
    image_size: (height, width), or None for dynamic sizes.  The batch is always dynamic.
    outputs: 'detections' (labels, boxes in pixels, scores) or 'raw' (pred_logits, pred_boxes).
    pixel_mask: whether the graph takes a mask of the padding.
    calibration: for 'int8', a folder of pictures like those the model will see, or pictures (paths, PIL images or
        arrays).  What they give is kept in `<path>.calibration.json`, and used again as long as the model, the
        pictures and the method are the same; None uses that file alone.
    calibration_images: how many of them to use; None: all, or 128 of more.
    calibration_method: 'percentile', 'minmax' or 'entropy'.
    sensitivity: whether to rank the layers by what quantizing each alone does (the report's `sensitivity`).
    ap_budget: for 'int8', how much AP (0..1) may be lost to FP32 on `ap_data` (see `evaluate.data`): the layers that
        `sensitivity` ranks as the worst stay 'fp16' until no more is.
    images: pictures to verify with (paths, PIL images or arrays); None: the package draws some.
    progress: called with the name of each stage as it begins.

    The file and `<path>.json` beside it appear complete or not at all.  Raises LiteDetrError for wishes that cannot
    be met; a failed comparison is not an error: see the report's `passed`.
    """
    sensitivity = sensitivity or ap_budget is not None
    calibrates = calibration is not None or calibration_images is not None or sensitivity
    if ap_budget is not None:
        limits.check_budget(ap_budget, ap_data)
    limits.check(attention, precision, image_size, outputs, opset, calibrates, calibration_method)
    limits.check_tokens(image_size, model.config.num_queries, model.config.num_levels)
    path = Path(path)
    table, pictures = path.with_suffix(".calibration.json"), None
    if calibration is not None:
        chosen = limits.calibration_images(calibration, calibration_images)
        pictures = quantize.Pictures(chosen, image_size, pixel_mask, outputs)
    elif calibrates:
        raise LiteDetrError("sensitivity and a number of calibration images need the images: give a folder of them.")
    elif precision == "int8":
        quantize.check_table(table)
    start = time.monotonic()
    with replaced_when_done(path) as temporary, replaced_when_done(path.with_suffix(".json")) as temporary_json:
        progress("trace the model")
        program, input_names = _trace(model, image_size, outputs, pixel_mask)
        progress("translate to ONNX")
        onnx_model = _translate(program, attention, input_names, list(dict.fromkeys(OUTPUTS[outputs] + PROBES)))
        progress("optimise the graph")
        opset = max(opset, limits.TYPED_OPSET.get(precision, opset))
        graph.finish(onnx_model, opset, OUTPUTS[outputs], _symbols(onnx_model))
        ranking, left_out = [], []
        if precision == "int8":
            layers = quantize.layers(onnx_model.graph, keep_fp32)
            ranges = quantize.load_or_calibrate(onnx_model, layers, pictures, calibration_method, table, progress)
            if sensitivity:
                progress(f"quantize each of {len(layers)} layers alone")
                ranking = quantize.sensitivity(model, onnx_model.graph, layers, ranges, pictures)
            if ap_budget is not None:
                progress("AP in FP32")
                wanted = _ap(onnx_model, model, ap_data) - ap_budget
                chosen = quantize.within_budget(
                    ranking,
                    lambda chosen: _ap(_typed_int8(onnx_model, chosen, ranges, keep_fp32), model, ap_data),
                    wanted,
                    progress,
                )
                layers, left_out = chosen, [name for name in layers if name not in chosen]
            progress("quantize")
            onnx_model = _typed_int8(onnx_model, layers, ranges, keep_fp32)
        elif precision in types.HALVES:
            types.apply(onnx_model, precision, keep_fp32)
        nodes = _check_nodes(onnx_model, model.config.attention_nodes if attention == "op" else 0)
        metadata = {
            "tool_version": __version__,
            "op_version": schema.VERSION,
            "variant": model.config.name,
            "attention": attention,
            "precision": precision,
            "keep_fp32": list(keep_fp32),
            "int8_left_out": left_out,  # for the AP budget
            "nodes": types.count(onnx_model),
            "opset": opset,
            "image_size": list(image_size) if image_size else None,
            "outputs": outputs,
            "pixel_mask": pixel_mask,
            "class_names": list(model.class_names) if model.class_names else None,
        }
        report = ExportReport(str(path), 0, 0.0, nodes, metadata["nodes"], metadata, sensitivity=ranking)
        progress("write and check the file")
        _write(onnx_model, metadata, temporary)
        _check(temporary)
        if verify:
            verification = verify_onnx(temporary, model, images, progress)
            report.verification = verification.rows
            metadata["verification"] = verification.summary()
            progress("write the verdict into the file")
            _write(onnx_model, metadata, temporary)
        report.size_bytes = temporary.stat().st_size
        report.seconds = round(time.monotonic() - start, 1)
        temporary_json.write_text(json.dumps(report.to_dict(), indent=2) + "\n")
    return report


def _typed_int8(onnx_model: ir.Model, layers: Sequence[str], ranges: dict, keep_fp32: Sequence[str]) -> ir.Model:
    quantized = quantize.apply(onnx_model, layers, ranges)
    types.apply(quantized, "int8", keep_fp32)
    return quantized


def _ap(onnx_model: ir.Model, model: Detector, dataset: Dataset) -> float:
    """AP (0..1) of a graph in ONNX Runtime on the CPU."""
    from ..evaluate.evaluate import evaluate

    session = OnnxSession(ir.to_proto(onnx_model).SerializeToString())
    session.metadata["class_names"] = list(model.class_names) if model.class_names else None
    return evaluate(session, dataset).metrics["AP"]


def _symbols(onnx_model: ir.Model) -> dict[str, str]:
    """The trace's symbols of dynamic sizes -> the names that a user sees."""
    shape = onnx_model.graph.inputs[0].shape
    names = {0: "batch", 2: "height", 3: "width"}
    return {str(shape[i].value): name for i, name in names.items() if isinstance(shape[i], ir.SymbolicDim)}


def _check_nodes(onnx_model: ir.Model, expected: int) -> int:
    """torch's exporter has dropped custom ops silently before: count them."""
    nodes = graph.attention_nodes(onnx_model)
    if nodes != expected:
        raise LiteDetrError(
            f"the exported graph has {nodes} nodes of the domain {schema.DOMAIN!r} and the model {expected} deformable "
            "attentions: the exporter lost some. This is a bug in litedetr-deploy or in this version of torch "
            f"({torch.__version__})."
        )
    return nodes


def _trace(model: Detector, image_size, outputs: str, pixel_mask: bool):
    """The model as an exported program, and the names of its inputs."""
    model = copy.deepcopy(model)
    fold_frozen_batch_norm(model)
    deployed = Deployed(model, outputs).eval()
    # Any size will do where sizes are dynamic; unlike sides keep height and width apart.
    height, width = image_size or (256, 320)
    sizes = {} if image_size else {"height": Dim.DYNAMIC, "width": Dim.DYNAMIC}
    inputs = {"images": torch.zeros(TRACE_BATCH, 3, height, width)}
    dynamic = {"images": {0: Dim.DYNAMIC, **dict(zip((2, 3), sizes.values()))}}
    if outputs == "detections":
        inputs["orig_target_sizes"] = torch.tensor([[width, height]]).repeat(TRACE_BATCH, 1)
        dynamic["orig_target_sizes"] = {0: Dim.DYNAMIC}
    if pixel_mask:
        inputs["pixel_mask"] = torch.zeros(TRACE_BATCH, height, width, dtype=torch.bool)
        dynamic["pixel_mask"] = {0: Dim.DYNAMIC, **dict(zip((1, 2), sizes.values()))}
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer, about itself
        return torch.export.export(deployed, (), inputs, dynamic_shapes=dynamic, strict=False), list(inputs)


def _translate(program, attention: str, input_names: list[str], output_names: list[str]) -> ir.Model:
    # It warns about torchvision's ops, of which the detectors have none.
    logging.getLogger("torch.onnx._internal.exporter._registration").setLevel(logging.ERROR)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=graph.TRACE_OPSET,
            custom_translation_table=torch_op.onnx_translations(attention),
            input_names=input_names,
            output_names=output_names,
            optimize=False,
            verbose=False,
        ).model


def _write(model: ir.Model, metadata: dict, path: Path) -> None:
    model.metadata_props[METADATA_KEY] = json.dumps(metadata)
    model.producer_name, model.producer_version = "litedetr-deploy", __version__
    ir.save(model, path)


def _check(path: Path) -> None:
    """onnx's checker, and types and shapes of every output by its inference."""
    onnx.checker.check_model(path)
    inferred = onnx.shape_inference.infer_shapes(onnx.load(path), check_type=True, strict_mode=True)
    for output in inferred.graph.output:
        kind = output.type.tensor_type
        if not kind.elem_type or not kind.HasField("shape"):
            raise LiteDetrError(
                f"the exported graph's output {output.name!r} has no type or shape: a bug, please report."
            )
