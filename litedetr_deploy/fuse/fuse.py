"""Anybody's ONNX model to the same with deformable attention as our op, region by region proven equal."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from .. import __version__
from ..artifact import CANNOT_TELL, FAILED, METADATA_KEY, NO_DIGEST, load_onnx, parse_metadata, seal, sha256
from ..errors import CheckFailed, LiteDetrError
from ..export.limits import check_choice
from ..files import replaced_when_done
from ..ops import schema
from ..verify.inputs import make
from ..verify.verdict import Verdict
from . import compare, emit, types
from .emit import Sizes
from .facts import Facts
from .limits import ATTENTIONS, OPSET
from .match import Left, NotMatched, Region, find
from .other import others
from .plugins import expand
from .repair import repair

AGAINST = "the original in ONNX Runtime"
LISTED = 3  # reasons that a message names


@dataclass
class FuseReport:
    """What was fused; `<path>.json` beside the model holds the same."""

    path: str
    size_bytes: int
    seconds: float
    regions: list[dict]  # what was replaced: its output's name, and what it is
    left: list[dict]  # what samples and stays: the names of its nodes, and why
    repairs: list[str]  # of what kept the original from loading
    metadata: dict
    verdict: Verdict = field(default_factory=Verdict)

    @property
    def passed(self) -> bool:
        """Whether nothing speaks against the file; one that was not to be verified passes."""
        return self.verdict.status not in (FAILED, CANNOT_TELL)

    def to_dict(self) -> dict:
        return {**asdict(self), "verdict": self.verdict.to_dict(), "passed": self.passed}


def fuse_onnx(
    model: str | os.PathLike, path: str | os.PathLike, attention: str = "op", verify: bool = True,
    inputs: Mapping[str, np.ndarray] | None = None, progress: Callable[[str], None] = lambda stage: None,
) -> FuseReport:  # fmt: skip
    """Replace the deformable attentions of an ONNX model that anything exported, and compare the result with it.

    What cannot be matched, or does not compute the same, stays as it is and is named in the report.  A comparison of
    the whole model that failed is no error: see `verdict` and `passed` of the report.

    Args:
        model: path of the ONNX model.
        path: of the fused one; it and `<path>.json` beside it appear complete or not at all.
        attention: 'op' writes one node of the domain `litedetr` for every deformable attention, 'gather' standard ONNX
            ops without GridSample, which TensorRT compiles wrongly.
        verify: compare every region and then the whole model, in ONNX Runtime on the CPU.
        inputs: what inputs of the model are where it is run, by name; by default drawn images, noise and ones.
        progress: called with the name of each stage as it begins.

    Raises:
        CheckFailed: nothing was fused; the message says why.
        LiteDetrError: the file is no ONNX model, does not load, or is fused already; or bad options.
    """
    check_choice("attention", attention, ATTENTIONS)
    start, path = time.monotonic(), Path(path)
    progress("read the model")
    proto = load_onnx(model)
    if any(node.domain == schema.DOMAIN for node in proto.graph.node):
        count = sum(node.domain == schema.DOMAIN for node in proto.graph.node)
        raise LiteDetrError(
            f"{model} is fused already: it holds {count} attention ops of the domain {schema.DOMAIN!r}. Give the model "
            "that it was made from."
        )
    if (size := proto.ByteSize()) >= onnx.checker.MAXIMUM_PROTOBUF:
        raise LiteDetrError(
            f"{model} holds {size / 1e9:.1f} GB, and a model that is fused must fit into one file of 2 GB. Convert its "
            "weights to FP16 first."
        )
    work = _Work(model, proto, attention, inputs, progress)
    work.match()
    if work.regions and verify:
        work.compare_regions()
    if not work.regions:
        raise CheckFailed(work.nothing())
    with replaced_when_done(path) as temporary, replaced_when_done(path.with_suffix(".json")) as temporary_json:
        progress("replace them")
        fused = work.fused()
        metadata = _metadata(model, work.proto, work.opset, attention)
        _write(fused, metadata, temporary)
        if verify:
            work.compare_whole(onnx.load(temporary))
        else:
            work.verdict = Verdict(work.against, skipped="it was not asked for")
        metadata |= {"verification": work.verdict.summary(), "digest": NO_DIGEST}
        _write(fused, metadata, temporary)
        seal(temporary)
        report = FuseReport(
            str(path), temporary.stat().st_size, round(time.monotonic() - start, 1),
            [_describe(matched.region) for matched in work.regions], [asdict(left) for left in work.left],
            work.repairs, metadata, work.verdict,
        )  # fmt: skip
        temporary_json.write_text(json.dumps(report.to_dict(), indent=2, allow_nan=False) + "\n")
    return report


def _describe(region: Region) -> dict:
    return {
        "name": region.name, "form": region.form, "heads": region.heads, "channels": region.channels,
        "points": list(region.points), "queries": region.queries, "sizes": [list(size) for size in region.sizes],
        "replaced": [node.name for node in region.samplers],
    }  # fmt: skip


@dataclass
class Matched:
    """A region as it is matched with each set of inputs, and the sizes that these have in common."""

    versions: list[Region]
    sizes: Sizes

    @property
    def region(self) -> Region:
        return self.versions[0]


class _Work:
    """One model on its way: proto, as it will be written; wide, the same in types that the CPU has kernels for."""

    def __init__(self, path, proto: onnx.ModelProto, attention: str, given, progress: Callable[[str], None]):
        self.path, self.attention, self.progress = path, attention, progress
        proto, plugins = expand(proto, path)
        proto, self.repairs = repair(proto, path)
        self.against = AGAINST
        if plugins:
            self.against = "the definition of its plugins in ONNX Runtime"
            many = "s" if plugins > 1 else ""
            self.repairs.append(f"{plugins} plugin node{many}, which no runtime here runs, in standard operators")
        self.proto = _normalised(proto)
        self.half = types.holds(self.proto, types.HALVES)
        self.wide = types.as_float(self.proto, types.HALVES) if self.half else self.proto
        self.feeds = make(self.wide, given)
        self.verdict = Verdict(self.against, "the model's float twin" if self.half else "the model")
        self.facts: list[Facts] = []
        self.regions: list[Matched] = []
        self.left: list[Left] = []
        self.opset = next(entry.version for entry in self.proto.opset_import if entry.domain in ("", "ai.onnx"))

    def match(self) -> None:
        """Find the regions that can be written."""
        graph = ir.from_proto(self.wide).graph
        self.left = others(graph)
        if not any(node.op_type == "GridSample" for node in graph):
            return
        self.progress("find deformable attention")
        shapes = [{name: array.shape for name, array in feed.items()} for feed in self.feeds]
        self.facts = [Facts(graph, self.wide, feed) for feed in self.feeds[: 1 if shapes[0] == shapes[1] else 2]]
        finds = [find(graph, facts) for facts in self.facts]
        self.left += finds[0][1]
        again = [{region.name: region for region in regions} for regions, _ in finds]
        for region in finds[0][0]:
            versions = [found.get(region.name) for found in again]
            if None in versions:
                why = next(
                    (left.why for left in finds[-1][1] if region.samplers[0].name in left.names), "it is not there"
                )
                self._leave(region, f"at another batch or size of the images, {why}")
                continue
            first, last = versions[0].structure(), versions[-1].structure()
            if differs := next((what for what in first if first[what] != last[what]), None):
                self._leave(region, f"its {differs} changes with the batch or the size of the images")
                continue
            self.regions.append(Matched(versions, Sizes.of(versions[0], versions[-1])))
        names = []
        for matched in list(self.regions):
            try:
                names += [*emit.sources(matched.region, matched.sizes), matched.region.name]
            except NotMatched as error:
                self._drop(matched, str(error))
        self.kinds = {name: ir.DataType(kind) for name, kind in types.of_values(self.wide, names).items()}
        self.stored = _stored(self.proto, self.kinds) if self.half else self.kinds
        for matched in list(self.regions):
            channels = matched.region.channels
            try:
                if self.attention == "gather" and self.opset < OPSET:
                    what = f"the file is of opset {self.opset}, and standard operators are written in opset {OPSET}"
                    raise NotMatched(f"{what}: export it again with that, or fuse with --attention op")
                if self.attention == "op" and channels % 4:
                    raise NotMatched(
                        f"its heads have {channels} channels, and the op takes multiples of 4; gather, any"
                    )
                for kinds in (self.kinds, self.stored):
                    arguments = matched.region, matched.sizes, self.facts[0], kinds, self.attention
                    emit.write(*arguments, lambda name: ir.val(name))
            except NotMatched as error:
                self._drop(matched, str(error))

    def _leave(self, region: Region, why: str) -> None:
        self.left.append(Left(tuple(node.name for node in region.samplers), why))

    def _drop(self, matched: Matched, why: str) -> None:
        self._leave(matched.region, why)
        self.regions.remove(matched)
        self.verdict.rows = [row for row in self.verdict.rows if row.quantity != matched.region.name]

    def compare_regions(self) -> None:
        """Run every region on its own inputs; what differs stays as it is."""
        blind = {}
        for turn, facts in enumerate(self.facts):
            elsewhere = ", at another size" if turn else ""
            self.progress(f"run the original{elsewhere}")
            regions = [(matched.versions[turn], matched.sizes) for matched in self.regions]
            values = compare.run_regions(regions, self.wide, self.feeds[turn])
            for matched in list(self.regions):
                region = matched.versions[turn]
                self.progress(f"compare {region.name}{elsewhere}")
                row, case = Verdict(self.against), f"each attention alone, relative{elsewhere}"
                arguments = region, matched.sizes, facts, self.kinds, self.attention, self.opset, values
                is_blind = compare.compare_region(row, case, *arguments)
                if row.status == FAILED:
                    self._drop(matched, f"the op does not compute the same: {row.why}")
                    continue
                self.verdict.rows += row.rows
                blind[region.name] = blind.get(region.name, True) and is_blind
        names = [matched.region.name for matched in self.regions if blind[matched.region.name]]
        if names:
            others = f" ({len(names)} of {len(self.regions)} attentions)" if len(names) > 1 else ""
            self.verdict.undecided = (
                f"it would pass with the offsets or logits of {names[0]} off by 1 % as well{others}. Weights that are "
                "zero or untrained do that, and inputs in which there is nothing: give trained weights, or --inputs."
            )

    def fused(self) -> ir.Model:
        """Return the model with all regions replaced."""
        model = ir.from_proto(self.proto)
        graph = model.graph
        values = {value.name: value for value in [*graph.inputs, *graph.initializers.values()]}
        values |= {value.name: value for node in graph for value in node.outputs}
        for matched in self.regions:
            region, arguments = matched.region, (matched.sizes, self.facts[0], self.stored, self.attention)
            written = emit.write(region, *arguments, values.__getitem__)
            old = values[region.name]
            for constant in written.constants:
                graph.initializers.add(constant)
            graph.insert_before(old.producer(), written.nodes)
            old.replace_all_uses_with(written.output, replace_graph_outputs=True)
            old.name, written.output.name = f"{region.name}/unfused", region.name
            written.output.type, written.output.shape = old.type, old.shape
            values[region.name] = written.output  # which another region may read
        if self.attention == "op":
            model.opset_imports[schema.DOMAIN] = schema.VERSION
        common.RemoveUnusedNodesPass()(model)
        common.RemoveUnusedOpsetsPass()(model)
        alive = {node.name for node in graph if node.op_type == "GridSample"}
        for matched in self.regions:
            if still := [node.name for node in matched.region.samplers if node.name in alive]:
                why = "they were replaced, and something else still needs their output or its shape"
                self.left.append(Left(tuple(still), why))
        return model

    def compare_whole(self, fused: onnx.ModelProto) -> None:
        """Compare the outputs of the fused model with those of the original."""
        twin = types.as_float(fused, types.HALVES) if self.half else fused
        for turn, feed in enumerate(self.feeds):
            shape = next((array.shape for array in feed.values() if array.ndim == 4), None)
            case = f"inputs {turn + 1}" + (f", {'x'.join(map(str, shape))}" if shape else "")
            self.progress(f"compare the whole model, {case}")
            compare.compare_whole(self.verdict, case, self.wide, twin, feed)
        if self.half:
            self._run_stored(fused)

    def _run_stored(self, fused: onnx.ModelProto) -> None:
        """Run the file itself, in the types that it is stored in, where the CPU has kernels for them."""
        kinds = {info.name: info.type.tensor_type.elem_type for info in self.proto.graph.input}
        feed = {
            name: array.astype(onnx.helper.tensor_dtype_to_np_dtype(kinds[name]))
            for name, array in self.feeds[0].items()
        }
        self.progress("compare the model in its own types")
        if compare.compare_stored(self.verdict, self.wide, self.proto, fused, self.feeds[0], feed):
            self.verdict.ran = "the model and its float twin"

    def nothing(self) -> str:
        """Return the paragraph that says why nothing was fused."""
        if not self.left:
            return (
                f"{self.path} holds no deformable attention that this command knows, and nothing was written: there is "
                f"no GridSample among its {len(self.proto.graph.node)} nodes. Its runtime needs nothing of this "
                "package; where the model does have deformable attention, export it with torch's exporter."
            )
        reasons: dict[str, str] = {}
        for left in self.left:
            reasons.setdefault(left.why, left.names[0])
        named = [f"{name!r}: {why}" for why, name in reasons.items()]
        more = f"; and {len(named) - LISTED} more reasons" if len(named) > LISTED else ""
        return f"nothing of {self.path} was fused, and nothing was written. {'; '.join(named[:LISTED])}{more}."


def _normalised(proto: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its functions inlined, all constants as initializers, and a name for every node."""
    model = ir.from_proto(proto)
    if model.functions:
        common.InlinePass()(model)
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for i, node in enumerate(model.graph):
        node.name = node.name or f"{node.op_type}_{i}"
    return ir.to_proto(model)


def _stored(proto: onnx.ModelProto, kinds: Mapping[str, ir.DataType]) -> dict[str, ir.DataType]:
    """Return the types of values of a half graph, of which the float twin has `kinds`."""
    inferred = onnx.shape_inference.infer_shapes(proto)
    infos = (*inferred.graph.value_info, *inferred.graph.input, *inferred.graph.output)
    known = {info.name: info.type.tensor_type.elem_type for info in infos}
    known |= {tensor.name: tensor.data_type for tensor in proto.graph.initializer}
    return {name: ir.DataType(known[name]) if known.get(name) else kind for name, kind in kinds.items()}


def _metadata(source, original: onnx.ModelProto, opset: int, attention: str) -> dict:
    """Return what the fused file says of itself, and what the original says if this package made it."""
    own = next((parse_metadata(e.value, source) for e in original.metadata_props if e.key == METADATA_KEY), {})
    images = next((info for info in original.graph.input if len(info.type.tensor_type.shape.dim) == 4), None)
    sides = [dim.dim_value or None for dim in images.type.tensor_type.shape.dim[2:]] if images is not None else [None]
    operators = {node.op_type for node in original.graph.node}
    precision = "fp32"
    if types.holds(original, types.HALVES):
        precision = "fp16" if types.holds(original, types.HALVES[:1]) else "bf16"
    if "QuantizeLinear" in operators:
        precision = "int8"
    return own | {
        "tool_version": __version__, "op_version": schema.VERSION, "attention": attention, "precision": precision,
        "opset": opset, "image_size": sides if None not in sides else None,
        "fused_from": {"name": Path(source).name, "sha256": sha256(source)},
    }  # fmt: skip


def _write(model: ir.Model, metadata: dict, path: Path) -> None:
    model.metadata_props[METADATA_KEY] = json.dumps(metadata, allow_nan=False)
    ir.save(model, path)
