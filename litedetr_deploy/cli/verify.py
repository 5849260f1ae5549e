"""litedetr verify: does an ONNX model still compute what its checkpoint computes in PyTorch?"""

from pathlib import Path
from typing import Annotated

import typer

from . import _checks
from ._console import Stages, guarded, print_json, print_verification


@guarded
def verify(
    model: Annotated[Path, typer.Argument(help="ONNX model that `litedetr export` made.")],
    checkpoint: Annotated[str, typer.Argument(help="The weights that it was made from.")],
    variant: Annotated[str | None, typer.Option(help="As in export; by default the model's own.")] = None,
    images: Annotated[
        list[Path] | None,
        typer.Option(
            help="Picture or directory of pictures to verify with; can be repeated.  Not given: drawn samples."
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
):
    """Compare an ONNX model with PyTorch, on this machine."""
    _checks.readable_file(model, "model")
    _checks.checkpoint(checkpoint)
    files = _checks.image_files(images)

    with Stages() as stage:
        stage("load the model")
        from ..runtime.session import OnnxSession

        # Before torch: a damaged model is reported at once, and the model knows its variant.
        variant = variant or OnnxSession(model).metadata.get("variant")
        stage("load PyTorch and the checkpoint")
        import litedetr_deploy as ld

        from ..verify.onnx import verify_onnx

        report = verify_onnx(model, ld.load_model(checkpoint, variant), images=files, progress=stage).to_dict()

    if as_json:
        print_json(report)
    else:
        print_verification(report["verification"])
        print(f"{model}: " + ("agrees with PyTorch" if report["passed"] else "DOES NOT AGREE with PyTorch"))
    if not report["passed"]:
        raise typer.Exit(1)
