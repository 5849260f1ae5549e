"""Times one key-aware deformable attention on the CPU, our op against what else can compute it.

Every contender gets what the op gets, raw offsets and reference points included, and its output is compared with the
definition in float64 before its time counts.  Run `python benchmarks/kernels.py --help`.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import timing
import torch
import torch.nn.functional as F
import typer
from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from torch import Tensor

import litedetr_deploy as ld
from litedetr_deploy.files import replaced_when_done
from litedetr_deploy.ops import reference, torch_op

HEADS, HEAD_DIM, POINTS = 8, 32, 4
CHANNELS = HEADS * HEAD_DIM
PACKAGES = ("litedetr-deploy", "torch", "onnxruntime", "openvino", "onnx", "onnxscript", "numpy")


# Sizes and inputs


@dataclass(frozen=True)
class Size:
    """One attention with a batch of 1: its maps, and which queries look at them."""

    name: str
    maps: tuple[tuple[int, int], ...]  # (height, width), fine to coarse
    first_level: int = 0  # the tokens of this level and the coarser ones are the queries of an encoder
    boxes: int = 0  # or so many boxes are, of a decoder

    @property
    def queries(self) -> int:
        return self.boxes or sum(height * width for height, width in self.maps[self.first_level :])

    @property
    def bytes_gathered(self) -> int:
        """Four corners of D floats for every sample, each read once: key and value are the same tokens."""
        return self._samples * 4 * HEAD_DIM * 4

    @property
    def flop(self) -> int:
        """2 for each of 6 D multiply-adds a sample: D for every corner, D for the logit, D for the output."""
        return self._samples * 6 * HEAD_DIM * 2

    @property
    def _samples(self) -> int:
        return self.queries * HEADS * len(self.maps) * POINTS

    @property
    def query_kind(self) -> str:
        return "boxes" if self.boxes else "tokens"

    def __str__(self) -> str:
        maps = ", ".join(f"{height}x{width}" for height, width in self.maps)
        return (
            f"{self.queries:,} {self.query_kind} as queries, maps {maps}; {self.bytes_gathered / 1e6:.0f} MB gathered, "
            f"{self.flop / 1e6:.0f} MFLOP"
        )


MAPS_800 = ((100, 167), (50, 84), (25, 42), (13, 21))  # of an image of 800x1333
MAPS_640 = ((80, 80), (40, 40), (20, 20), (10, 10))
SIZES = {
    size.name: size
    for size in (
        Size("full800", MAPS_800),
        Size("high800", MAPS_800, first_level=1),
        Size("dec800", MAPS_800, boxes=900),
        Size("full640", MAPS_640),
        Size("high640", MAPS_640, first_level=1),
    )
}


def make_inputs(size: Size) -> dict[str, Tensor]:
    """The op's inputs but spatial_shapes, always the same numbers for a size.

    Offsets are what training makes of the usual initialisation: each head looks in a direction of its own, 1 to 4
    pixels far (1 to 4 quarters of half a box in the decoder), and strays around that.
    """
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in size.maps)
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    directions = torch.stack((angles.cos(), angles.sin()), -1)[:, None, None]  # [M, 1, 1, 2]
    distances = torch.arange(1.0, POINTS + 1)[:, None]  # [P, 1]
    strayed = 1.5 * torch.randn(1, size.queries, HEADS, len(size.maps), POINTS, 2, generator=generator)
    return {
        "query": torch.randn(1, size.queries, CHANNELS, generator=generator),
        "value": torch.randn(1, tokens, CHANNELS, generator=generator),
        "reference_points": _random_boxes(size, generator) if size.boxes else _token_centres(size),
        "sampling_offsets": (directions * distances + strayed).flatten(2),
    }


def _token_centres(size: Size) -> Tensor:
    """[1, Q, L, 2]"""
    centres = []
    for height, width in size.maps[size.first_level :]:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        centres.append(torch.stack((x.flatten(), y.flatten()), -1))
    return torch.cat(centres)[None, :, None].repeat(1, 1, len(size.maps), 1)


def _random_boxes(size: Size, generator: torch.Generator) -> Tensor:
    """[1, Q, L, 4], sides from 2 % to 60 % of the image, small ones as frequent as large ones"""
    centres = torch.rand(1, size.boxes, 2, generator=generator)
    sides = 0.02 * 30 ** torch.rand(1, size.boxes, 2, generator=generator)
    return torch.cat((centres, sides), -1)[:, :, None].repeat(1, 1, len(size.maps), 1)


class Problem:
    """A size with its inputs, and with the right answer for some of the queries."""

    CHECKED_QUERIES = 256  # a query's output depends on no other query
    # Contenders round coordinates and sums in other orders than PyTorch does.  What is wrong is off by far more.
    TOLERANCE = 10  # times the error of the definition in float32

    def __init__(self, size: Size):
        self.size = size
        self.inputs = make_inputs(size)
        generator = torch.Generator().manual_seed(1)
        self.checked = torch.randperm(size.queries, generator=generator)[: self.CHECKED_QUERIES]
        self._wanted = self._define(torch.float64)
        self.tolerance = self.TOLERANCE * self._difference(self._define(torch.float32))

    def _define(self, dtype: torch.dtype) -> Tensor:
        inputs = {
            name: (tensor if name == "value" else tensor[:, self.checked]).to(dtype)
            for name, tensor in self.inputs.items()
        }
        shapes = torch.tensor(self.size.maps)
        return reference.key_aware_deform_attn(**inputs, spatial_shapes=shapes, num_heads=HEADS, num_points=POINTS)

    def error(self, output) -> float:
        """The largest difference of a whole output, [1, Q, M*D], from the definition in float64."""
        output = torch.as_tensor(output)
        wanted_shape = (1, self.size.queries, CHANNELS)
        if output.shape != wanted_shape:
            raise ValueError(f"the output has shape {list(output.shape)}; it should be {list(wanted_shape)}")
        return self._difference(output[:, self.checked])

    def _difference(self, output: Tensor) -> float:
        return (output.double() - self._wanted).abs().max().item()


# Contenders


@dataclass(frozen=True)
class Contender:
    """One way to compute the attention.

    make: given a problem and a number of threads, returns the call to be timed, which returns the output.
    """

    name: str
    make: Callable[[Problem, int], Callable[[], object]]
    packages: tuple[str, ...] = ()  # importable names without which it cannot run


class OneAttention(torch.nn.Module):
    """The op alone, for the exporter.  The maps are constants, as in a model exported for one image size."""

    def __init__(self, maps: Sequence):
        super().__init__()
        self.register_buffer("spatial_shapes", torch.tensor(maps))

    def forward(self, query, value, reference_points, sampling_offsets):
        return torch.ops.litedetr.key_aware_deform_attn(
            query, value, reference_points, sampling_offsets, self.spatial_shapes, HEADS, POINTS
        )


@functools.cache
def onnx_model(size: Size, attention: str) -> bytes:
    """The ONNX model that the package exports for one attention: 'op', 'gridsample' or 'gather'."""
    inputs = make_inputs(size)
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            OneAttention(size.maps).eval(),
            tuple(inputs.values()),
            dynamo=True,
            opset_version=18,
            custom_translation_table=torch_op.onnx_translations(attention),
            input_names=list(inputs),
            verbose=False,
        )
    return program.model_proto.SerializeToString()


def onnxruntime_call(attention: str, problem: Problem, threads: int):
    session = ld.create_session(onnx_model(problem.size, attention), threads=threads)
    feed = {name: tensor.numpy() for name, tensor in problem.inputs.items()}
    return lambda: session.run(None, feed)[0]


def openvino_call(attention: str, problem: Problem, threads: int):
    import openvino

    core = openvino.Core()
    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
    }
    compiled = core.compile_model(core.read_model(onnx_model(problem.size, attention), b""), "CPU", settings)
    feed = {name: tensor.numpy() for name, tensor in problem.inputs.items()}
    return lambda: compiled(feed, share_inputs=True, share_outputs=True)[0]  # no copies


def torch_op_call(problem: Problem, threads: int):
    spatial_shapes = torch.tensor(problem.size.maps)
    return torch_call(
        lambda **inputs: torch.ops.litedetr.key_aware_deform_attn(
            **inputs, spatial_shapes=spatial_shapes, num_heads=HEADS, num_points=POINTS
        ),
        problem,
        threads,
    )


def torch_call(function: Callable, problem: Problem, threads: int):
    def call():
        with torch.inference_mode():
            return function(**problem.inputs)

    torch.set_num_threads(threads)
    return call


def official_call(problem: Problem, threads: int):
    return torch_call(functools.partial(attend_official, maps=problem.size.maps), problem, threads)


def sampling_once_call(problem: Problem, threads: int):
    return torch_call(functools.partial(attend_sampling_once, maps=problem.size.maps), problem, threads)


def compiled_call(problem: Problem, threads: int):
    torch._dynamo.reset()  # else every size counts as a recompilation of the same function, and few are allowed
    # Named, so that code that was compiled for another number of threads is not taken from inductor's disk cache.
    options = {"cpp.threads": threads}
    compiled = torch.compile(attend_sampling_once, fullgraph=True, dynamic=False, options=options)
    return torch_call(functools.partial(compiled, maps=problem.size.maps), problem, threads)


def attend_official(query, value, reference_points, sampling_offsets, maps):
    """The arithmetic of the official pure-PyTorch code, which samples key and value apart though they are equal."""
    grids = sampling_grids(reference_points, sampling_offsets, maps)
    keys, values = (torch.stack(sample_levels(value, grids, maps), -2) for _ in range(2))
    return attend_samples(query, keys.flatten(-2), values.flatten(-2))


def attend_sampling_once(query, value, reference_points, sampling_offsets, maps):
    grids = sampling_grids(reference_points, sampling_offsets, maps)
    samples = torch.stack(sample_levels(value, grids, maps), -2).flatten(-2)
    return attend_samples(query, samples, samples)


def sampling_grids(references: Tensor, offsets: Tensor, maps: Sequence) -> Tensor:
    """Where grid_sample reads, -1 to 1: [N, Q, M, L, P, 2]."""
    n, q, levels, width = references.shape
    offsets = offsets.view(n, q, HEADS, levels, POINTS, 2)
    references = references[:, :, None, :, None]
    if width == 2:
        sizes = torch.tensor([(w, h) for h, w in maps], dtype=offsets.dtype)
        locations = references + offsets / sizes[:, None]
    else:
        locations = references[..., :2] + offsets / POINTS * references[..., 2:] * 0.5
    return 2 * locations - 1


def sample_levels(tokens: Tensor, grids: Tensor, maps: Sequence) -> list[Tensor]:
    """Samples of tokens [N, S, M*D], for each level [N*M, D, Q, P]."""
    n = tokens.shape[0]
    sampled = []
    for level, level_tokens in enumerate(tokens.split([height * width for height, width in maps], 1)):
        image = level_tokens.transpose(1, 2).reshape(n * HEADS, HEAD_DIM, *maps[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [N*M, Q, P, 2]
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    return sampled


def attend_samples(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """query [N, Q, M*D], keys and values [N*M, D, Q, L*P] -> [N, Q, M*D]"""
    n, q, channels = query.shape
    query = query.view(n, q, HEADS, 1, HEAD_DIM).transpose(1, 2).flatten(0, 1)  # [N*M, Q, 1, D]
    weights = (query @ keys.permute(0, 2, 1, 3) / math.sqrt(HEAD_DIM)).softmax(-1)
    output = weights @ values.permute(0, 2, 3, 1)  # [N*M, Q, 1, D]
    return output.view(n, HEADS, q, HEAD_DIM).transpose(1, 2).reshape(n, q, channels)


ONNX = ("onnx", "onnxscript")
OUR_OP = "op"
OPENVINO = ("OpenVINO GridSample", "OpenVINO gather")
CONTENDERS = (
    Contender(OUR_OP, functools.partial(onnxruntime_call, "op"), ("onnxruntime", *ONNX)),
    Contender("torch op", torch_op_call),
    Contender("ORT GridSample", functools.partial(onnxruntime_call, "gridsample"), ("onnxruntime", *ONNX)),
    Contender("ORT gather", functools.partial(onnxruntime_call, "gather"), ("onnxruntime", *ONNX)),
    Contender(OPENVINO[0], functools.partial(openvino_call, "gridsample"), ("openvino", *ONNX)),
    Contender(OPENVINO[1], functools.partial(openvino_call, "gather"), ("openvino", *ONNX)),
    Contender("PyTorch official form", official_call),
    Contender("PyTorch sampling once", sampling_once_call),
    Contender("torch.compile", compiled_call),
)


# Measuring


@dataclass
class Result:
    """One contender on one problem: its times, or why it has none."""

    size: Size
    threads: int
    contender: str
    seconds: list[float] = field(default_factory=list)
    error: float | None = None  # the largest difference from the definition, and what is allowed
    tolerance: float | None = None
    trouble: str = ""

    @property
    def wrong(self) -> bool:
        return self.error is not None and not self.error <= self.tolerance  # NaN is wrong

    @property
    def median(self) -> float:
        """Seconds; NaN where there is no time."""
        return timing.percentile(self.seconds, 50) if self.seconds else math.nan


def measure(
    problem: Problem,
    threads: int,
    contenders: Iterable[Contender],
    budget: float,
    results: list[Result],
    progress: Callable[[str, float], None] = lambda stage, fraction: None,
    cold: bool = False,
) -> None:
    """Appends one `Result` for each contender to `results` at once and then fills them, so that an interruption
    leaves what was measured before it.

    budget: seconds for each contender; one that is too slow for `timing.FEWEST` repetitions takes longer.
    progress: called with what is going on and the fraction that is done.
    cold: see `timing.time_call`.
    """
    contenders = list(contenders)
    mine = {c.name: Result(problem.size, threads, c.name, tolerance=problem.tolerance) for c in contenders}
    results.extend(mine.values())
    calls, counts = {}, {}
    for number, contender in enumerate(contenders):
        progress(f"preparing {contender.name}", number / len(contenders) / 2)
        call = prepare(problem, threads, contender, mine[contender.name])
        if call is not None:
            calls[contender.name] = call
            counts[contender.name] = timing.repetitions(call, budget, cold)
    order = timing.interleave(counts)
    for number, name in enumerate(order):
        progress(f"timing {name}", 0.5 + number / len(order) / 2)
        mine[name].seconds.append(timing.time_call(calls[name], cold))


def prepare(problem: Problem, threads: int, contender: Contender, result: Result) -> Callable | None:
    """The contender's call, run once and found right; None, and the reason in `result`, where that fails."""
    missing = [package for package in contender.packages if importlib.util.find_spec(package) is None]
    if missing:
        result.trouble = f"{', '.join(missing)} missing: pip install 'litedetr-deploy[benchmark]'"
        return None
    try:
        call = contender.make(problem, threads)
        result.error = problem.error(call())
    except Exception as error:  # of any of four libraries, which share no base class
        result.trouble = f"failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        return None
    if result.wrong:
        result.trouble = f"WRONG by {result.error:.1e} where {result.tolerance:.1e} is allowed: not timed"
        return None
    return call


# Reports


COLUMNS = ("contender", "median ms", "p90 ms", "calls", "GB/s", "GFLOP/s", "times op", "error")


def cases_of(results: list[Result]) -> list[list[Result]]:
    """The results of each size and number of threads, in order."""
    cases = {}
    for result in results:
        cases.setdefault((result.size, result.threads), []).append(result)
    return list(cases.values())


def case_title(case: list[Result]) -> str:
    return f"{case[0].size.name}, {threads_text(case[0].threads)}"


def threads_text(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def better_openvino(case: list[Result]) -> Result | None:
    """The faster of OpenVINO's graphs, where both have a time."""
    both = [result for result in case if result.contender in OPENVINO and result.seconds]
    return min(both, key=lambda result: result.median) if len(both) == len(OPENVINO) else None


def times_op(result: Result, case: list[Result]) -> float:
    """How many times as long as our op it takes; NaN where one of them has no time."""
    return result.median / next((other.median for other in case if other.contender == OUR_OP), math.nan)


def table_rows(case: list[Result]) -> list[list[str]]:
    """Texts under `COLUMNS`; a contender without a time has its trouble in the second column and no more."""
    rows = []
    for result in case:
        name = result.contender + (" (better)" if result is better_openvino(case) else "")
        if not result.seconds:
            rows.append([name, result.trouble or "interrupted"])
            continue
        median, ratio = result.median, times_op(result, case)
        rows.append([
            name,
            f"{median * 1e3:.2f}",
            f"{timing.percentile(result.seconds, 90) * 1e3:.2f}",
            str(len(result.seconds)),
            f"{result.size.bytes_gathered / median / 1e9:.2f}",
            f"{result.size.flop / median / 1e9:.2f}",
            "" if math.isnan(ratio) else f"{ratio:.2f}",
            f"{result.error:.0e}",
        ])
    return rows


def print_case(case: list[Result], console: Console) -> None:
    table = Table(title=case_title(case), title_justify="left", caption=str(case[0].size), caption_justify="left",
                  box=box.SIMPLE_HEAD, pad_edge=False)  # fmt: skip
    for column in COLUMNS:
        table.add_column(column, justify="left" if column == COLUMNS[0] else "right", no_wrap=True)
    troubles = []
    for name, *cells in table_rows(case):
        if len(cells) == 1:  # its text would widen a column of numbers
            troubles.append(f"{name}: {cells[0]}")
            cells = ["-"]
        table.add_row(name, *cells, style="bold" if name == OUR_OP else None)
    console.print(table)
    for trouble in troubles:
        console.print(trouble, style="yellow", markup=False)


def as_json(results: list[Result], machine: dict, settings: dict) -> dict:
    rows = []
    for case in cases_of(results):
        for result in case:
            row = {"size": result.size.name, "threads": result.threads, "contender": result.contender}
            if result.seconds:
                median = result.median
                ratio = times_op(result, case)
                row |= {
                    "median_ms": median * 1e3,
                    "p90_ms": timing.percentile(result.seconds, 90) * 1e3,
                    "calls": len(result.seconds),
                    "gigabytes_per_second": result.size.bytes_gathered / median / 1e9,
                    "gigaflop_per_second": result.size.flop / median / 1e9,
                    "times_op": None if math.isnan(ratio) else ratio,
                    "better_openvino_graph": result is better_openvino(case),
                }
            checked = result.error is not None
            row |= {
                "error": result.error if checked and math.isfinite(result.error) else None,
                "tolerance": result.tolerance,
                "right": not result.wrong if checked else None,
                "trouble": result.trouble,
            }
            rows.append(row)
    sizes = {
        size.name: {
            "maps": [list(shape) for shape in size.maps],
            "queries": size.queries,
            "reference_width": 4 if size.boxes else 2,
            "bytes_gathered": size.bytes_gathered,
            "flop": size.flop,
        }
        for size in dict.fromkeys(result.size for result in results)
    }
    return {"benchmark": "kernels", "machine": machine, "settings": settings, "sizes": sizes, "results": rows}


HOW = (
    f"One attention, batch 1, {HEADS} heads of {HEAD_DIM} channels, {POINTS} points a level, float32; the arithmetic "
    "of reference points and the softmax are included. Calls of all contenders alternate; before each comes an untimed "
    f"one of its own (with --cold, the caches are overwritten instead). GB/s counts samples x 4 corners x {HEAD_DIM} channels x 4 bytes, GFLOP/s counts samples x 6 x "
    f"{HEAD_DIM} multiply-adds x 2: what the task needs, not what each contender spends. 'error' is the largest "
    f"difference from the definition in float64 on {Problem.CHECKED_QUERIES} queries."
)


def as_markdown(results: list[Result], machine: dict) -> str:
    cases = cases_of(results)
    names = list(dict.fromkeys(result.contender for result in results))
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    load = ", ".join(map(str, machine["load_average"]))
    lines = ["# Key-aware deformable attention: kernels", ""]
    lines += [
        f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['cpu_features'])}), our op's kernel for "
        f"{machine['op_kernel']}; {machine['os']}; {packages}; {machine['date']}; load average {load}."
    ]
    lines += ["", HOW, ""]
    lines += ["Median in milliseconds, and how many times our op's it is:", ""]
    lines += markdown_row(["", *map(case_title, cases)]) + markdown_row(["---"] + ["---:"] * len(cases))
    for name in names:
        found = [next(result for result in case if result.contender == name) for case in cases]
        lines += markdown_row([name, *(summary_cell(result, case) for result, case in zip(found, cases))])
    if any(map(better_openvino, cases)):
        better = [better_openvino(case) for case in cases]
        cells = (summary_cell(result, case) if result else "-" for result, case in zip(better, cases))
        lines += markdown_row(["OpenVINO, better graph", *cells])
    for case in cases:
        lines += ["", f"## {case_title(case)}", "", f"{case[0].size}", ""]
        lines += markdown_row(COLUMNS) + markdown_row(["---"] + ["---:"] * (len(COLUMNS) - 1))
        for row in table_rows(case):
            lines += markdown_row(row + [""] * (len(COLUMNS) - len(row)))
    return "\n".join(lines) + "\n"


def markdown_row(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"]


def summary_cell(result: Result, case: list[Result]) -> str:
    return f"{three_digits(result.median * 1e3)}{ratio_text(result, case)}" if result.seconds else "-"


def ratio_text(result: Result, case: list[Result]) -> str:
    ratio = times_op(result, case)
    return "" if result.contender == OUR_OP or math.isnan(ratio) else f" ({three_digits(ratio)}x)"


def three_digits(number: float) -> str:
    """At least three significant digits, without an exponent."""
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}"


def draw(results: list[Result], machine: dict, path: Path) -> None:
    """A bar chart as PNG: one panel a size, one bar a contender and number of threads."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    sizes = list(dict.fromkeys(result.size for result in results))
    names = list(dict.fromkeys(result.contender for result in results))
    thread_counts = list(dict.fromkeys(result.threads for result in results))
    columns = min(3, len(sizes))
    rows = math.ceil(len(sizes) / columns)
    bar = 0.8 / len(thread_counts)
    opacity = {threads: 1 - 0.5 * i / max(1, len(thread_counts) - 1) for i, threads in enumerate(thread_counts)}

    figure = Figure(figsize=(2.2 + 4.2 * columns, 1.6 + (0.8 + 0.36 * len(names)) * rows), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for size, axes in zip(sizes, panels.flat):
        for case in cases_of([result for result in results if result.size == size]):
            for result in case:
                place = thread_counts.index(result.threads) - (len(thread_counts) - 1) / 2
                y = names.index(result.contender) + place * bar
                text = {"textcoords": "offset points", "va": "center", "fontsize": 7, "color": "#333333"}
                if not result.seconds:
                    axes.annotate("no time", (0, y), (3, 0), xycoords=axes.get_yaxis_transform(), **text)
                    continue
                milliseconds = result.median * 1e3
                colour = "#d1495b" if result.contender == OUR_OP else "#30638e"
                axes.barh(y, milliseconds, bar * 0.92, color=colour, alpha=opacity[result.threads])
                label = f"{three_digits(milliseconds)} ms{ratio_text(result, case)}"
                axes.annotate(label, (milliseconds, y), (3, 0), **text)
        timed = [result.median * 1e3 for result in results if result.size == size and result.seconds]
        axes.set_xscale("log")
        if timed:
            axes.set_xlim(min(timed) / 2, max(timed) * 12)  # room for the texts behind the bars
        axes.xaxis.set_major_formatter(lambda milliseconds, _: f"{milliseconds:g}")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelsize=8, labelbottom=True)
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"{size.name}: {size.queries:,} {size.query_kind} as queries", fontsize=10)
        axes.set_xlabel("median, milliseconds, log scale", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    panels.flat[0].invert_yaxis()  # shared by all panels: the first contender on top
    for axes in panels.flat[len(sizes) :]:
        axes.set_visible(False)
    figure.legend(
        [Patch(color="#555555", alpha=opacity[threads]) for threads in thread_counts],
        [threads_text(threads) for threads in thread_counts],
        loc="outside lower center", ncols=len(thread_counts), frameon=False, fontsize=9,
    )  # fmt: skip
    figure.suptitle(
        "One key-aware deformable attention in float32; (x): times our op\n"
        f"{machine['cpu']}, {machine['cores']} cores, {machine['date'][:10]}",
        fontsize=11,
    )
    figure.savefig(path, format="png", dpi=150)


def write_reports(results: list[Result], machine: dict, settings: dict, output: Path) -> list[Path]:
    """Writes `output`.json, .md and, with matplotlib, .png: all or none; returns their paths."""
    endings = [".json", ".md"] + [".png"] * (importlib.util.find_spec("matplotlib") is not None)
    paths = [output.with_name(output.name + ending) for ending in endings]
    with ExitStack() as stack:
        data, text, *picture = (stack.enter_context(replaced_when_done(path)) for path in paths)
        data.write_text(json.dumps(as_json(results, machine, settings), indent=2, allow_nan=False) + "\n")
        text.write_text(as_markdown(results, machine))
        if picture:
            draw(results, machine, picture[0])
    return paths


# The command


def chosen(text: str, names: Iterable[str], option: str) -> list[str]:
    """The names in a comma-separated list, in their own order; all when the list is empty."""
    names = list(names)
    wanted = {part.strip().lower() for part in text.split(",") if part.strip()}
    unknown = wanted - {name.lower() for name in names}
    if unknown:
        raise typer.BadParameter(f"{option} has {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return [name for name in names if not wanted or name.lower() in wanted]


def main(
    sizes: Annotated[str, typer.Option(help=f"Sizes to measure, separated by commas: {', '.join(SIZES)}.",
                                       show_default="all")] = "",
    threads: Annotated[str, typer.Option(help="Numbers of threads to measure with, separated by commas.")] = "1,2",
    only: Annotated[str, typer.Option(help="Contenders, separated by commas: "
                                           f"{', '.join(c.name for c in CONTENDERS)}.", show_default="all")] = "",
    seconds: Annotated[float, typer.Option(min=0, help="Time for each contender on each size and number of threads; "
                                           f"slow ones take what {timing.FEWEST} calls need.")] = 5.0,
    cold: Annotated[bool, typer.Option("--cold", help="Overwrite the caches before each call.")] = False,
    output: Annotated[Path | None, typer.Option(help="Write OUTPUT.json, OUTPUT.md and OUTPUT.png as well, for "
                                                     "instance benchmarks/results/kernels.")] = None,
):  # fmt: skip
    """Time one key-aware deformable attention on the CPU: our op, and what else can compute it.

    The others are standard operators in ONNX Runtime and in OpenVINO, PyTorch, and torch.compile.

    Every output is checked before it is timed; a wrong one is not timed, and the exit status is 1.

    Run it on a quiet machine. Everything takes about a quarter of an hour; Ctrl-C prints what was measured so far.
    """
    chosen_sizes = [SIZES[name] for name in chosen(sizes, SIZES, "--sizes")]
    names = chosen(only, (contender.name for contender in CONTENDERS), "--only")
    contenders = [contender for contender in CONTENDERS if contender.name in names]
    if not all(part.strip().isdigit() and int(part) > 0 for part in threads.split(",")):
        raise typer.BadParameter(f"--threads is {threads!r}; it should be numbers of 1 or more, such as 1,2")
    thread_counts = list(dict.fromkeys(map(int, threads.split(","))))
    if output is not None:  # known now, not after a quarter of an hour
        output.parent.mkdir(parents=True, exist_ok=True)
        if not os.access(output.parent, os.W_OK):
            raise typer.BadParameter(f"{output.parent} cannot be written; give --output a folder that is yours")

    try:
        kernel = ld.native.load_core().kda_cpu_isa().decode()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    machine = timing.machine(PACKAGES) | {"op_kernel": kernel}
    results = []
    interrupted = False
    try:
        measure_all(chosen_sizes, thread_counts, contenders, seconds, results, cold)
    except KeyboardInterrupt:
        interrupted = True
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 120)
    for case in cases_of(results):
        print_case(case, console)
    if interrupted:
        print("interrupted: these are the calls made so far; no file was written", file=sys.stderr)
        raise typer.Exit(130)
    console.print(HOW, style="dim", markup=False)
    if output is not None:
        paths = write_reports(results, machine, {"seconds": seconds, "threads": thread_counts}, output)
        print("wrote", ", ".join(map(str, paths)))
        if len(paths) == 2:
            print("no chart: matplotlib is missing: pip install 'litedetr-deploy[benchmark]'", file=sys.stderr)
    if any(result.wrong for result in results):
        raise typer.Exit(1)


def measure_all(
    sizes: list[Size],
    thread_counts: list[int],
    contenders: list[Contender],
    seconds: float,
    results: list[Result],
    cold: bool,
) -> None:
    """`measure` on every size and number of threads, with a progress bar on stderr."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeElapsedColumn())
    # Redrawn between calls only: a thread that redraws the bar would disturb what is timed.
    with Progress(*columns, console=Console(stderr=True), auto_refresh=False, transient=True) as progress:
        task = progress.add_task("", total=len(sizes) * len(thread_counts))
        for i, size in enumerate(sizes):
            problem = Problem(size)
            for j, threads in enumerate(thread_counts):
                done = i * len(thread_counts) + j

                def show(stage: str, fraction: float) -> None:
                    description = f"{size.name}, {threads_text(threads)}: {stage}"
                    progress.update(task, completed=done + fraction, description=description, refresh=True)

                measure(problem, threads, contenders, seconds, results, show, cold)


if __name__ == "__main__":
    typer.run(main)
