"""Where the time of a detector goes: the medians of each part and of 'other', which add up to the whole call's time.

PyTorch is asked by hooks on its modules, the others for their profiles, whose nodes are those of the graph that they
made of ours: a node belongs to the module whose name, weights or outputs it still has, else where its outputs are used.
"""

from __future__ import annotations

import contextlib
import functools
import json
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..artifact import load_onnx
from .timing import percentile

PARTS = (
    "backbone", "projections", "encoder", "query selection", "decoder", "heads", "post-processing", "other",
)  # fmt: skip
BACKBONE, PROJECTIONS, ENCODER, SELECTION, DECODER, HEADS, POST, OTHER = PARTS
_CHILDREN = {  # of the detector, by their part
    BACKBONE: "backbone",
    PROJECTIONS: "input_proj",
    ENCODER: "encoder",
    SELECTION: "enc_output enc_output_norm enc_out_class_embed enc_out_bbox_embed tgt_embed pos_trans pos_trans_norm "
    "query_embed reference_points",
    DECODER: "decoder",
    HEADS: "class_embed bbox_embed",
}
_MODULES = {name: part for part, names in _CHILDREN.items() for name in names.split()}
_ROOT = "detector"  # the name of the detector in the exported module
_NCHWC = "_nchwc"  # what ONNX Runtime appends to an output, for the name of a convolution or pooling in blocked layout
FINAL_VALUES = ("pred_logits", "pred_boxes")


@dataclass(frozen=True)
class Watched:
    """Seconds of the parts of a call, and of the operators of its encoder where the engine tells them."""

    parts: dict[str, float]
    encoder_operators: dict[str, float] | None = None

    @classmethod
    def median(cls, calls: Sequence[Watched]) -> Watched:
        operators = [call.encoder_operators for call in calls]
        known = None if None in operators else medians(operators, sorted(set().union(*operators)))
        return cls(medians([call.parts for call in calls], PARTS), known)


def medians(runs: Sequence[dict[str, float]], names: Iterable[str]) -> dict[str, float]:
    """Return the median seconds of each of the names that takes any, in their order."""
    middle = {name: percentile([run.get(name, 0.0) for run in runs], 50) for name in names}
    return {name: seconds for name, seconds in middle.items() if seconds}


def torch_parts(
    detector, call: Callable[[], object], runs: int, synchronize: Callable[[], None] = lambda: None
) -> dict[str, float]:
    """Return the seconds of every part of `call`, which runs `detector` once: time is the innermost part's that runs.

    The arithmetic between two modules belongs to the one before, but to 'other' (positions and reference points) before
    the encoder.

    synchronize: waits for the device, at every border of two parts.
    """
    since = 0.0

    def account() -> None:
        nonlocal since
        synchronize()
        now = time.perf_counter()
        seconds[stack[-1]] += now - since
        since = now

    def enter(part: str, *_) -> None:
        account()
        stack.append(part)

    def leave(*_) -> None:
        account()
        part = stack.pop()
        stack[0] = OTHER if part in (BACKBONE, PROJECTIONS) else SELECTION if part == ENCODER else part

    results = []
    with contextlib.ExitStack() as hooks:
        for name, module in detector.named_children():
            if part := _MODULES.get(name):
                for each in module.children() if type(module).__name__ == "ModuleList" else [module]:
                    hooks.enter_context(each.register_forward_pre_hook(functools.partial(enter, part)))
                    hooks.enter_context(each.register_forward_hook(leave))
        for _ in range(runs):
            synchronize()
            # At the stack's bottom is the part whose time it is between two parts.
            since, seconds, stack = time.perf_counter(), defaultdict(float), [OTHER]
            call()
            account()
            results.append(seconds)
    return medians(results, PARTS)


def onnxruntime_parts(path: Path, feed: dict, runs: int, threads: int | None = None) -> Watched:
    """Return the medians of some calls, from the profile of ONNX Runtime on the CPU."""
    import onnxruntime

    from ..runtime.session import create_session

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.optimized_model_filepath = optimised = f"{folder}/optimised.onnx"
        options.profile_file_prefix = f"{folder}/profile"
        session = create_session(path, ["CPUExecutionProvider"], threads, options)
        for _ in range(runs + 1):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text())
        exported, run = (load_onnx(file, weights=False).graph for file in (path, Path(optimised)))
    runs_apart = parts_of_runs(events, parts_of_nodes(run, parts_of_values(exported)))
    return Watched.median(runs_apart[1:])  # the first warms up


def openvino_parts(
    path: Path, feed: dict, runs: int, threads: int | None = None, precision: str | None = None
) -> Watched:
    """Return the medians of some calls, from the times that OpenVINO's CPU plugin keeps of its nodes.

    They have the names of the graph's nodes, or list those that were fused into them; one that says nothing, such as a
    change of layout, belongs to the part before it.
    """
    from ..runtime.openvino import make_core, settings_of

    core = make_core()
    settings = settings_of(core, threads, precision) | {"PERF_COUNT": True}
    compiled = core.compile_model(core.read_model(path), "CPU", settings)
    request = compiled.create_infer_request()
    parts, part = {}, OTHER
    nodes = {node.get_friendly_name(): node.get_rt_info() for node in compiled.get_runtime_model().get_ordered_ops()}
    for name, about in nodes.items():
        names = name, *about["originalLayersNames"].astype(str).split(",")
        parts[name] = part = next(filter(None, (_part_of_module(one.partition("/")[0]) for one in names)), part)
    calls = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        request.start_async(feed, share_inputs=True)
        request.wait()
        whole = time.perf_counter() - began
        seconds: dict[str, float] = defaultdict(float)
        operators: dict[str, float] = defaultdict(float)
        for info in request.profiling_info:
            spent, part = info.real_time.total_seconds(), parts.get(info.node_name, OTHER)
            seconds[part] += spent
            if part == ENCODER:
                # What an extension computes is of one type, and its node's name says which op it is.
                kind = info.node_type if info.node_type != "Reference" else info.node_name.rpartition("/")[2]
                operators[kind] += spent
        seconds[OTHER] += max(0.0, whole - sum(seconds.values()))
        calls.append(Watched(dict(seconds), dict(operators)))
    return Watched.median(calls[1:])  # the first warms up


def parts_of_runs(events: list[dict], parts: dict[str, str]) -> list[Watched]:
    """Return what every run of a profile took; `parts`: of every node by its name."""
    nodes = [event for event in events if event.get("cat") == "Node" and event["name"].endswith("_kernel_time")]
    results = []
    for run in (event for event in events if event["name"] == "model_run"):
        seconds, operators = Counter(), Counter()
        for event in nodes:
            if run["ts"] <= event["ts"] < run["ts"] + run["dur"]:
                part = parts.get(event["name"].removesuffix("_kernel_time"), OTHER)
                seconds[part] += event["dur"] * 1e-6
                if part == ENCODER:
                    operators[event["args"]["op_name"]] += event["dur"] * 1e-6
        seconds[OTHER] += max(0.0, run["dur"] * 1e-6 - sum(seconds.values()))
        results.append(Watched(dict(seconds), dict(operators)))
    return results


def parts_of_values(graph) -> dict[str, str]:
    """Return the part that computes each value of an exported graph."""
    parts = parts_of_nodes(graph)
    return {output: parts[node.name] for node in graph.node for output in node.output if output}


def parts_of_nodes(graph, known: dict[str, str] | None = None) -> dict[str, str]:
    """Return the part of every node, by its name, of an ONNX graph in topological order.

    A node that says nothing itself belongs to the post-processing behind the heads, to the projections behind them as
    long as their levels are not joined, else to the part that alone uses its outputs, else to the one before.

    known: parts of values that the graph was made from.
    """
    known = known or {}

    def own_part(node) -> str | None:
        """What its name, its weights or its outputs tell."""
        own = _part_of_module(node.name.partition("/")[0]), *map(_part_of_module, node.input)
        values = node.name.removesuffix(_NCHWC), *node.output
        return next(filter(None, (*own, *map(known.get, values))), None)

    own = [own_part(node) for node in graph.node]
    reached: dict[str, str] = dict.fromkeys(FINAL_VALUES, POST)  # the furthest part on the way to a value
    before = []
    for node, part in zip(graph.node, own):
        behind = [reached[name] for name in node.input if name in reached]
        furthest = part or max(behind, key=PARTS.index, default=None)
        if furthest == PROJECTIONS and node.op_type == "Concat":  # it joins the levels
            furthest = ENCODER
        before.append(furthest)
        if furthest:
            reached |= {output: furthest for output in node.output if output not in FINAL_VALUES}
    users: dict[str, set[str]] = {}
    parts = {}
    for node, mine, behind in reversed(list(zip(graph.node, own, before))):
        after = set().union(*(users.get(output, set()) for output in node.output))
        behind_it = behind if behind in (POST, PROJECTIONS) else after.pop() if len(after) == 1 else behind
        part = parts[node.name] = mine or behind_it or OTHER
        if part != OTHER:
            for name in node.input:
                users.setdefault(name, set()).add(part)
    return parts


def _part_of_module(name: str) -> str | None:
    root, _, path = name.partition(".")
    return _MODULES.get(path.partition(".")[0]) if root == _ROOT else None
