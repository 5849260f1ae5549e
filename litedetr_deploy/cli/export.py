"""litedetr export: a checkpoint to a verified ONNX model."""

from pathlib import Path

from ..errors import LiteDetrError, printable
from ..export import limits
from . import _checks
from ._console import Stages, escaped, finish, new_table, print_verdict, stdout_console
from ._options import Recipe


def export(
    checkpoint: str,
    output: Path,
    variant: str | None = None,
    force_variant: bool = False,
    attention: str = "op",
    image_size: str = "800x1333",
    outputs: str = "detections",
    pixel_mask: bool = False,
    precision: str = "fp32",
    target: str = "gpu",
    keep_fp32: list[str] | None = None,
    calibration: Path | None = None,
    calibration_images: int | None = None,
    calibration_method: str = limits.CALIBRATION_METHODS[0],
    sensitivity: bool = False,
    ap_budget: float | None = None,
    data: Path | None = None,
    shapes: bool = False,
    opset: int = 17,
    images: list[Path] | None = None,
    no_verify: bool = False,
    recipe: Recipe = None,
    verbose: bool = False,
    as_json: bool = False,
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
    asked = None if int8 == limits.Int8() else int8
    limits.check(attention, precision, size, outputs, opset, asked, target)
    _checks.checkpoint(checkpoint)
    if output.suffix.lower() != ".onnx":
        raise LiteDetrError(f"The output is {output}; its name must end in .onnx.")
    if output.is_dir():
        raise LiteDetrError(f"The output {output} is a directory. Give the name of a file.")
    _checks.writable_directory(output.parent)
    files = _checks.image_files(images)

    with Stages() as stage:
        stage("load PyTorch and the checkpoint")
        import litedetr_deploy as ld

        if data or shapes:
            from ..evaluate.data import open_data

            dataset = open_data(data or "shapes")
        model = ld.load_model(checkpoint, variant, force_variant)
        report = ld.export_onnx(
            model, output, attention, precision, size, outputs, pixel_mask, opset, asked, verify=not no_verify,
            images=files, keep_fp32=keep_fp32 or (), progress=stage, target=target,
        ).to_dict()  # fmt: skip

    finish(report, as_json, report["passed"], _print, verbose)


def _print(report, verbose):
    if report["sensitivity"]:
        table = new_table("layer, quantized alone", "logits, relative", "boxes, mean")
        for row in report["sensitivity"]:
            table.add_row(escaped(row["layer"]), f"{row['logits']:.1e}", f"{row['boxes']:.1e}")
        stdout_console().print(table)
    metadata, counts, attentions = report["metadata"], report["nodes"], report["attention_nodes"]
    ops = f"{attentions} attention nodes" if attentions else "standard ONNX ops only"
    print(f"{printable(report['path'])}: {report['size_bytes'] / 1e6:.1f} MB, {ops}, made in {report['seconds']:.0f} s")
    if metadata["precision"] != "fp32":
        nodes = f"{counts['int8']} nodes in INT8, {counts['half']} in half, {counts['float']} in FP32"
        print(f"{metadata['precision']}: {nodes}; {counts['casts']} casts")
    if left_out := metadata["int8_left_out"]:
        print(f"left out of INT8 for the AP budget: {', '.join(left_out)}")
    print_verdict(report["verdict"], verbose)
