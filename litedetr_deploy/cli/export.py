"""litedetr export: a checkpoint to a verified ONNX model."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LiteDetrError, printable
from ..export import limits
from . import _checks
from ._console import Stages, escaped, guarded, new_table, print_json, print_verdict, stdout_console
from ._options import AsJson, Checkpoint, Data, ForceVariant, Images, ImageSize, NoVerify, Shapes, Variant, Verbose
from ._recipe import Recipe


@guarded
def export(
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX model to write.")],
    variant: Variant = None,
    force_variant: ForceVariant = False,
    attention: Annotated[
        str, typer.Option(help="op: the fused op of this package's library; gather, gridsample: standard ONNX ops.")
    ] = "op",
    image_size: ImageSize = "800x1333",
    outputs: Annotated[
        str, typer.Option(help="detections: labels, boxes, scores; raw: logits and boxes of all queries.")
    ] = "detections",
    pixel_mask: Annotated[
        bool, typer.Option("--pixel-mask", help="Take a mask of the padding, for letterboxed images.")
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            help="fp32; fp16 or bf16, with what needs more kept in FP32; int8 for the layers that tolerate it, fp16 "
            "for the others."
        ),
    ] = "fp32",
    keep_fp32: Annotated[
        list[str] | None,
        typer.Option(
            help="Module or node to keep in FP32 as well, with shell patterns: detector.backbone.layer4; can be "
            "repeated."
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            help="For int8: directory of images like those that the model will see.  Not given: what an earlier export "
            "found out from them."
        ),
    ] = None,
    calibration_images: Annotated[
        int | None, typer.Option(help="How many of them to use; by default all, or 128 of more.")
    ] = None,
    calibration_method: Annotated[
        str, typer.Option(help="percentile, minmax or entropy.")
    ] = limits.CALIBRATION_METHODS[0],
    sensitivity: Annotated[
        bool, typer.Option("--sensitivity", help="Rank the layers by what quantizing each alone does.")
    ] = False,
    ap_budget: Annotated[
        float | None,
        typer.Option(
            help="Leave as many of the worst layers out of int8 as it takes to lose no more AP (0..1) than this to "
            "FP32; measured on --data or --shapes."
        ),
    ] = None,
    data: Data = None,
    shapes: Shapes = False,
    opset: Annotated[int, typer.Option(help="ONNX opset; int8 needs 19 and bf16 22, and use it.")] = 17,
    images: Images = None,
    no_verify: NoVerify = False,
    recipe: Recipe = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
):
    """Export a checkpoint to ONNX and prove the model equal to PyTorch."""
    if data and shapes:
        raise LiteDetrError("--data and --shapes are both given, and AP is measured on one of them: leave one out.")
    if (data or shapes) and ap_budget is None:
        raise LiteDetrError("--data and --shapes are what --ap-budget is measured on: give that too.")
    int8 = limits.Int8(
        calibration, calibration_images, calibration_method, sensitivity, ap_budget,
        (lambda session: ld.evaluate(session, dataset).metrics["AP"]) if data or shapes else None,
    )  # fmt: skip
    size = _checks.image_size(image_size)
    limits.check(attention, precision, size, outputs, opset, None if int8 == limits.Int8() else int8)
    _checks.checkpoint(checkpoint)
    _checks.writable_model(output)
    files = _checks.image_files(images)

    with Stages() as stage:
        stage("load PyTorch and the checkpoint")
        import litedetr_deploy as ld

        if data or shapes:
            from ..evaluate.data import open_data

            dataset = open_data(data or "shapes")
        model = ld.load_model(checkpoint, variant, force_variant)
        report = ld.export_onnx(
            model, output, attention, precision, size, outputs, pixel_mask, opset,
            int8=None if int8 == limits.Int8() else int8, verify=not no_verify, images=files,
            keep_fp32=keep_fp32 or (), progress=stage,
        ).to_dict()  # fmt: skip

    if as_json:
        print_json(report)
    else:
        _print(report, verbose)
    if not report["passed"]:
        raise typer.Exit(1)


def _print(report, verbose):
    if report["sensitivity"]:
        table = new_table("layer, quantized alone", "logits, relative", "boxes, mean")
        for row in report["sensitivity"]:
            table.add_row(escaped(row["layer"]), f"{row['logits']:.1e}", f"{row['boxes']:.1e}")
        stdout_console().print(table)
    metadata, counts, attentions = report["metadata"], report["nodes"], report["attention_nodes"]
    print(
        f"{printable(report['path'])}: {report['size_bytes'] / 1e6:.1f} MB, "
        f"{f'{attentions} attention nodes' if attentions else 'standard ONNX ops only'}, made in "
        f"{report['seconds']:.0f} s"
    )
    if metadata["precision"] != "fp32":
        print(
            f"{metadata['precision']}: {counts['int8']} nodes in INT8, {counts['half']} in half, {counts['float']} in "
            f"FP32; {counts['casts']} casts"
        )
    if left_out := metadata["int8_left_out"]:
        print(f"left out of INT8 for the AP budget: {', '.join(left_out)}")
    print_verdict(report["verdict"], verbose)
