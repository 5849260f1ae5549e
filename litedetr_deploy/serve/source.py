"""What a server must know of an artifact: inputs and outputs, whether it is proven, and its libraries."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .. import artifact
from ..errors import LiteDetrError
from ..files import check_writable
from ..ops import native, schema
from ..runtime.images import LONGEST_EDGE, SHORTEST_EDGE
from ..runtime.session import check_op_version
from ..runtime.tensorrt import read_record, record_path

MAX_BATCH_SIZE = 8  # where the model says nothing
# As ONNX or TensorRT name them.
_TYPES = {
    "FLOAT": "FP32", "FLOAT16": "FP16", "HALF": "FP16", "BFLOAT16": "BF16", "BF16": "BF16", "DOUBLE": "FP64",
    "BOOL": "BOOL", "INT8": "INT8", "UINT8": "UINT8", "INT32": "INT32", "INT64": "INT64",
}  # fmt: skip


@dataclass(frozen=True)
class Tensor:
    """An input or output of a model."""

    name: str
    kind: str  # Triton's, as in FP32
    shape: tuple[int, ...]  # -1 where a size varies


@dataclass(frozen=True)
class Source:
    """What of an artifact a configuration says."""

    path: Path
    metadata: dict
    inputs: Sequence[Tensor]
    outputs: Sequence[Tensor]
    # Of an engine: its record, with the smallest, best and largest shape of each input.
    record: dict = field(default_factory=dict)
    beside: Sequence[str] = ()  # files with weights, relative to the model's folder

    @property
    def uses_op(self) -> bool:
        return self.metadata.get("attention") == "op"

    @property
    def batched(self) -> bool:
        return all(tensor.shape[:1] == (-1,) for tensor in (*self.inputs, *self.outputs))

    @property
    def is_detector(self) -> bool:
        """Whether images go in and detections come out, as `litedetr export` makes both."""
        names = {tensor.name for tensor in self.inputs} - {"pixel_mask"}, {tensor.name for tensor in self.outputs}
        ours = names == ({"images", "orig_target_sizes"}, {"labels", "boxes", "scores"})
        return ours and self.batched and "fused_from" not in self.metadata

    def largest_batch(self, wanted: int | None) -> int:
        """Return how many images a server may run together; raise LiteDetrError where `wanted` are too many."""
        if wanted is not None and wanted < 1:
            raise LiteDetrError(f"max_batch_size is {wanted}; it must be 1 or more.")
        if not self.batched:
            if wanted is None:
                return 0
            fixed = next(one for one in (*self.inputs, *self.outputs) if one.shape[:1] != (-1,))
            raise LiteDetrError(
                f"max_batch_size is {wanted}, and {fixed.name!r} of {self.path} has the fixed shape "
                f"{list(fixed.shape)}. Leave it out, or export the model with a dynamic batch."
            )
        if not self.record:
            return wanted or MAX_BATCH_SIZE
        smallest, _, largest = (shape[0] for shape in self.record["shapes"][self.inputs[0].name])
        if smallest > 1:
            raise LiteDetrError(
                f"{self.path} takes batches of {smallest} to {largest}, and a server sends any from 1 on. Build the "
                f"engine with `litedetr build --batch 1,{smallest},{largest}`."
            )
        if wanted is not None and wanted > largest:
            fix = f"Give at most that, or build the engine with `litedetr build --batch 1,1,{wanted}`."
            raise LiteDetrError(f"max_batch_size is {wanted}, and {self.path} takes batches of up to {largest}. {fix}")
        return wanted or largest

    def dims(self, tensor: Tensor) -> list[int]:
        """Return a tensor's shape as Triton's configuration has it."""
        return list(tensor.shape[1:] if self.batched else tensor.shape)

    def warmup_dims(self, tensor: Tensor) -> list[int] | None:
        """Return a shape of an input that the model takes; None where it is not known."""
        if self.record:
            return list(self.record["shapes"][tensor.name][1][1 if self.batched else 0 :])
        dims, sides = self.dims(tensor), [SHORTEST_EDGE, LONGEST_EDGE]
        if "fused_from" not in self.metadata:
            filled = {"images": [3, *sides], "pixel_mask": sides}.get(tensor.name, dims)
            dims = [known if size < 0 else size for size, known in zip(dims, filled)]
        return None if min(dims, default=0) < 0 else dims


def read_onnx(path: Path) -> Source:
    proto = artifact.load_onnx(path, weights=False)
    artifact.check_external_data(path, proto)
    metadata = artifact.onnx_metadata(proto, path)
    check_op_version(path, metadata, artifact.opset_version(path, schema.DOMAIN))
    weights = {tensor.name for tensor in proto.graph.initializer}
    beside = {
        entry.value for tensor in proto.graph.initializer for entry in tensor.external_data if entry.key == "location"
    }
    from onnx import TensorProto

    def tensors(values) -> list[Tensor]:
        found = []
        for value in values:
            if value.name in weights:  # which older files list among the inputs
                continue
            kind = value.type.tensor_type
            if not kind.HasField("shape"):
                raise LiteDetrError(f"{path} does not say the shape of {value.name!r}, which Triton needs.")
            shape = [dim.dim_value if dim.HasField("dim_value") else -1 for dim in kind.shape.dim]
            found.append(_tensor(path, value.name, TensorProto.DataType.Name(kind.elem_type), shape))
        return found

    return Source(path, metadata, tensors(proto.graph.input), tensors(proto.graph.output), beside=sorted(beside))


def read_engine(path: Path) -> Source:
    record = read_record(path)
    if not record:
        raise LiteDetrError(
            f"{path} has no {record_path(path).name} beside it, which says what the engine takes and whether it was "
            "verified. Copy that file as well, or build the engine with `litedetr build`."
        )
    if record.get("backend") != "tensorrt":
        fix = "Build the engine with `litedetr build --backend tensorrt` on the GPU that it is for."
        raise LiteDetrError(f"{path} is an engine of {record.get('backend')}, for which Triton has no back end. {fix}")
    check_op_version(path, record["metadata"])
    try:
        shapes = record["shapes"]
        inputs, outputs = [], []
        for name, one in record["tensors"].items():
            shape = list(one["shape"])
            if name in shapes:  # a size that the engine takes only one of is fixed; Triton counts the batch itself
                limits = zip(shapes[name][0], shapes[name][2])
                shape[1:] = [low if low == high else -1 for low, high in limits][1:]
            (inputs if name in shapes else outputs).append(_tensor(path, name, one["type"], shape))
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise LiteDetrError(
            f"{record_path(path)} does not say the inputs and outputs of {path} ({type(error).__name__}: {error}). "
            "Build the engine again with this version of `litedetr build`."
        ) from error
    return Source(path, record["metadata"], inputs, outputs, record)


def _tensor(path: Path, name: str, kind: str, shape: Sequence[int]) -> Tensor:
    if kind not in _TYPES:
        raise LiteDetrError(f"{name!r} of {path} has the type {kind}, which servers do not take. Export it without.")
    return Tensor(name, _TYPES[kind], tuple(shape))


def check_new(path: Path, what: str) -> None:
    """Raise LiteDetrError unless the folder `path`, which is to become `what`, can be made."""
    if path.exists() or path.is_symlink():
        raise LiteDetrError(f"{path} exists, and {what} is not written over. Remove it, or choose another folder.")
    check_writable(path.absolute().parent)


def doubts(source: Source, allow_unverified: bool) -> list[str]:
    """Return what speaks against serving an artifact, as warnings; raise LiteDetrError where they are not allowed."""
    doubt = artifact.distrust(source.path, source.metadata)
    if doubt and not allow_unverified:
        fix = "Make it again with its verification, or serve it with --allow-unverified (allow_unverified=True)."
        raise LiteDetrError(f"{source.path} {doubt}, so it is not served. {fix}")
    return [f"{source.path} {doubt}: its results are not proven"] if doubt else []


def copy_library(name: str, folder: Path) -> Path:
    """Copy a compiled library of the package, and return the copy."""
    try:
        library = native.library(name)
    except FileNotFoundError as error:
        raise LiteDetrError(f"the model holds the attention ops, and their library is missing: {error}") from error
    return Path(shutil.copyfile(library, folder / library.name))
