"""Exported models and PyTorch's outputs, made when they are needed and kept in a folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from .. import __version__
from ..artifact import sha256
from ..errors import LiteDetrError
from ..model.config import parse_variant
from ..verify.reference import Reference, Weights, make_image, make_reference
from .packages import is_installed
from .plan import Spec, artifact_metadata

_sha256 = functools.cache(sha256)


class Cache:
    """Exported models and PyTorch's outputs in a folder, which serves on a machine without PyTorch as well.

    checkpoint: the weights that artifacts were made from, as `Weights.source`; variant: of a checkpoint that cannot
        tell; build: makes an engine of a graph, given both paths and the batch; progress: called with what is made.
    """

    def __init__(
        self, folder: Path, checkpoint: str | None = None, variant: str | None = None,
        build: Callable[[Path, Path, int], object] | None = None,
    ):  # fmt: skip
        self.folder, self.checkpoint, self.chosen_variant, self._build = folder, checkpoint, variant, build
        self.progress: Callable[[str], None] = lambda stage: None
        self._weights: dict[str, Weights] = {}
        self._references: dict[Path, Reference] = {}

    def graph(self, spec: Spec) -> Path:
        """Return the path of the ONNX model; an artifact is its own."""
        made = f"{spec.way.attention}-{spec.precision}.onnx"
        return Path(spec.model) if spec.is_artifact else self.folder / f"{_stem(spec.model, spec.image_size)}-{made}"

    def model_path(self, spec: Spec) -> Path:
        graph, is_built = self.graph(spec), spec.way.engine == "tensorrt" and not spec.is_artifact
        return graph.with_name(f"{graph.stem}-batch{spec.batch}.plan") if is_built else graph  # best for this batch

    def reference_path(self, spec: Spec) -> Path:
        """Return the path of PyTorch's outputs; of an artifact of unknown weights, of its image alone."""
        return self.folder / f"{_stem(self.weights_name(spec) or 'image', spec.image_size)}.npz"

    def weights_name(self, spec: Spec) -> str | None:
        """Return what `Weights` takes; None for an artifact of unknown weights."""
        return self.checkpoint if spec.is_artifact else spec.model

    def prepare(self, specs: Iterable[Spec]) -> list[Path]:
        """Make everything that measuring needs but engines; return the files."""
        files = []
        for spec in specs:
            files += [self.reference(spec).path, *([] if spec.way.engine == "pytorch" else [self._export(spec)])]
        return list(dict.fromkeys(files))

    def engine(self, spec: Spec) -> tuple:
        """Return the arguments of `open_engine`, in another process too: of the weights the name, not the tensors."""
        weights = dataclasses.replace(self.weights(spec)) if spec.way.engine == "pytorch" else None
        return spec, self.model(spec), self.reference(spec).path, weights

    def variant(self, spec: Spec) -> str | None:
        """Return the name of the detector; None for a checkpoint, and where an artifact does not tell."""
        with contextlib.suppress(LiteDetrError):
            if spec.is_artifact:
                return artifact_metadata(Path(spec.model)).get("variant")
            if self.weights(spec).random:
                return parse_variant(spec.model).name
        return None

    def weights(self, spec: Spec) -> Weights | None:
        source = self.weights_name(spec)
        if source is not None and source not in self._weights:
            known = self.variant(spec) if spec.is_artifact else None
            self._weights[source] = Weights(source, self.chosen_variant or known)
        return self._weights.get(source)

    def reference(self, spec: Spec) -> Reference:
        """Return PyTorch's outputs, with the tolerances of the spec's precision, made where they are not there yet."""
        path, weights = self.reference_path(spec), self.weights(spec)
        reference = self._references.get(path)
        if reference is None and path.is_file():
            reference = Reference(path, weights if is_installed("torch") else None)
        there = reference.precisions if reference else ()
        if spec.precision not in there:
            path.parent.mkdir(parents=True, exist_ok=True)
            if weights is None:
                return make_image(path, spec.image_size)
            self.progress(f"{spec.model}: PyTorch's outputs at {spec.image_size[0]}x{spec.image_size[1]}")
            reference = make_reference(path, weights, spec.image_size, dict.fromkeys((*there, "fp32", spec.precision)))
        self._references[path] = reference
        return reference

    def model(self, spec: Spec) -> Path:
        """Return the artifact; exported, and built, where it is not there yet.  PyTorch reads none."""
        path = self.model_path(spec)
        if spec.way.engine != "pytorch" and not path.is_file():
            graph = self._export(spec)
            if path != graph and self._build:
                self.progress(f"{spec.model}: build the engine")
                self._build(graph, path, spec.batch)
        return path

    def _export(self, spec: Spec) -> Path:
        path = self.graph(spec)
        if not path.is_file():
            from ..export.export import export_onnx

            path.parent.mkdir(parents=True, exist_ok=True)
            self.progress(f"{spec.model}: export, attention {spec.way.attention}, {spec.precision}")
            # Not verified here: what is timed is checked before, in the engine that is timed.
            export_onnx(self.weights(spec).model, path, spec.way.attention, spec.precision, spec.image_size,
                        outputs="raw", verify=False)  # fmt: skip
        return path


def _stem(weights: str, image_size: tuple[int, int]) -> str:
    path = Path(weights)
    digest = _sha256(path)[:10] if path.is_file() else "random"
    name = re.sub(r"[^\w+.-]", "_", path.stem if path.is_file() else weights)
    return f"{name}-{digest}-{image_size[0]}x{image_size[1]}-{sources_digest()}"


@functools.cache
def sources_digest() -> str:
    """Return a digest of the code that makes a model what it is: what other code exported is not measured."""
    folders = [Path(__file__).parents[1] / part for part in ("model", "ops", "export")]
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return hashlib.sha256(__version__.encode() + b"".join(path.read_bytes() for path in files)).hexdigest()[:8]
