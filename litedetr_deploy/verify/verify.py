"""Any artifact against what it was made from."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from ..artifact import ENGINE_SUFFIXES, check_file, load_onnx, onnx_metadata
from ..errors import LiteDetrError, not_installed
from .verdict import Verdict


def verify(
    artifact: str | os.PathLike,
    against,
    images: Sequence | None = None,
    variant: str | None = None,
    force_variant: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
    runtime: str | None = None,
) -> Verdict:
    """Compare an artifact with what it was made from, on this machine.

    Args:
        artifact: path of an ONNX model that `litedetr export` made, or of an engine that `litedetr build` made.
        against: for an ONNX model its weights: a checkpoint, the name of weights that come with the package, or what
            `load_model` returned.  For an engine: path of its ONNX model.
        images: to compare on, as `load_image` takes them; None: the package draws one.
        variant, force_variant: of a checkpoint, as `load_model` takes them; by default what the ONNX model says.
        progress: called with the name of each stage as it begins.
        runtime: what runs an ONNX model, as `open_session` takes it.
    """
    if Path(artifact).suffix.lower() in ENGINE_SUFFIXES:
        if runtime is not None:
            raise LiteDetrError(f"runtime is {runtime!r}, and TensorRT runs an engine. Leave it out.")
        return _verify_engine(artifact, against, images, progress)
    metadata = onnx_metadata(load_onnx(artifact, weights=False), artifact)  # before torch: damage is reported at once
    progress("load PyTorch and the checkpoint")
    try:
        from ..model.checkpoints import load_model
        from .onnx import verify_onnx
    except ImportError as error:
        raise (not_installed(error, "A comparison with PyTorch") or error) from error
    if isinstance(against, (str, os.PathLike)):
        force_variant = force_variant or (variant is None and bool(metadata.get("forced_variant")))
        against = load_model(os.fspath(against), variant or metadata.get("variant"), force_variant)
    return verify_onnx(artifact, against, images, progress, runtime)


def _verify_engine(engine, onnx, images, progress) -> Verdict:
    from ..runtime.session import OnnxSession
    from ..runtime.tensorrt import TensorRTSession, read_record
    from .engine import TOLERANCES, verify_engine

    if not isinstance(onnx, (str, os.PathLike)) or Path(onnx).suffix.lower() != ".onnx":
        raise LiteDetrError(
            f"{engine} is an engine, which is compared with the ONNX model that it was built from, and {onnx} is none. "
            "Give that model's path."
        )
    check_file(engine, "an engine that `litedetr build` made")
    record, reference = read_record(engine), OnnxSession(onnx)
    if "shapes" not in record:
        what = "was not built by `litedetr build`: nothing says which sizes it takes. Build it with that."
        raise LiteDetrError(f"{engine} {what}")
    precision = record["metadata"]["precision"]
    if precision == "bf16" or precision not in TOLERANCES:
        return Verdict("the ONNX model", "the engine", skipped=f"ONNX Runtime's CPU does not compute in {precision}")
    smallest, best, largest = record["shapes"]["images"]
    sizes = sorted({tuple(best[2:]), tuple(largest[2:])})
    with contextlib.closing(TensorRTSession(engine)) as session:
        return verify_engine(session, reference, precision, (smallest[0], largest[0]), sizes, images, progress)
