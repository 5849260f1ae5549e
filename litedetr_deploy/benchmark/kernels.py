"""One attention op against what else can compute it, on the CPU or on a GPU; docs/benchmarks.md says how.

On a GPU this needs PyTorch and nothing else, not even numpy.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import logging
import math
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import LiteDetrError
from ..files import check_writable
from ..ops import native, reference, torch_op
from . import harness, official, report, timing
from .harness import Result
from .packages import missing_packages
from .report import three_digits

HEADS, HEAD_DIM, POINTS = 8, 32, 4
CHANNELS = HEADS * HEAD_DIM
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PACKAGES = ("litedetr-deploy", "torch", "triton", "onnxruntime", "openvino", "onnx", "onnxscript", "numpy")


@dataclass(frozen=True)
class Size:
    """One attention: its maps, which queries look at them, in how many images, and the type of its tensors."""

    name: str
    maps: tuple[tuple[int, int], ...]  # (height, width), fine to coarse
    first_level: int = 0  # the tokens of this level and the coarser ones are the queries of an encoder
    boxes: int = 0  # or so many boxes are, of a decoder
    batch: int = 1
    dtype: str = "fp32"  # of DTYPES

    @property
    def tokens(self) -> int:
        return sum(height * width for height, width in self.maps)

    @property
    def queries(self) -> int:
        return self.boxes or sum(height * width for height, width in self.maps[self.first_level :])

    @property
    def reference_width(self) -> int:
        return 4 if self.boxes else 2

    @property
    def work(self) -> dict[str, int]:
        """What the task needs, not what a contender spends, by its names in the JSON report."""
        rows, width = self.batch * self.queries, DTYPES[self.dtype].itemsize
        samples = rows * HEADS * len(self.maps) * POINTS
        elements = 2 * rows * CHANNELS + self.batch * self.tokens * CHANNELS + 2 * samples
        return {
            # Four corners of D channels for every sample, each read once: key and value are the same tokens.
            "bytes_gathered": samples * 4 * HEAD_DIM * width,
            # Every input read once and the output written once; the references are float32.
            "bytes_compulsory": elements * width + rows * len(self.maps) * self.reference_width * 4,
            # 2 for each of 6 D multiply-adds a sample: D for every corner, D for the logit, D for the output.
            "flop": samples * 6 * HEAD_DIM * 2,
        }

    def __str__(self) -> str:
        maps = ", ".join(f"{height}x{width}" for height, width in self.maps)
        gathered, compulsory, flop = (f"{number / 1e6:.0f}" for number in self.work.values())
        return (
            f"{self.queries:,} {'boxes' if self.boxes else 'tokens'} as queries, maps {maps}; {gathered} MB gathered, "
            f"{compulsory} MB read and written at the least, {flop} MFLOP"
        )


MAPS_800 = ((100, 167), (50, 84), (25, 42), (13, 21))  # of an image of 800x1333
MAPS_640 = ((80, 80), (40, 40), (20, 20), (10, 10))
_ALL = (
    Size("full800", MAPS_800), Size("high800", MAPS_800, first_level=1), Size("dec800", MAPS_800, boxes=900),
    Size("full640", MAPS_640), Size("high640", MAPS_640, first_level=1),
)  # fmt: skip
SIZES = {size.name: size for size in _ALL}


def make_inputs(size: Size) -> dict[str, Tensor]:
    """The op's inputs but spatial_shapes, always the same numbers for a size.

    Offsets are what training makes of the usual initialisation: each head looks in a direction of its own, 1 to 4
    pixels far (1 to 4 quarters of half a box in the decoder), and strays around that.
    """
    generator = torch.Generator().manual_seed(0)
    n, q, dtype = size.batch, size.queries, DTYPES[size.dtype]
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    directions = torch.stack((angles.cos(), angles.sin()), -1)[:, None, None]  # [M, 1, 1, 2]
    distances = torch.arange(1.0, POINTS + 1)[:, None]  # [P, 1]
    strayed = 1.5 * torch.randn(n, q, HEADS, len(size.maps), POINTS, 2, generator=generator)
    return {
        "query": torch.randn(n, q, CHANNELS, generator=generator).to(dtype),
        "value": torch.randn(n, size.tokens, CHANNELS, generator=generator).to(dtype),
        "reference_points": _references(size, generator)[:, :, None].repeat(1, 1, len(size.maps), 1),
        "sampling_offsets": (directions * distances + strayed).flatten(2).to(dtype),
    }


def _references(size: Size, generator: torch.Generator) -> Tensor:
    """[N, Q, 2 or 4]: centres of tokens, or boxes of 2 % to 60 % of the image, small ones as frequent as large ones."""
    if size.boxes:
        centres, sides = torch.rand(2, size.batch, size.boxes, 2, generator=generator)
        return torch.cat((centres, 0.02 * 30**sides), -1)
    edges = [[(torch.arange(side) + 0.5) / side for side in sides] for sides in size.maps[size.first_level :]]
    return torch.cat([torch.cartesian_prod(*pair).flip(-1) for pair in edges]).repeat(size.batch, 1, 1)


class Problem:
    """A size with its inputs on a device, and with the right answers for some queries of the last image."""

    CHECKED_QUERIES = 256  # a query's output depends on no other query
    # Contenders round coordinates and sums in other orders than PyTorch does.  What is wrong is off by far more.
    TOLERANCE = 10  # times the error of the definition in the type of the tensors
    PYTORCH_TOLERANCE = 3  # times the error of PyTorch's operators on the CPU, which store samples and logits in it

    def __init__(self, size: Size, device: str = "cpu"):
        self.size, self.device = size, device
        self.inputs = {name: tensor.to(device) for name, tensor in make_inputs(size).items()}
        self.spatial_shapes = torch.tensor(size.maps, device=device)
        generator = torch.Generator().manual_seed(1)
        self.checked = torch.randperm(size.queries, generator=generator)[: self.CHECKED_QUERIES]
        generator.manual_seed(2)
        logits = torch.randn(size.batch, size.queries, HEADS * len(size.maps) * POINTS, generator=generator)
        # Of the op that is given its logits.
        self.plain_inputs = {"attention_logits": logits.to(device, DTYPES[size.dtype])} | self.inputs
        del self.plain_inputs["query"]

    @functools.cached_property
    def answers(self) -> dict[str, tuple[Tensor, float]]:
        """What is right for the checked queries, [1, checked queries, M*D] in float64, and how far off one may be.

        Of the key-aware op, of the 'plain' one, which is given logits, and of the key-aware one in PyTorch's operators.
        """
        found = {}
        for name, definition, inputs in (
            ("key-aware", reference.key_aware_deform_attn, self.inputs),
            ("plain", reference.ms_deform_attn, self.plain_inputs),
        ):
            wanted = self._few(definition, inputs, Tensor.double)
            found[name] = wanted, self.TOLERANCE * largest_difference(self._few(definition, inputs), wanted)
        wanted, tolerance = found["key-aware"]
        error = largest_difference(self._few(official.key_aware_deform_attn, self.inputs), wanted)
        return found | {"pytorch": (wanted, max(tolerance, self.PYTORCH_TOLERANCE * error))}

    def _few(self, attend: Callable[..., Tensor], inputs: dict[str, Tensor], cast=Tensor.cpu) -> Tensor:
        """Compute the checked queries, on the CPU."""
        last = {name: cast(tensor[-1:].cpu()) for name, tensor in inputs.items()}
        few = {name: tensor if name == "value" else tensor[:, self.checked] for name, tensor in last.items()}
        return attend(**few, spatial_shapes=self.spatial_shapes.cpu(), num_heads=HEADS, num_points=POINTS)

    def error(self, output, wanted: Tensor) -> float:
        """Return the largest difference of a whole output, [N, Q, M*D], from what is right."""
        output = torch.as_tensor(output)
        wanted_shape = (self.size.batch, self.size.queries, CHANNELS)
        if output.shape != wanted_shape:
            raise LiteDetrError(f"the output has shape {list(output.shape)}; it should be {list(wanted_shape)}")
        return largest_difference(output[-1:].cpu()[:, self.checked], wanted)


def largest_difference(output: Tensor, wanted: Tensor) -> float:
    return (output.double() - wanted).abs().max().item()


# Contenders


class Rival(NamedTuple):
    """One way to compute the attention."""

    name: str
    # Given a problem and a number of threads of the CPU, returns the call to be timed, which returns the output.
    make: Callable[[Problem, int], Callable[[], Any]]
    packages: tuple[str, ...] = ()  # without which it cannot run
    answer: str = "key-aware"  # which of the problem's is right


class Attention(harness.Contender):
    """A rival on a problem.  threads: of the CPU; None on a GPU, where the call is a CUDA graph."""

    def __init__(self, rival: Rival, problem: Problem, threads: int | None):
        self.name, self.subject, self.images = rival.name, (problem.size, threads), problem.size.batch
        self.rival, self.problem, self.threads = rival, problem, threads
        self._call: Callable[[], Any] = None

    def missing(self) -> str:
        return missing_packages(self.rival.packages)

    def open(self) -> None:
        self._call = self.rival.make(self.problem, self.threads or torch.get_num_threads())
        if self.problem.device != "cpu":
            self._call = timing.captured(self._call)

    def call(self):
        return self._call()

    def check(self, result: Result) -> str:
        wanted, tolerance = self.problem.answers[self.rival.answer]
        error = self.problem.error(self.call(), wanted)
        right = error <= tolerance  # NaN is wrong
        result.figures = {"error": error if math.isfinite(error) else None, "tolerance": tolerance, "right": right}
        return "" if right else f"off by {error:.1e} where {tolerance:.1e} is allowed, and not timed"

    def time(self, cold: bool = False) -> tuple[float, float | None]:
        if self.problem.device == "cpu":
            return super().time(cold)
        return timing.time_device_call(self._call, cold), None

    def close(self) -> None:
        self._call = None
        if self.problem.device != "cpu":
            torch.cuda.empty_cache()


@functools.cache
def onnx_model(size: Size, attention: str) -> bytes:
    """Return the ONNX model that the package exports for one attention: 'op', 'gridsample' or 'gather'."""
    inputs, op = make_inputs(size), torch.ops.litedetr.key_aware_deform_attn
    maps = torch.tensor(size.maps)  # a constant, as in a model exported for one image size

    class OneAttention(torch.nn.Module):
        def forward(self, query, value, reference_points, sampling_offsets):
            return op(query, value, reference_points, sampling_offsets, maps, HEADS, POINTS)

    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # it misses torchvision, which is not needed
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter, about itself
        program = torch.onnx.export(
            OneAttention().eval(), tuple(inputs.values()), input_names=list(inputs), dynamo=True, opset_version=18,
            custom_translation_table=torch_op.onnx_translations(attention), verbose=False,
        )  # fmt: skip
    return program.model_proto.SerializeToString()


def onnxruntime_call(attention: str, problem: Problem, threads: int):
    from ..runtime.session import create_session  # which needs numpy

    session = create_session(onnx_model(problem.size, attention), threads=threads)
    feed = {name: tensor.numpy() for name, tensor in problem.inputs.items()}
    return lambda: session.run(None, feed)[0]


def openvino_call(attention: str, problem: Problem, threads: int):
    from ..runtime.openvino import OpenVinoSession  # which needs numpy

    session = OpenVinoSession(onnx_model(problem.size, attention), threads)
    feed = {name: tensor.numpy() for name, tensor in problem.inputs.items()}
    return lambda: next(iter(session.run(feed, copy=False).values()))


def torch_call(attend: Callable[..., Tensor], problem: Problem, threads: int, plain: bool = False, **options):
    inputs: dict[str, Any] = (problem.plain_inputs if plain else problem.inputs) | options

    @torch.inference_mode()
    def call():
        return attend(**inputs, spatial_shapes=problem.spatial_shapes, num_heads=HEADS, num_points=POINTS)

    torch.set_num_threads(threads)
    return call


def official_call(problem: Problem, threads: int, once: bool = False, attend=official.key_aware_deform_attn):
    return torch_call(attend, problem, threads, maps=problem.size.maps, once=once)


def compiled_call(problem: Problem, threads: int):
    torch._dynamo.reset()  # else every size counts as a recompilation of the same function, and few are allowed
    # Named, so that code that was compiled for another number of threads is not taken from inductor's disk cache.
    options: dict[str, Any] = {"cpp.threads": threads}
    compiled = torch.compile(official.key_aware_deform_attn, fullgraph=True, dynamic=False, options=options)
    return official_call(problem, threads, once=True, attend=compiled)


def deformable_detr_call(extension, problem: Problem, threads: int):
    """Deformable DETR's CUDA kernel, which has no 16-bit types: in float32, and with its inputs made beforehand."""
    inputs, shapes = problem.plain_inputs, problem.spatial_shapes
    areas, places = shapes.prod(1), (inputs["reference_points"], inputs["sampling_offsets"])
    locations = official.sampling_locations(*places, shapes, HEADS, POINTS)
    arguments = (
        inputs["value"].float().unflatten(2, (HEADS, HEAD_DIM)),
        shapes,
        areas.cumsum(0) - areas,  # where each level starts
        locations.contiguous(),
        inputs["attention_logits"].float().unflatten(2, (HEADS, -1)).softmax(-1).view(locations.shape[:-1]),
        64,  # images at once, as its own module sets it
    )
    return lambda: extension.ms_deform_attn_forward(*arguments)


DEFORMABLE_DETR_SOURCE = Path("models", "ops", "src")
# What has left PyTorch since: headers of THC, and names of Tensor's methods.
DEFORMABLE_DETR_PATCHES = {
    "THC/THCAtomics.cuh": "ATen/cuda/Atomic.cuh",
    ".type().is_cuda()": ".is_cuda()",
    "(value.type(),": "(value.scalar_type(),",
    ".data<": ".data_ptr<",
}


def build_deformable_detr(checkout: Path):
    """The extension of a checkout of Deformable DETR, compiled from a patched copy for the GPU of this machine."""
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory() as folder:
        source = shutil.copytree(checkout / DEFORMABLE_DETR_SOURCE, Path(folder, "src"))
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        for path in files:
            text = path.read_text()
            for old, new in DEFORMABLE_DETR_PATCHES.items():
                text = text.replace(old, new)
            path.write_text(text)
        sources = [str(path) for path in files if path.suffix in (".cpp", ".cu")]
        flags: dict[str, Any] = dict.fromkeys(("extra_cflags", "extra_cuda_cflags"), ["-DWITH_CUDA"])
        flags["extra_include_paths"] = [str(source)]
        return cpp_extension.load("MultiScaleDeformableAttention", sources, build_directory=folder, **flags)


def deformable_detr(checkout: Path) -> list[Rival]:
    """Return Deformable DETR's kernel; none, and say why on stderr, where it does not compile."""
    print(f"compiling {checkout / DEFORMABLE_DETR_SOURCE}: a minute or two", file=sys.stderr)
    try:
        extension = build_deformable_detr(checkout)
    except (OSError, RuntimeError, ImportError) as error:  # the others can be timed without it
        print(f"no {DEFORMABLE_DETR}: {error}", file=sys.stderr)
        return []
    return [Rival(DEFORMABLE_DETR, partial(deformable_detr_call, extension), answer="plain")]


OUR_OP, OPENVINO = "op", ("OpenVINO GridSample", "OpenVINO gather")
DEFORMABLE_DETR = "Deformable DETR FP32 kernel"  # for a GPU, where its source is given
_OP = partial(torch_call, torch.ops.litedetr.key_aware_deform_attn)
_PLAIN_OP = partial(torch_call, torch.ops.litedetr.ms_deform_attn, plain=True)
_ONNX = ("onnx", "onnxscript")
_PYTORCH = (
    Rival("PyTorch official form", official_call, answer="pytorch"),
    Rival("PyTorch sampling once", partial(official_call, once=True), answer="pytorch"),
    Rival("torch.compile", compiled_call, answer="pytorch"),
)
RIVALS = {
    "cpu": (
        Rival(OUR_OP, partial(onnxruntime_call, "op"), ("onnxruntime", *_ONNX)),
        Rival("torch op", _OP),
        Rival("ORT GridSample", partial(onnxruntime_call, "gridsample"), ("onnxruntime", *_ONNX)),
        Rival("ORT gather", partial(onnxruntime_call, "gather"), ("onnxruntime", *_ONNX)),
        Rival("OpenVINO op", partial(openvino_call, "op"), ("openvino", *_ONNX)),
        Rival(OPENVINO[0], partial(openvino_call, "gridsample"), ("openvino", *_ONNX)),
        Rival(OPENVINO[1], partial(openvino_call, "gather"), ("openvino", *_ONNX)),
        *_PYTORCH,
    ),
    "cuda": (Rival(OUR_OP, _OP), Rival("plain op", _PLAIN_OP, answer="plain"), *_PYTORCH),
}


# Reports.  A case is the results of all contenders on one size, with one number of threads or type.


def title(size: Size, threads: int | None) -> str:
    batch = "" if size.batch == 1 else f", batch {size.batch}"
    return f"{size.name}{batch}, {size.dtype if threads is None else f'{threads} thread' + 's' * (threads > 1)}"


def case_rows(case: Sequence[Result], machine: dict) -> list[dict]:
    """Return the results as JSON types; a ratio without our op is None."""
    size, threads = case[0].subject
    work, gpu = size.work, machine.get("gpu")
    medians = {result.name: result.median for result in case if result.seconds}
    better = min(OPENVINO, key=medians.__getitem__) if medians.keys() >= set(OPENVINO) else None
    rows = []
    for result in case:
        row = {"size": size.name, "batch": size.batch, "dtype": size.dtype, "threads": threads}
        row |= {"contender": result.name, "status": result.status, **work}
        if result.seconds:
            row |= result.milliseconds()
            row["gigabytes_per_second"] = rate = work["bytes_gathered"] / result.median / 1e9
            row["gigaflop_per_second"] = work["flop"] / result.median / 1e9
            row["times_op"] = result.median / medians[OUR_OP] if OUR_OP in medians else None
            row["better_openvino_graph"] = result.name == better
            if gpu:
                row["of_l2"] = rate / gpu["l2_gigabytes_per_second"]
            if gpu and result.cold_seconds:
                rate = work["bytes_compulsory"] / row["cold_median_ms"] / 1e6
                row["of_memory"] = rate / gpu["memory_gigabytes_per_second"]
        checked = {"error": None, "tolerance": None, "right": None} | result.figures
        rows.append(row | checked | {"trouble": result.trouble})
    return rows


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"


COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {  # of the tables: headings and formats, by names in the rows
    "median_ms": ("median ms", three_digits), "p90_ms": ("p90 ms", three_digits),
    "cold_median_ms": ("cold ms", three_digits), "cold_p90_ms": ("cold p90", three_digits),
    "calls": ("calls", str), "gigabytes_per_second": ("GB/s", three_digits),
    "of_l2": ("of L2", _percent), "of_memory": ("of memory", _percent),
    "gigaflop_per_second": ("GFLOP/s", three_digits), "times_op": ("times op", three_digits),
    "error": ("error", "{:.0e}".format),
}  # fmt: skip


def case_table(case: Sequence[Result], machine: dict) -> list[str]:
    """Return the lines of a case's section."""
    found = case_rows(case, machine)
    known = {"median_ms"}.union(*found)
    columns = {name: column for name, column in COLUMNS.items() if name in known}
    rows = []
    for result, row in zip(case, found):
        name = result.name + (" (better)" if row.get("better_openvino_graph") else "")
        values = [(row.get(column), as_text) for column, (_, as_text) in columns.items()]
        cells = ["-" if value is None else as_text(value) for value, as_text in values]
        rows.append([name, *(cells if result.seconds else [result.remark])])
    headings = ["contender", *(heading for heading, _ in columns.values())]
    return ["", f"## {title(*case[0].subject)}", "", str(case[0].subject[0]), *report.table(headings, rows)]


def as_dict(cases: Sequence[Sequence[Result]], machine: dict, settings: dict) -> dict:
    names = ("maps", "queries", "reference_width")
    sizes = {size.name: {name: getattr(size, name) for name in names} for size, _ in (c[0].subject for c in cases)}
    rows = [row for case in cases for row in case_rows(case, machine)]
    return {"benchmark": "kernels", "machine": machine, "settings": settings, "sizes": sizes, "results": rows}


HOW = "How this is measured and what the columns mean: docs/benchmarks.md."


def as_markdown(cases: Sequence[Sequence[Result]], machine: dict) -> list[str]:
    tables = [case_rows(case, machine) for case in cases]
    better = [next((row for row in rows if row.get("better_openvino_graph")), {}) for rows in tables]
    columns = ["", *(result.name for result in cases[0]), *["OpenVINO, better graph"] * any(better)]
    rows = [[title(*case[0].subject), *map(_summary, rows), *[_summary(best)] * any(better)]
            for case, rows, best in zip(cases, tables, better)]  # fmt: skip
    lines = ["# Key-aware deformable attention: kernels", "", report.machine_text(machine), "", HOW, ""]
    lines += ["Median in milliseconds, and how many times our op's it is:", *report.table(columns, rows)]
    return lines + [line for case in cases for line in case_table(case, machine)]


def _summary(row: dict) -> str:
    ratio = row.get("times_op") if row.get("contender") != OUR_OP else None
    return three_digits(row.get("median_ms")) + (f" ({three_digits(ratio)}x)" if ratio else "")


def draw(cases: Sequence[Sequence[Result]], machine: dict, path: Path) -> None:
    """Save a PNG with one panel for each case."""
    from matplotlib.figure import Figure

    columns = min(2, len(cases))
    rows = math.ceil(len(cases) / columns)
    height = 0.9 + 0.3 * len(cases[0])
    figure = Figure(figsize=(7 * columns, 0.8 + height * rows), layout="constrained")
    for place, case in enumerate(cases, 1):
        axes = figure.add_subplot(rows, columns, place)
        bars = [{result.name: result.median * 1e3} if result.seconds else {} for result in case]
        colours = {result.name: report.COLOURS[result.name != OUR_OP] for result in case}
        report.draw_bars(axes, [result.name for result in case], bars, colours)
        axes.set_title(title(*case[0].subject), fontsize=10)
        if timed := [result.median * 1e3 for result in case if result.seconds]:
            axes.set(xscale="log", xlim=(min(timed) / 2, max(timed) * 3))  # room for the texts behind the bars
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("median, milliseconds, log scale", fontsize=8)
    on = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {machine['cores']} cores, float32"
    figure.suptitle(f"One key-aware deformable attention\n{on}, {machine['date'][:10]}", fontsize=11)
    figure.savefig(path, format="png", dpi=150)


# The command


def chosen(text: str | None, names: Iterable[str], option: str) -> list[str]:
    """Return the names in a comma-separated list, in their own order; all when it is empty."""
    names = list(names)
    wanted = {part.strip().lower() for part in (text or "").split(",") if part.strip()}
    if unknown := wanted - {name.lower() for name in names}:
        raise LiteDetrError(f"{option} has {', '.join(sorted(unknown))}; there are {', '.join(names)}.")
    return [name for name in names if not wanted or name.lower() in wanted]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time one key-aware deformable attention: our op, and what else can compute it. Every output is "
        "checked before it is timed; a wrong one is not timed, and the exit status is 1.",
        epilog="Run it on a quiet machine. Everything takes about a quarter of an hour; Ctrl-C leaves what was "
        "measured so far on the screen, and finished cases in the files of --output.",
    )
    add = parser.add_argument
    add("--device", choices=RIVALS, default="cpu", help="where to measure; default cpu")
    add("--sizes", help=f"separated by commas: {', '.join(SIZES)}; default all")
    names = "; ".join(f"{device}: {', '.join(rival.name for rival in rivals)}" for device, rivals in RIVALS.items())
    add("--only", help=f"contenders, separated by commas: {names}; default all")
    add("--threads", help="cpu: numbers of threads, separated by commas; default 1,2")
    add("--batches", help="cuda: numbers of images, separated by commas; default 1,4,16")
    add("--dtypes", help=f"cuda: types, separated by commas: {', '.join(DTYPES)}; default all")
    add("--deformable-detr", type=Path, metavar="FOLDER", help="cuda: a checkout of Deformable DETR, whose kernel is "
        "compiled and timed as well; needs nvcc and ninja")  # fmt: skip
    add("--seconds", type=float, help="time for each contender on each size, number of threads, batch and type; slow "
        f"ones take what {timing.FEWEST} calls need; default 5, cuda: 0.5")  # fmt: skip
    add("--cold", action="store_true", help="time calls with overwritten caches as well")
    add("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png as well, for instance "
        "benchmarks/results/kernels")  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        check_options(options)
        return _run(options)
    except (LiteDetrError, RuntimeError) as error:  # of the native library
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: these are the calls made so far; files have the cases before this one", file=sys.stderr)
        return 130


def check_options(options: argparse.Namespace) -> None:
    """Raise LiteDetrError where options do not go together, or ask for what is not there: now, not after an hour."""
    for name in {"cpu": ("batches", "dtypes", "deformable_detr"), "cuda": ("threads",)}[options.device]:
        if getattr(options, name) is not None:
            wrong = f"--{name.replace('_', '-')} is not for --device {options.device}"
            raise LiteDetrError(f"{wrong}: leave it out, or choose the other device.")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise LiteDetrError(
            f"--device is cuda and PyTorch {torch.__version__} finds no CUDA device: run it on a machine with an "
            "NVIDIA GPU, its driver, and a PyTorch that was built with CUDA."
        )
    if options.seconds is not None and not options.seconds >= 0:
        raise LiteDetrError(f"--seconds is {options.seconds}; it must be 0 or more.")
    if options.deformable_detr and not (options.deformable_detr / DEFORMABLE_DETR_SOURCE).is_dir():
        raise LiteDetrError(
            f"--deformable-detr is {options.deformable_detr}, which has no folder {DEFORMABLE_DETR_SOURCE}; it must be "
            "a checkout of the Deformable-DETR repository."
        )
    if options.output is not None:
        with contextlib.suppress(OSError):  # which is said next
            options.output.parent.mkdir(parents=True, exist_ok=True)
        check_writable(options.output.parent)


def _run(options: argparse.Namespace) -> int:
    on_cpu = options.device == "cpu"
    names = [rival.name for rival in RIVALS[options.device]] + [DEFORMABLE_DETR] * bool(options.deformable_detr)
    names = chosen(options.only, names, "--only")
    sizes = [SIZES[name] for name in chosen(options.sizes, SIZES, "--sizes")]
    thread_counts: list = [None]
    if on_cpu:
        both = "1,2" if timing.usable_cores() > 1 else "1"
        thread_counts = timing.whole_numbers(options.threads or both, "--threads")
        timing.check_threads(thread_counts)
    else:
        batches = timing.whole_numbers(options.batches or "1,4,16", "--batches")
        types = chosen(options.dtypes, DTYPES, "--dtypes")
        sizes = [replace(size, batch=batch, dtype=dtype) for size in sizes for batch in batches for dtype in types]
    rivals = [rival for rival in RIVALS[options.device] if rival.name in names]
    kernel = {"op_kernel": native.load_core().kda_cpu_isa().decode()}
    machine = timing.machine(PACKAGES) | (kernel if on_cpu else {"gpu": timing.device()})
    if DEFORMABLE_DETR in names:
        rivals += deformable_detr(options.deformable_detr)
    elif not on_cpu and not options.deformable_detr:
        print(f"no {DEFORMABLE_DETR}: give --deformable-detr a checkout of it", file=sys.stderr)
    print(report.machine_text(machine), flush=True)
    seconds = (5.0 if on_cpu else 0.5) if options.seconds is None else options.seconds
    # Graphs keep their memory: on a GPU, contenders must not meet.
    settings = harness.Settings(seconds, len(rivals) if on_cpu else 1, options.cold)
    described = {"device": options.device, "seconds": seconds, "threads": thread_counts, "cold": options.cold}
    cases: list[list[Result]] = []

    def write(draw_chart: Callable[[Path], None] | None = None) -> list[Path]:
        contents, lines = as_dict(cases, machine, described), as_markdown(cases, machine)
        return report.write(options.output, contents, lines, draw_chart)

    for size in sizes:
        problem = Problem(size, options.device)
        for threads in thread_counts:
            cases.append([])
            contenders = [Attention(rival, problem, threads) for rival in rivals]
            try:
                harness.measure(contenders, settings, partial(_show, title(size, threads)), results=cases[-1])
            finally:
                _show("", "")
                print("\n".join(case_table(cases[-1], machine)), flush=True)
            if options.output is not None:  # a device that hangs in the next case must not take this one along
                write()
    print(f"\n{HOW}")
    if options.output is not None:
        paths = write(partial(draw, cases, machine))
        print("wrote", ", ".join(map(str, paths)))
        if len(paths) == 2:
            print("no chart: matplotlib is missing: pip install 'litedetr-deploy[benchmark]'", file=sys.stderr)
    results = [result for case in cases for result in case]
    return int(any(r.status == harness.WRONG or (r.name == OUR_OP and not r.seconds) for r in results))


def _show(what: str, stage: str) -> None:
    """Replace the last line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{what}{what and ': '}{stage}", end="", file=sys.stderr, flush=True)
