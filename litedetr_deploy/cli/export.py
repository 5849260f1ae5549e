"""litedetr export: a checkpoint to a verified ONNX model."""

from pathlib import Path
from typing import Annotated

import typer

from ..export import limits
from . import _checks
from ._console import Stages, guarded, print_json, print_verification


@guarded
def export(
    checkpoint: Annotated[Path, typer.Argument(help="Trained weights: .pth or .safetensors.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="The ONNX model to write.")],
    variant: Annotated[str | None, typer.Option(
        help="What the checkpoint holds, as in lite-dino-r50-h3l1-2+1x3; found out where it can be.")] = None,
    attention: Annotated[str, typer.Option(
        help="op: the fused op of this package's library; gather, gridsample: standard ONNX ops.")] = "op",
    image_size: Annotated[str, typer.Option(
        help="Input size in pixels, HEIGHTxWIDTH, or 'dynamic'.")] = "800x1333",
    outputs: Annotated[str, typer.Option(
        help="detections: labels, boxes, scores; raw: logits and boxes of all queries.")] = "detections",
    pixel_mask: Annotated[bool, typer.Option(
        "--pixel-mask", help="Take a mask of the padding, for letterboxed images.")] = False,
    opset: Annotated[int, typer.Option(help="ONNX opset.")] = 17,
    images: Annotated[list[Path] | None, typer.Option(
        help="Picture or directory of pictures to verify with; can be repeated.  Not given: drawn samples.")] = None,
    no_verify: Annotated[bool, typer.Option(
        "--no-verify", help="Do not compare the model with PyTorch.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
):
    """Export a checkpoint to ONNX and prove the model equal to PyTorch."""
    size = _checks.image_size(image_size)
    limits.check(attention, "fp32", size, outputs, opset)
    _checks.readable_file(checkpoint, "checkpoint")
    _checks.writable_model(output)
    files = _checks.image_files(images)

    with Stages() as stage:
        stage("load PyTorch and the checkpoint")
        import litedetr_deploy as ld

        model = ld.load_model(checkpoint, variant)
        report = ld.export_onnx(
            model, output, attention=attention, image_size=size, outputs=outputs, pixel_mask=pixel_mask,
            opset=opset, verify=not no_verify, images=files, progress=stage,
        ).to_dict()

    if as_json:
        print_json(report)
    else:
        if report["verification"]:
            print_verification(report["verification"])
        nodes = report["attention_nodes"]
        print(f"{report['path']}: {report['size_bytes'] / 1e6:.1f} MB, "
              f"{f'{nodes} attention nodes' if nodes else 'standard ONNX ops only'}, made in {report['seconds']:.0f} s; "
              f"{_verdict(report)}")
    if not report["passed"]:
        raise typer.Exit(1)


def _verdict(report):
    if not report["verification"]:
        return "not verified"
    return "verified against PyTorch" if report["passed"] else "VERIFICATION FAILED: it does not agree with PyTorch"
