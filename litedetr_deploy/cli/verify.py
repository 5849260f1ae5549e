"""litedetr verify: does an artifact still compute what the model computes that it was made from?"""

from pathlib import Path

from ..artifact import check_file
from . import _checks
from ._console import Stages, finish, print_verdict


def verify(
    artifact: Path,
    against: str,
    variant: str | None = None,
    force_variant: bool = False,
    images: list[Path] | None = None,
    runtime: str | None = None,
    verbose: bool = False,
    as_json: bool = False,
):
    """Compare an ONNX model with PyTorch, or an engine with its ONNX model, on this machine."""
    check_file(artifact, "the model")
    _checks.checkpoint(against)
    files = _checks.image_files(images)
    with Stages() as stage:
        import litedetr_deploy as ld

        verdict = ld.verify(artifact, against, files, variant, force_variant, stage, runtime).to_dict()
    finish(verdict, as_json, verdict["passed"], print_verdict, verbose)
