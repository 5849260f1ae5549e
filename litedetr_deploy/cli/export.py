"""litedetr export: a checkpoint to a verified ONNX model."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import LiteDetrError
from ..export import limits
from . import _checks
from ._console import Stages, guarded, print_json, print_verification, stdout_console
from ._recipe import Recipe


@guarded
def export(
    checkpoint: Annotated[
        str,
        typer.Argument(
            help="Trained weights: .pth or .safetensors; or the name of those that come with this package, "
            "lite-dino-shapes."
        ),
    ],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX model to write.")],
    variant: Annotated[
        str | None,
        typer.Option(help="What the checkpoint holds, as in lite-dino-r50-h3l1-2+1x3; found out where it can be."),
    ] = None,
    attention: Annotated[
        str, typer.Option(help="op: the fused op of this package's library; gather, gridsample: standard ONNX ops.")
    ] = "op",
    image_size: Annotated[str, typer.Option(help="Input size in pixels, HEIGHTxWIDTH, or 'dynamic'.")] = "800x1333",
    outputs: Annotated[
        str, typer.Option(help="detections: labels, boxes, scores; raw: logits and boxes of all queries.")
    ] = "detections",
    pixel_mask: Annotated[
        bool, typer.Option("--pixel-mask", help="Take a mask of the padding, for letterboxed images.")
    ] = False,
    precision: Annotated[
        str,
        typer.Option(
            help="fp32; fp16 or bf16, with what needs more kept in FP32; int8 of what bears it, and fp16 elsewhere."
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
            help="Directory of pictures like those that the model will see, for int8.  Not given: what an earlier export "
            "found out of them."
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
            help="Leave as many of the worst layers out of int8 as it takes to lose no more AP (0..1) than this to FP32; "
            "measured on --data or --shapes."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="COCO folder for --ap-budget, as in evaluate.")] = None,
    shapes: Annotated[bool, typer.Option("--shapes", help="Take the drawn shapes for --ap-budget.")] = False,
    opset: Annotated[int, typer.Option(help="ONNX opset; int8 needs 19 and bf16 22, and use it.")] = 17,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Picture or directory of pictures to verify with; can be repeated.  Not given: drawn samples."
        ),
    ] = None,
    no_verify: Annotated[bool, typer.Option("--no-verify", help="Do not compare the model with PyTorch.")] = False,
    recipe: Recipe = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
):
    """Export a checkpoint to ONNX and prove the model equal to PyTorch."""
    size = _checks.image_size(image_size)
    calibrates = calibration is not None or calibration_images is not None or sensitivity or ap_budget is not None
    limits.check(attention, precision, size, outputs, opset, calibrates, calibration_method)
    if data and shapes:
        raise LiteDetrError("--data and --shapes are both given, and AP is measured on one of them: leave one out.")
    if ap_budget is not None:
        limits.check_budget(ap_budget, data or shapes or None)
    elif data or shapes:
        raise LiteDetrError("--data and --shapes are what --ap-budget is measured on: give that too.")
    _checks.checkpoint(checkpoint)
    _checks.writable_model(output)
    files = _checks.image_files(images)
    pictures = None if calibration is None else limits.calibration_images(calibration, calibration_images)

    with Stages() as stage:
        stage("load PyTorch and the checkpoint")
        import litedetr_deploy as ld

        model = ld.load_model(checkpoint, variant)
        dataset = None
        if ap_budget is not None:
            from ..evaluate.data import drawn_shapes, read_coco

            stage("draw the shapes" if shapes else "read the annotations")
            dataset = drawn_shapes() if shapes else read_coco(data)
        report = ld.export_onnx(
            model,
            output,
            attention=attention,
            precision=precision,
            image_size=size,
            outputs=outputs,
            pixel_mask=pixel_mask,
            opset=opset,
            calibration=pictures,
            verify=not no_verify,
            images=files,
            keep_fp32=keep_fp32 or (),
            calibration_images=calibration_images,
            calibration_method=calibration_method,
            sensitivity=sensitivity,
            ap_budget=ap_budget,
            ap_data=dataset,
            progress=stage,
        ).to_dict()

    if as_json:
        print_json(report)
    else:
        if report["verification"]:
            print_verification(report["verification"])
        if report["sensitivity"]:
            _print_sensitivity(report["sensitivity"])
        nodes = report["attention_nodes"]
        print(
            f"{report['path']}: {report['size_bytes'] / 1e6:.1f} MB, "
            f"{f'{nodes} attention nodes' if nodes else 'standard ONNX ops only'}, made in {report['seconds']:.0f} s; "
            f"{_verdict(report)}"
        )
        if precision != "fp32":
            counts = report["nodes"]
            print(
                f"{precision}: {counts['int8']} nodes in INT8, {counts['half']} in half, {counts['float']} in FP32; "
                f"{counts['casts']} casts"
            )
        if left_out := report["metadata"]["int8_left_out"]:
            print(f"left out of INT8 for the AP budget: {', '.join(left_out)}")
    if not report["passed"]:
        raise typer.Exit(1)


def _verdict(report):
    if not report["verification"]:
        return "not verified"
    return "verified against PyTorch" if report["passed"] else "VERIFICATION FAILED: it does not agree with PyTorch"


def _print_sensitivity(rows):
    from rich import box
    from rich.markup import escape
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading, align in (("layer, quantized alone", "left"), ("logits, relative", "right"), ("boxes, mean", "right")):
        table.add_column(heading, justify=align, no_wrap=True)
    for row in rows:
        table.add_row(escape(row["layer"]), f"{row['logits']:.1e}", f"{row['boxes']:.1e}")
    stdout_console().print(table)
