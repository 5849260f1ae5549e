"""One attention op against what else can compute it, on the CPU or on a GPU: contenders, tables and the command.

Every contender gets what the op gets, raw offsets and reference points included, and its output is compared with the
definition in float64 before its time counts.  On a GPU this needs PyTorch and nothing else, not even numpy.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import logging
import math
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import LiteDetrError
from ..files import check_writable
from ..ops import native, reference, torch_op
from . import harness, official, report, timing
from .harness import Result, Settings
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
    def queries(self) -> int:
        """Of one image."""
        return self.boxes or sum(height * width for height, width in self.maps[self.first_level :])

    @property
    def tokens(self) -> int:
        """Of one image."""
        return sum(height * width for height, width in self.maps)

    @property
    def reference_width(self) -> int:
        return 4 if self.boxes else 2

    @property
    def bytes_gathered(self) -> int:
        """Four corners of D channels for every sample, each read once: key and value are the same tokens."""
        return self._samples * 4 * HEAD_DIM * DTYPES[self.dtype].itemsize

    @property
    def bytes_compulsory(self) -> int:
        """Every input read once and the output written once; the references are float32."""
        rows = self.batch * self.queries
        elements = 2 * rows * CHANNELS + self.batch * self.tokens * CHANNELS + 2 * self._samples
        return elements * DTYPES[self.dtype].itemsize + rows * len(self.maps) * self.reference_width * 4

    @property
    def flop(self) -> int:
        """2 for each of 6 D multiply-adds a sample: D for every corner, D for the logit, D for the output."""
        return self._samples * 6 * HEAD_DIM * 2

    @property
    def _samples(self) -> int:
        return self.batch * self.queries * HEADS * len(self.maps) * POINTS

    @property
    def title(self) -> str:
        return self.name if self.batch == 1 else f"{self.name}, batch {self.batch}"

    def __str__(self) -> str:
        maps = ", ".join(f"{height}x{width}" for height, width in self.maps)
        return (
            f"{self.queries:,} {'boxes' if self.boxes else 'tokens'} as queries, maps {maps}; "
            f"{self.bytes_gathered / 1e6:.0f} MB gathered, {self.bytes_compulsory / 1e6:.0f} MB read and written at "
            f"the least, {self.flop / 1e6:.0f} MFLOP"
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
    n, q, dtype = size.batch, size.queries, DTYPES[size.dtype]
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    directions = torch.stack((angles.cos(), angles.sin()), -1)[:, None, None]  # [M, 1, 1, 2]
    distances = torch.arange(1.0, POINTS + 1)[:, None]  # [P, 1]
    strayed = 1.5 * torch.randn(n, q, HEADS, len(size.maps), POINTS, 2, generator=generator)
    return {
        "query": torch.randn(n, q, CHANNELS, generator=generator).to(dtype),
        "value": torch.randn(n, size.tokens, CHANNELS, generator=generator).to(dtype),
        "reference_points": _random_boxes(size, generator) if size.boxes else _token_centres(size),
        "sampling_offsets": (directions * distances + strayed).flatten(2).to(dtype),
    }


def _token_centres(size: Size) -> Tensor:
    """[N, Q, L, 2]"""
    centres = []
    for height, width in size.maps[size.first_level :]:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        centres.append(torch.stack((x.flatten(), y.flatten()), -1))
    return torch.cat(centres)[None, :, None].repeat(size.batch, 1, len(size.maps), 1)


def _random_boxes(size: Size, generator: torch.Generator) -> Tensor:
    """[N, Q, L, 4], sides from 2 % to 60 % of the image, small ones as frequent as large ones"""
    centres = torch.rand(size.batch, size.boxes, 2, generator=generator)
    sides = 0.02 * 30 ** torch.rand(size.batch, size.boxes, 2, generator=generator)
    return torch.cat((centres, sides), -1)[:, :, None].repeat(1, 1, len(size.maps), 1)


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
        rest = {name: tensor for name, tensor in self.inputs.items() if name != "query"}
        # Of the op that is given its logits.
        self.plain_inputs = {"attention_logits": logits.to(device, DTYPES[size.dtype])} | rest

    @functools.cached_property
    def answer(self) -> tuple[Tensor, float]:
        """What is right for the checked queries, [1, checked queries, M*D] in float64, and how far off one may be."""
        return self._answer(reference.key_aware_deform_attn, self.inputs)

    @functools.cached_property
    def plain_answer(self) -> tuple[Tensor, float]:
        return self._answer(reference.ms_deform_attn, self.plain_inputs)

    @functools.cached_property
    def pytorch_answer(self) -> tuple[Tensor, float]:
        wanted, tolerance = self.answer
        given: dict[str, Any] = self._few(self.inputs) | self._rest
        error = largest_difference(official.key_aware_deform_attn(**given), wanted)
        return wanted, max(tolerance, self.PYTORCH_TOLERANCE * error)

    @property
    def _rest(self) -> dict[str, Any]:
        return {"spatial_shapes": self.spatial_shapes.cpu(), "num_heads": HEADS, "num_points": POINTS}

    def _answer(self, definition: Callable[..., Tensor], inputs: dict[str, Tensor]) -> tuple[Tensor, float]:
        few = self._few(inputs)
        wanted = definition(**{name: tensor.double() for name, tensor in few.items()}, **self._rest)
        return wanted, self.TOLERANCE * largest_difference(definition(**few, **self._rest), wanted)

    def _few(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the inputs of the checked queries, on the CPU."""
        last = {name: tensor[-1:].cpu() for name, tensor in inputs.items()}
        return {name: tensor if name == "value" else tensor[:, self.checked] for name, tensor in last.items()}

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


@dataclass(frozen=True)
class Rival:
    """One way to compute the attention.

    make: given a problem and a number of threads of the CPU, returns the call to be timed, which returns the output.
    packages: without which it cannot run.  plain: it is given attention logits, or weights, instead of a query.
    pytorch: it is made of PyTorch's operators: samples and logits are stored in the tensors' type.
    """

    name: str
    make: Callable[[Problem, int], Callable[[], Any]]
    packages: tuple[str, ...] = ()
    plain: bool = False
    pytorch: bool = False


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
        problem, rival = self.problem, self.rival
        answer = problem.plain_answer if rival.plain else problem.pytorch_answer if rival.pytorch else problem.answer
        wanted, tolerance = answer
        error = problem.error(self.call(), wanted)
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
    """Return the ONNX model that the package exports for one attention: 'op', 'gridsample' or 'gather'."""
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
    from ..runtime.session import create_session  # which needs numpy

    session = create_session(onnx_model(problem.size, attention), threads=threads)
    feed = {name: tensor.numpy() for name, tensor in problem.inputs.items()}
    return lambda: session.run(None, feed)[0]


def openvino_call(attention: str, problem: Problem, threads: int):
    import openvino

    from .contender import compile_openvino  # which needs numpy

    model = openvino.Core().read_model(onnx_model(problem.size, attention), b"")
    compiled = compile_openvino(model, threads)
    feed = {name: tensor.numpy() for name, tensor in problem.inputs.items()}
    return lambda: compiled(feed, share_inputs=True, share_outputs=True)[0]  # no copies


def torch_call(function: Callable[..., Tensor], problem: Problem, threads: int, plain: bool = False, **options):
    inputs = problem.plain_inputs if plain else problem.inputs
    rest = {"spatial_shapes": problem.spatial_shapes, "num_heads": HEADS, "num_points": POINTS} | options

    def call():
        with torch.inference_mode():
            return function(**inputs, **rest)

    torch.set_num_threads(threads)
    return call


def torch_op_call(problem: Problem, threads: int):
    return torch_call(torch.ops.litedetr.key_aware_deform_attn, problem, threads)


def plain_op_call(problem: Problem, threads: int):
    return torch_call(torch.ops.litedetr.ms_deform_attn, problem, threads, plain=True)


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
    size, inputs, shapes = problem.size, problem.plain_inputs, problem.spatial_shapes
    places = inputs["reference_points"], inputs["sampling_offsets"]
    locations = official.sampling_locations(*places, shapes, HEADS, POINTS)
    areas = shapes.prod(1)
    arguments = (
        inputs["value"].float().view(size.batch, size.tokens, HEADS, HEAD_DIM),
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
        source, build = Path(folder, "src"), Path(folder, "build")
        shutil.copytree(checkout / DEFORMABLE_DETR_SOURCE, source)
        build.mkdir()
        files = [path for path in sorted(source.rglob("*")) if path.is_file()]
        for path in files:
            text = path.read_text()
            for old, new in DEFORMABLE_DETR_PATCHES.items():
                text = text.replace(old, new)
            path.write_text(text)
        return cpp_extension.load(
            "MultiScaleDeformableAttention",
            [str(path) for path in files if path.suffix in (".cpp", ".cu")],
            extra_include_paths=[str(source)],
            extra_cflags=["-DWITH_CUDA"],
            extra_cuda_cflags=["-DWITH_CUDA"],
            build_directory=str(build),
        )


def deformable_detr(checkout: Path) -> list[Rival]:
    """Return Deformable DETR's kernel; none, and say why on stderr, where it does not compile."""
    print(f"compiling {checkout / DEFORMABLE_DETR_SOURCE}: a minute or two", file=sys.stderr)
    try:
        extension = build_deformable_detr(checkout)
    except (OSError, RuntimeError, ImportError) as error:  # the others can be timed without it
        print(f"no {DEFORMABLE_DETR}: {error}", file=sys.stderr)
        return []
    return [Rival(DEFORMABLE_DETR, functools.partial(deformable_detr_call, extension), plain=True)]


ONNX, OUR_OP = ("onnx", "onnxscript"), "op"
OPENVINO = ("OpenVINO GridSample", "OpenVINO gather")
PYTORCH = (
    Rival("PyTorch official form", official_call, pytorch=True),
    Rival("PyTorch sampling once", functools.partial(official_call, once=True), pytorch=True),
    Rival("torch.compile", compiled_call, pytorch=True),
)
RIVALS = {
    "cpu": (
        Rival(OUR_OP, functools.partial(onnxruntime_call, "op"), ("onnxruntime", *ONNX)),
        Rival("torch op", torch_op_call),
        Rival("ORT GridSample", functools.partial(onnxruntime_call, "gridsample"), ("onnxruntime", *ONNX)),
        Rival("ORT gather", functools.partial(onnxruntime_call, "gather"), ("onnxruntime", *ONNX)),
        Rival(OPENVINO[0], functools.partial(openvino_call, "gridsample"), ("openvino", *ONNX)),
        Rival(OPENVINO[1], functools.partial(openvino_call, "gather"), ("openvino", *ONNX)),
        *PYTORCH,
    ),
    "cuda": (Rival(OUR_OP, torch_op_call), Rival("plain op", plain_op_call, plain=True), *PYTORCH),
}
DEFORMABLE_DETR = "Deformable DETR FP32 kernel"  # for a GPU, where its source is given


# Reports


def cases_of(results: Sequence[Result]) -> list[list[Result]]:
    """Return the results of each size and number of threads, in order."""
    cases: dict = {}
    for result in results:
        cases.setdefault(result.subject, []).append(result)
    return list(cases.values())


def case_title(case: Sequence[Result]) -> str:
    size, threads = case[0].subject
    return f"{size.title}, {size.dtype if threads is None else f'{threads} thread' + 's' * (threads > 1)}"


def better_openvino(case: Sequence[Result]) -> Result | None:
    """Return the faster of OpenVINO's graphs, where both have a time."""
    both = [result for result in case if result.name in OPENVINO and result.seconds]
    return min(both, key=lambda result: result.median) if len(both) == len(OPENVINO) else None


def numbers(result: Result, case: Sequence[Result], machine: dict) -> dict:
    """Return what is derived from a result's times, by its name in the JSON report; a ratio without our op is None."""
    if not result.seconds:
        return {}
    size, _ = result.subject
    found = {name: value for name, value in result.milliseconds().items() if name != "p99_ms"}
    found |= {
        "gigabytes_per_second": size.bytes_gathered / result.median / 1e9,
        "gigaflop_per_second": size.flop / result.median / 1e9,
    }
    if "gpu" in machine:
        found["of_l2"] = found["gigabytes_per_second"] / machine["gpu"]["l2_gigabytes_per_second"]
        if result.cold_seconds:
            rate = size.bytes_compulsory / found["cold_median_ms"] / 1e6
            found["of_memory"] = rate / machine["gpu"]["memory_gigabytes_per_second"]
    ours = next((other.median for other in case if other.name == OUR_OP and other.seconds), None)
    return found | {"times_op": ours and result.median / ours}


COLUMNS = {  # of the tables: their headings, by the names in the JSON report
    "median_ms": "median ms", "p90_ms": "p90 ms", "cold_median_ms": "cold ms", "cold_p90_ms": "cold p90",
    "calls": "calls", "gigabytes_per_second": "GB/s", "of_l2": "of L2", "of_memory": "of memory",
    "gigaflop_per_second": "GFLOP/s", "times_op": "times op",
}  # fmt: skip


def case_table(case: Sequence[Result], machine: dict) -> list[str]:
    """Return the lines of a case's section."""
    found = [numbers(result, case, machine) for result in case]
    columns = [name for name in COLUMNS if any(name in each for each in found)] or ["median_ms"]
    rows = []
    for result, each in zip(case, found):
        name = result.name + (" (better)" if result is better_openvino(case) else "")
        cells = [_cell(column, each.get(column)) for column in columns]
        rows.append([name, *cells, f"{result.figures['error']:.0e}"] if each else [name, result.remark])
    headings = ["contender", *(COLUMNS[name] for name in columns), "error"]
    return ["", f"## {case_title(case)}", "", str(case[0].subject[0]), *report.table(headings, rows)]


def _cell(name: str, number: float | None) -> str:
    if name == "calls" and number:
        return str(number)
    return f"{100 * number:.0f} %" if name.startswith("of_") and number is not None else three_digits(number)


def as_dict(results: Sequence[Result], machine: dict, settings: dict) -> dict:
    rows = []
    for case in cases_of(results):
        size, threads = case[0].subject
        for result in case:
            what = {"size": size.name, "batch": size.batch, "dtype": size.dtype, "threads": threads}
            work = {name: getattr(size, name) for name in ("bytes_gathered", "bytes_compulsory", "flop")}
            found = numbers(result, case, machine)
            if found:
                found["better_openvino_graph"] = result is better_openvino(case)
            checked = {"error": None, "tolerance": None, "right": None} | result.figures
            rows.append(what | {"contender": result.name} | work | found | checked | {"trouble": result.trouble})
    sizes = {
        size.name: {
            "maps": list(map(list, size.maps)),
            "queries": size.queries,
            "reference_width": size.reference_width,
        }
        for size, _ in dict.fromkeys(result.subject for result in results)
    }
    return {"benchmark": "kernels", "machine": machine, "settings": settings, "sizes": sizes, "results": rows}


HOW = (
    f"One attention of {HEADS} heads of {HEAD_DIM} channels, {POINTS} points a level; the arithmetic of reference "
    f"points and the softmax are included. GB/s counts samples x 4 corners x {HEAD_DIM} channels x the bytes of one, "
    f"GFLOP/s counts samples x 6 x {HEAD_DIM} multiply-adds x 2: what the task needs, not what each contender spends. "
    f"'error' is the largest difference from the definition in float64 on {Problem.CHECKED_QUERIES} queries. "
)
HOW_ON = {
    "cpu": HOW
    + "Batch 1, float32. Calls of all contenders alternate; before each short one comes an untimed one of its own, or, "
    "for 'cold', the caches are overwritten.",
    "cuda": HOW
    + "Contenders come one after another, each as a CUDA graph, whose replays are timed between two events on a device "
    "that waits until the host is done; before each comes an untimed one, or, for 'cold', the L2 cache is overwritten. "
    "'of L2' is GB/s as a share of a copy within the L2 cache (above 100 %: the L1 caches help), 'of memory' what must "
    "be read and written once, by the cold time, as a share of a copy in memory; both copies were measured in the same "
    "run, reads and writes counted. The plain op is given its logits, and so does less. So does the "
    f"{DEFORMABLE_DETR}, whose sampling locations and attention weights are computed before, and which computes in "
    "float32 whatever the others do. PyTorch's grid_sample runs in float32, as autocast has it.",
}


def as_markdown(results: Sequence[Result], machine: dict) -> list[str]:
    cases = cases_of(results)
    names = list(dict.fromkeys(result.name for result in results))
    better = [better_openvino(case) for case in cases]
    rows = []
    for case, best in zip(cases, better):
        by_name = {result.name: result for result in case}
        shown = [by_name.get(name) for name in names] + [best] * any(better)
        rows.append([case_title(case), *(_summary(result, case) for result in shown)])
    how = HOW_ON["cuda" if "gpu" in machine else "cpu"]
    lines = ["# Key-aware deformable attention: kernels", "", report.machine_text(machine), "", how, ""]
    lines += ["Median in milliseconds, and how many times our op's it is:"]
    lines += report.table(["", *names, *["OpenVINO, better graph"] * any(better)], rows)
    return lines + [line for case in cases for line in case_table(case, machine)]


def _summary(result: Result | None, case: Sequence[Result]) -> str:
    if result is None or not result.seconds:
        return "-"
    ratio = numbers(result, case, {})["times_op"]
    return three_digits(result.median * 1e3) + (f" ({three_digits(ratio)}x)" if ratio and result.name != OUR_OP else "")


def draw(results: Sequence[Result], machine: dict, path: Path) -> None:
    """Save a PNG with one panel for each size and number of threads, or type."""
    from matplotlib.figure import Figure

    cases = cases_of(results)
    columns = min(2, len(cases))
    rows = math.ceil(len(cases) / columns)
    height = 0.9 + 0.3 * max(map(len, cases))
    figure = Figure(figsize=(7 * columns, 0.8 + height * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flat
    for axes, case in zip(panels, cases):
        bars = [{result.name: result.median * 1e3} if result.seconds else {} for result in case]
        colours = {result.name: report.COLOURS[result.name != OUR_OP] for result in case}
        report.draw_bars(axes, [result.name for result in case], bars, colours)
        axes.set_title(case_title(case), fontsize=10)
        if timed := [result.median * 1e3 for result in case if result.seconds]:
            axes.set_xscale("log")
            axes.set_xlim(min(timed) / 2, max(timed) * 3)  # room for the texts behind the bars
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
        axes.set_xlabel("median, milliseconds, log scale", fontsize=8)
    for axes in panels:
        axes.set_visible(False)
    on = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {machine['cores']} cores, float32"
    figure.suptitle(f"One key-aware deformable attention\n{on}, {machine['date'][:10]}", fontsize=11)
    figure.savefig(path, format="png", dpi=150)


# The command


def chosen(text: str | None, names: Iterable[str], option: str) -> list[str]:
    """Return the names in a comma-separated list, in their own order; all when the list is empty.

    Raises LiteDetrError where one is unknown.
    """
    names = list(names)
    wanted = {part.strip().lower() for part in (text or "").split(",") if part.strip()}
    if unknown := wanted - {name.lower() for name in names}:
        raise LiteDetrError(f"{option} has {', '.join(sorted(unknown))}; there are {', '.join(names)}.")
    return [name for name in names if not wanted or name.lower() in wanted]


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time one key-aware deformable attention: our op, and what else can compute it: on the CPU "
        "standard operators in ONNX Runtime and in OpenVINO, PyTorch, and torch.compile; on a GPU PyTorch, "
        "torch.compile, and the CUDA kernel of Deformable DETR. Every output is checked before it is timed; a wrong "
        "one is not timed, and the exit status is 1.",
        epilog="Run it on a quiet machine. Everything takes about a quarter of an hour; Ctrl-C leaves what was "
        "measured so far on the screen.",
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
        return _run(options)
    except (LiteDetrError, RuntimeError) as error:  # of the native library
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace) -> int:
    check_options(options)
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
        dtypes = chosen(options.dtypes, DTYPES, "--dtypes")
        sizes = [dataclasses.replace(size, batch=batch, dtype=dtype)
                 for size in sizes for batch in batches for dtype in dtypes]  # fmt: skip
    kernel = native.load_core().kda_cpu_isa().decode()
    rivals = [rival for rival in RIVALS[options.device] if rival.name in names]
    machine = timing.machine(PACKAGES) | ({"op_kernel": kernel} if on_cpu else {"gpu": timing.device()})
    if DEFORMABLE_DETR in names:
        rivals += deformable_detr(options.deformable_detr)
    elif not on_cpu and not options.deformable_detr:
        print(f"no {DEFORMABLE_DETR}: give --deformable-detr a checkout of it", file=sys.stderr)
    print(report.machine_text(machine), flush=True)
    seconds = (5.0 if on_cpu else 0.5) if options.seconds is None else options.seconds
    # Graphs keep their memory: on a GPU, contenders must not meet.
    settings = Settings(seconds, len(rivals) if on_cpu else 1, options.cold)
    results: list[Result] = []
    for size in sizes:
        problem = Problem(size, options.device)
        for threads in thread_counts:
            case: list[Result] = []
            contenders = [Attention(rival, problem, threads) for rival in rivals]
            try:
                harness.measure(contenders, settings, functools.partial(_show, size.title), results=case)
            except KeyboardInterrupt:
                print("interrupted: these are the calls made so far; no file was written", file=sys.stderr)
                return 130
            finally:
                _show("", "")
                print("\n".join(case_table(case, machine)), flush=True)
            results += case
    print(f"\n{HOW_ON[options.device]}")
    if options.output is not None:
        described = {"device": options.device, "seconds": seconds, "threads": thread_counts, "cold": options.cold}
        contents, lines = as_dict(results, machine, described), as_markdown(results, machine)
        paths = report.write(options.output, contents, lines, functools.partial(draw, results, machine))
        print("wrote", ", ".join(map(str, paths)))
        if len(paths) == 2:
            print("no chart: matplotlib is missing: pip install 'litedetr-deploy[benchmark]'", file=sys.stderr)
    broken = any(result.name == OUR_OP and not result.seconds for result in results)
    return 1 if broken or any(result.status == harness.WRONG for result in results) else 0


def check_options(options: argparse.Namespace) -> None:
    """Raise LiteDetrError where options do not go together, or ask for what is not there: now, not after an hour."""
    others = {"cpu": ("batches", "dtypes", "deformable_detr"), "cuda": ("threads",)}[options.device]
    for name in others:
        if getattr(options, name) is not None:
            option = "--" + name.replace("_", "-")
            raise LiteDetrError(
                f"{option} is not for --device {options.device}: leave it out, or choose the other device."
            )
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
        folder = options.output.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise LiteDetrError(f"{folder} cannot be made: {error.strerror}. Choose another folder.") from None
        check_writable(folder)


def _show(title: str, stage: str) -> None:
    """Replace the last line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{title}{title and ': '}{stage}", end="", file=sys.stderr, flush=True)
