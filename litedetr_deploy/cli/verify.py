"""litedetr verify: does an artifact still compute what the model computes that it was made from?"""

from pathlib import Path
from typing import Annotated

import typer

from . import _checks
from ._console import Stages, guarded, print_json, print_verdict
from ._options import AsJson, ForceVariant, Images, Variant, Verbose


@guarded
def verify(
    artifact: Annotated[
        Path, typer.Argument(help="ONNX model that `litedetr export` made, or engine that `litedetr build` made.")
    ],
    against: Annotated[
        str, typer.Argument(help="The weights that the ONNX model was made from; or the ONNX model of an engine.")
    ],
    variant: Variant = None,
    force_variant: ForceVariant = False,
    images: Images = None,
    verbose: Verbose = False,
    as_json: AsJson = False,
):
    """Compare an ONNX model with PyTorch, or an engine with its ONNX model, on this machine."""
    _checks.readable_file(artifact, "model")
    _checks.checkpoint(against)
    files = _checks.image_files(images)
    with Stages() as stage:
        import litedetr_deploy as ld

        verdict = ld.verify(artifact, against, files, variant, force_variant, stage).to_dict()
    if as_json:
        print_json(verdict)
    else:
        print_verdict(verdict, verbose)
    if not verdict["passed"]:
        raise typer.Exit(1)
