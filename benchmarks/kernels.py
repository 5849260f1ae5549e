"""Times one key-aware deformable attention, our op against what else can compute it, on the CPU or on a GPU.

Every contender gets what the op gets, raw offsets and reference points included, and its output is compared with the
definition in float64 before its time counts.  Run `python benchmarks/kernels.py --help`.

On a GPU it needs PyTorch and nothing else; without matplotlib there is no chart.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import logging
import math
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1]))  # the package as it lies here, where none is installed

import torch
import torch.nn.functional as F
from torch import Tensor

import litedetr_deploy as ld
from litedetr_deploy.benchmark import timing
from litedetr_deploy.files import replaced_when_done
from litedetr_deploy.ops import reference, torch_op

HEADS, HEAD_DIM, POINTS = 8, 32, 4
CHANNELS = HEADS * HEAD_DIM
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PACKAGES = ("litedetr-deploy", "torch", "triton", "onnxruntime", "openvino", "onnx", "onnxscript", "numpy")


# Sizes and inputs


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
    def query_kind(self) -> str:
        return "boxes" if self.boxes else "tokens"

    def __str__(self) -> str:
        maps = ", ".join(f"{height}x{width}" for height, width in self.maps)
        return (
            f"{self.queries:,} {self.query_kind} as queries, maps {maps}; {self.bytes_gathered / 1e6:.0f} MB gathered, "
            f"{self.bytes_compulsory / 1e6:.0f} MB read and written at the least, {self.flop / 1e6:.0f} MFLOP"
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


@dataclass(frozen=True)
class Answer:
    """What is right for the checked queries, and how far from it an output may be."""

    wanted: Tensor  # [1, checked queries, M*D], float64
    tolerance: float


class Problem:
    """A size with its inputs on a device, and with the right answers for some queries of the last image."""

    CHECKED_QUERIES = 256  # a query's output depends on no other query
    # Contenders round coordinates and sums in other orders than PyTorch does.  What is wrong is off by far more.
    TOLERANCE = 10  # times the error of the definition in the type of the tensors
    PYTORCH_TOLERANCE = 3  # times the error of PyTorch's operators on the CPU, which store samples and logits in it

    def __init__(self, size: Size, device: str = "cpu"):
        self.size = size
        self.device = device
        self.inputs = {name: tensor.to(device) for name, tensor in make_inputs(size).items()}
        self.spatial_shapes = torch.tensor(size.maps, device=device)
        self.map_sizes = self.spatial_shapes.flip(1).float()  # [L, 2]: width, height
        generator = torch.Generator().manual_seed(1)
        self.checked = torch.randperm(size.queries, generator=generator)[: self.CHECKED_QUERIES]

    @functools.cached_property
    def logits(self) -> Tensor:
        """Attention logits, [N, Q, M*L*P], for those who do not compute them."""
        size, generator = self.size, torch.Generator().manual_seed(2)
        logits = torch.randn(size.batch, size.queries, HEADS * len(size.maps) * POINTS, generator=generator)
        return logits.to(self.device, DTYPES[size.dtype])

    @property
    def plain_inputs(self) -> dict[str, Tensor]:
        """The inputs of the op that is given its logits."""
        rest = {name: tensor for name, tensor in self.inputs.items() if name != "query"}
        return {"attention_logits": self.logits} | rest

    @functools.cached_property
    def answer(self) -> Answer:
        return self._answer(reference.key_aware_deform_attn, self.inputs)

    @functools.cached_property
    def plain_answer(self) -> Answer:
        return self._answer(reference.ms_deform_attn, self.plain_inputs)

    @functools.cached_property
    def pytorch_answer(self) -> Answer:
        output = attend_sampling_once(**self._few(self.inputs), maps=self.size.maps, map_sizes=self.map_sizes.cpu())
        wanted, tolerance = self.answer.wanted, self.answer.tolerance
        return Answer(wanted, max(tolerance, self.PYTORCH_TOLERANCE * largest_difference(output, wanted)))

    def _answer(self, definition: Callable[..., Tensor], inputs: dict[str, Tensor]) -> Answer:
        define = functools.partial(
            definition, spatial_shapes=self.spatial_shapes.cpu(), num_heads=HEADS, num_points=POINTS
        )
        few = self._few(inputs)
        wanted = define(**{name: tensor.double() for name, tensor in few.items()})
        return Answer(wanted, self.TOLERANCE * largest_difference(define(**few), wanted))

    def _few(self, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of the checked queries, on the CPU."""
        last = {name: tensor[-1:].cpu() for name, tensor in inputs.items()}
        return {name: tensor if name == "value" else tensor[:, self.checked] for name, tensor in last.items()}

    def error(self, output, answer: Answer) -> float:
        """The largest difference of a whole output, [N, Q, M*D], from the definition in float64."""
        output = torch.as_tensor(output)
        wanted_shape = (self.size.batch, self.size.queries, CHANNELS)
        if output.shape != wanted_shape:
            raise ValueError(f"the output has shape {list(output.shape)}; it should be {list(wanted_shape)}")
        return largest_difference(output[-1:].cpu()[:, self.checked], answer.wanted)


def largest_difference(output: Tensor, wanted: Tensor) -> float:
    return (output.double() - wanted).abs().max().item()

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

    make: given a problem and a number of threads of the CPU, returns the call to be timed, which returns the output.
    """

    name: str
    make: Callable[[Problem, int], Callable[[], object]]
    packages: tuple[str, ...] = ()  # importable names without which it cannot run
    plain: bool = False  # it is given attention logits, or weights, instead of a query
    pytorch: bool = False  # it is made of PyTorch's operators: samples and logits are stored in the tensors' type

    def answer(self, problem: Problem) -> Answer:
        return problem.plain_answer if self.plain else problem.pytorch_answer if self.pytorch else problem.answer


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
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(core.read_model(onnx_model(problem.size, attention), b""), "CPU", settings)
    feed = {name: tensor.numpy() for name, tensor in problem.inputs.items()}
    return lambda: compiled(feed, share_inputs=True, share_outputs=True)[0]  # no copies


def torch_op_call(problem: Problem, threads: int):
    return torch_call(our_op(torch.ops.litedetr.key_aware_deform_attn, problem), problem.inputs, threads)


def plain_op_call(problem: Problem, threads: int):
    return torch_call(our_op(torch.ops.litedetr.ms_deform_attn, problem), problem.plain_inputs, threads)


def our_op(op: Callable[..., Tensor], problem: Problem) -> Callable[..., Tensor]:
    return functools.partial(op, spatial_shapes=problem.spatial_shapes, num_heads=HEADS, num_points=POINTS)


def torch_call(function: Callable[..., Tensor], inputs: dict[str, Tensor], threads: int):
    def call():
        with torch.inference_mode():
            return function(**inputs)

    torch.set_num_threads(threads)
    return call


def official_call(problem: Problem, threads: int):
    return torch_call(with_maps(attend_official, problem), problem.inputs, threads)


def sampling_once_call(problem: Problem, threads: int):
    return torch_call(with_maps(attend_sampling_once, problem), problem.inputs, threads)


def compiled_call(problem: Problem, threads: int):
    torch._dynamo.reset()  # else every size counts as a recompilation of the same function, and few are allowed
    # Named, so that code that was compiled for another number of threads is not taken from inductor's disk cache.
    options = {"cpp.threads": threads}
    compiled = torch.compile(attend_sampling_once, fullgraph=True, dynamic=False, options=options)
    return torch_call(with_maps(compiled, problem), problem.inputs, threads)


def with_maps(function: Callable[..., Tensor], problem: Problem) -> Callable[..., Tensor]:
    return functools.partial(function, maps=problem.size.maps, map_sizes=problem.map_sizes)


def attend_official(query, value, reference_points, sampling_offsets, maps, map_sizes):
    """The arithmetic of the official pure-PyTorch code, which samples key and value apart though they are equal."""
    locations = sampling_locations(reference_points, sampling_offsets, map_sizes)
    keys, values = (sample(value, locations, maps) for _ in range(2))
    return attend_samples(query, keys, values)


def attend_sampling_once(query, value, reference_points, sampling_offsets, maps, map_sizes):
    samples = sample(value, sampling_locations(reference_points, sampling_offsets, map_sizes), maps)
    return attend_samples(query, samples, samples)


def sampling_locations(references: Tensor, offsets: Tensor, map_sizes: Tensor) -> Tensor:
    """[N, Q, M, L, P, 2] float32, the map from 0 to 1."""
    n, q, levels, width = references.shape
    offsets = offsets.view(n, q, HEADS, levels, POINTS, 2).float()
    references = references[:, :, None, :, None]
    if width == 2:
        return references + offsets / map_sizes[:, None]
    return references[..., :2] + offsets / POINTS * references[..., 2:] * 0.5


def sample(tokens: Tensor, locations: Tensor, maps: Sequence) -> Tensor:
    """Samples of tokens [N, S, M*D]: [N*M, D, Q, L*P].  In float32 whatever their type, as PyTorch's autocast does."""
    n = tokens.shape[0]
    grids = 2 * locations - 1
    sampled = []
    for level, level_tokens in enumerate(tokens.float().split([height * width for height, width in maps], 1)):
        image = level_tokens.transpose(1, 2).reshape(n * HEADS, HEAD_DIM, *maps[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [N*M, Q, P, 2]
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    return torch.stack(sampled, -2).flatten(-2).to(tokens.dtype)


def attend_samples(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """query [N, Q, M*D], keys and values [N*M, D, Q, L*P] -> [N, Q, M*D]"""
    n, q, channels = query.shape
    query = query.view(n, q, HEADS, 1, HEAD_DIM).transpose(1, 2).flatten(0, 1)  # [N*M, Q, 1, D]
    weights = (query @ keys.permute(0, 2, 1, 3) / math.sqrt(HEAD_DIM)).softmax(-1)
    output = weights @ values.permute(0, 2, 3, 1)  # [N*M, Q, 1, D]
    return output.view(n, HEADS, q, HEAD_DIM).transpose(1, 2).reshape(n, q, channels)


def deformable_detr_call(extension, problem: Problem, threads: int):
    """Deformable DETR's CUDA kernel, which has no 16-bit types: in float32, and with its inputs made beforehand."""
    size, inputs = problem.size, problem.plain_inputs
    locations = sampling_locations(inputs["reference_points"], inputs["sampling_offsets"], problem.map_sizes)
    areas = problem.spatial_shapes.prod(1)
    arguments = (
        inputs["value"].float().view(size.batch, size.tokens, HEADS, HEAD_DIM),
        problem.spatial_shapes,
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


ONNX = ("onnx", "onnxscript")
OUR_OP = "op"
OPENVINO = ("OpenVINO GridSample", "OpenVINO gather")
PYTORCH = (
    Contender("PyTorch official form", official_call, pytorch=True),
    Contender("PyTorch sampling once", sampling_once_call, pytorch=True),
    Contender("torch.compile", compiled_call, pytorch=True),
)
CONTENDERS = {
    "cpu": (
        Contender(OUR_OP, functools.partial(onnxruntime_call, "op"), ("onnxruntime", *ONNX)),
        Contender("torch op", torch_op_call),
        Contender("ORT GridSample", functools.partial(onnxruntime_call, "gridsample"), ("onnxruntime", *ONNX)),
        Contender("ORT gather", functools.partial(onnxruntime_call, "gather"), ("onnxruntime", *ONNX)),
        Contender(OPENVINO[0], functools.partial(openvino_call, "gridsample"), ("openvino", *ONNX)),
        Contender(OPENVINO[1], functools.partial(openvino_call, "gather"), ("openvino", *ONNX)),
        *PYTORCH,
    ),
    "cuda": (Contender(OUR_OP, torch_op_call), Contender("plain op", plain_op_call, plain=True), *PYTORCH),
}
DEFORMABLE_DETR = "Deformable DETR FP32 kernel"  # for a GPU, where its source is given


# Measuring


@dataclass
class Result:
    """One contender on one problem: its times, or why it has none."""

    size: Size
    threads: int | None  # of the CPU; None: on a GPU
    contender: str
    seconds: list[float] = field(default_factory=list)
    cold_seconds: list[float] = field(default_factory=list)
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

    @property
    def series(self) -> str:
        """What differs between the results that a contender has on the same images."""
        return self.size.dtype if self.threads is None else threads_text(self.threads)


def measure(
    problem: Problem,
    threads: int | None,
    contenders: Iterable[Contender],
    budget: float,
    results: list[Result],
    progress: Callable[[str, float], None] = lambda stage, fraction: None,
    cold: bool = False,
) -> None:
    """Appends one `Result` for each contender to `results` at once and then fills them, so that an interruption
    leaves what was measured before it.

    threads: of the CPU; None where the problem lies on a GPU.
    budget: seconds for each contender; one that is too slow for `timing.FEWEST` repetitions takes longer.
    progress: called with what is going on and the fraction that is done.
    cold: see `timing.time_call`; such calls are timed as well, with a budget of their own.
    """
    contenders = list(contenders)
    mine = {contender.name: Result(problem.size, threads, contender.name) for contender in contenders}
    results.extend(mine.values())
    time_call = timing.time_call if problem.device == "cpu" else timing.time_device_call
    calls, counts = {}, {}
    for number, contender in enumerate(contenders):
        progress(f"preparing {contender.name}", number / len(contenders) / 2)
        call = prepare(problem, threads, contender, mine[contender.name])
        if call is not None:
            calls[contender.name] = call
            for is_cold in [False] + [True] * cold:
                counts[contender.name, is_cold] = timing.repetitions(lambda: time_call(call, is_cold), budget)
    order = timing.interleave(counts)
    for number, (name, is_cold) in enumerate(order):
        progress(f"timing {name}", 0.5 + number / len(order) / 2)
        times = mine[name].cold_seconds if is_cold else mine[name].seconds
        times.append(time_call(calls[name], is_cold))


def prepare(problem: Problem, threads: int | None, contender: Contender, result: Result) -> Callable | None:
    """The contender's call, run once and found right; None, and the reason in `result`, where that fails."""
    missing = [package for package in contender.packages if importlib.util.find_spec(package) is None]
    if missing:
        result.trouble = f"{', '.join(missing)} missing: pip install 'litedetr-deploy[benchmark]'"
        return None
    try:
        answer = contender.answer(problem)
        result.tolerance = answer.tolerance
        call = contender.make(problem, threads or torch.get_num_threads())
        if problem.device != "cpu":
            call = captured(call)
        result.error = problem.error(call(), answer)
    except Exception as error:  # of any of four libraries, which share no base class
        result.trouble = f"failed: {(str(error).strip() or type(error).__name__).splitlines()[0]}"
        return None
    if result.wrong:
        result.trouble = f"WRONG by {result.error:.1e} where {result.tolerance:.1e} is allowed: not timed"
        return None
    return call


def captured(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """The call as a CUDA graph: a replay costs the host the same whatever the call is made of."""
    call()  # what the first call loads and compiles cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = call()

    def replay():
        graph.replay()
        return output

    return replay


# Reports


def cases_of(results: list[Result]) -> list[list[Result]]:
    """The results of each size and number of threads, in order."""
    cases = {}
    for result in results:
        cases.setdefault((result.size, result.threads), []).append(result)
    return list(cases.values())


def case_title(case: list[Result]) -> str:
    return f"{image_title(case[0].size)}, {case[0].series}"


def image_title(size: Size) -> str:
    return size.name if size.batch == 1 else f"{size.name}, batch {size.batch}"


def threads_text(threads: int) -> str:
    return "1 thread" if threads == 1 else f"{threads} threads"


def better_openvino(case: list[Result]) -> Result | None:
    """The faster of OpenVINO's graphs, where both have a time."""
    both = [result for result in case if result.contender in OPENVINO and result.seconds]
    return min(both, key=lambda result: result.median) if len(both) == len(OPENVINO) else None


def times_op(result: Result, case: list[Result]) -> float:
    """How many times as long as our op it takes; NaN where one of them has no time."""
    return result.median / next((other.median for other in case if other.contender == OUR_OP), math.nan)


def numbers(result: Result, case: list[Result], machine: dict) -> dict[str, float | None]:
    """All that is derived from a result's times, by its name in the JSON report; a ratio without our op is None."""
    size, median, ratio = result.size, result.median, times_op(result, case)
    found = {"median_ms": median * 1e3, "p90_ms": timing.percentile(result.seconds, 90) * 1e3}
    if result.cold_seconds:
        cold = timing.percentile(result.cold_seconds, 50)
        found |= {"cold_median_ms": cold * 1e3, "cold_p90_ms": timing.percentile(result.cold_seconds, 90) * 1e3}
    found |= {
        "calls": len(result.seconds),
        "gigabytes_per_second": size.bytes_gathered / median / 1e9,
        "gigaflop_per_second": size.flop / median / 1e9,
    }
    if "gpu" in machine:
        found["of_l2"] = found["gigabytes_per_second"] / machine["gpu"]["l2_gigabytes_per_second"]
        if result.cold_seconds:
            found["of_memory"] = size.bytes_compulsory / cold / 1e9 / machine["gpu"]["memory_gigabytes_per_second"]
    return found | {"times_op": None if math.isnan(ratio) else ratio}


COLUMNS = {  # of the tables: their headings, by the names in the JSON report
    "median_ms": "median ms",
    "p90_ms": "p90 ms",
    "cold_median_ms": "cold ms",
    "cold_p90_ms": "cold p90",
    "calls": "calls",
    "gigabytes_per_second": "GB/s",
    "of_l2": "of L2",
    "of_memory": "of memory",
    "gigaflop_per_second": "GFLOP/s",
    "times_op": "times op",
}


def table_rows(case: list[Result], machine: dict) -> list[list[str]]:
    """Texts, the headings first; a contender without a time has its trouble in the second column and no more."""
    found = [numbers(result, case, machine) if result.seconds else {} for result in case]
    columns = [name for name in COLUMNS if any(name in each for each in found)]
    rows = [["contender", *(COLUMNS[name] for name in columns), "error"]]
    for result, each in zip(case, found):
        name = result.contender + (" (better)" if result is better_openvino(case) else "")
        if each:
            rows.append([name, *(number_text(column, each.get(column)) for column in columns), f"{result.error:.0e}"])
        else:
            rows.append([name, result.trouble or "interrupted"])
    return rows


def number_text(name: str, number: float | None) -> str:
    if number is None:
        return ""
    if name == "calls":
        return str(number)
    return f"{100 * number:.0f} %" if name.startswith("of_") else three_digits(number)


def print_case(case: list[Result], machine: dict) -> None:
    headings, *rows = table_rows(case, machine)
    timed = [row for row in rows if len(row) > 2]
    widths = [max(len(row[i]) for row in [headings, *timed]) for i in range(len(headings))]
    print(f"{case_title(case)}: {case[0].size}")
    for row in [headings, *timed]:
        print(row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:])), sep="  ")
    for name, *trouble in rows:
        if len(trouble) == 1:  # its text would widen a column of numbers
            print(f"{name}: {trouble[0]}")
    print(flush=True)


def as_json(results: list[Result], machine: dict, settings: dict) -> dict:
    rows = []
    for case in cases_of(results):
        for result in case:
            size, checked = result.size, result.error is not None
            row = {
                "size": size.name,
                "batch": size.batch,
                "dtype": size.dtype,
                "threads": result.threads,
                "contender": result.contender,
                "bytes_gathered": size.bytes_gathered,
                "bytes_compulsory": size.bytes_compulsory,
                "flop": size.flop,
            }
            if result.seconds:
                row |= numbers(result, case, machine) | {"better_openvino_graph": result is better_openvino(case)}
            row |= {
                "error": result.error if checked and math.isfinite(result.error) else None,
                "tolerance": result.tolerance,
                "right": not result.wrong if checked else None,
                "trouble": result.trouble,
            }
            rows.append(row)
    sizes = {
        result.size.name: {
            "maps": [list(shape) for shape in result.size.maps],
            "queries": result.size.queries,
            "reference_width": result.size.reference_width,
        }
        for result in results
    }
    return {"benchmark": "kernels", "machine": machine, "settings": settings, "sizes": sizes, "results": rows}


def how(device: str) -> str:
    """What the numbers are, in a paragraph."""
    counted = (
        f"One attention of {HEADS} heads of {HEAD_DIM} channels, {POINTS} points a level; the arithmetic of reference "
        f"points and the softmax are included. GB/s counts samples x 4 corners x {HEAD_DIM} channels x the bytes of "
        f"one, GFLOP/s counts samples x 6 x {HEAD_DIM} multiply-adds x 2: what the task needs, not what each contender "
        f"spends. 'error' is the largest difference from the definition in float64 on {Problem.CHECKED_QUERIES} "
        "queries. "
    )
    if device == "cpu":
        return counted + (
            "Batch 1, float32. Calls of all contenders alternate; before each comes an untimed one of its own, or, for "
            "'cold', the caches are overwritten."
        )
    return counted + (
        "Contenders come one after another, each as a CUDA graph, whose replays are timed between two events on a "
        "device that waits until the host is done; before each comes an untimed one, or, for 'cold', the L2 cache is "
        "overwritten. 'of L2' is GB/s as a share of a copy within the L2 cache (above 100 %: the L1 caches help), 'of "
        "memory' what must be read and written once, by the cold time, as a share of a copy in memory; both copies "
        "were measured in the same run, reads and writes counted. The plain op is given its logits, and so does less. "
        f"So does the {DEFORMABLE_DETR}, whose sampling locations and attention weights are computed before, and which "
        "computes in float32 whatever the others do. PyTorch's grid_sample runs in float32, as autocast has it."
    )


def machine_text(machine: dict) -> str:
    packages = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    if "gpu" in machine:
        gpu = machine["gpu"]
        first = (
            f"{gpu['name']}, {gpu['multiprocessors']} multiprocessors, compute capability {gpu['capability']}, "
            f"{gpu['memory_gib']} GiB at {gpu['memory_gigabytes_per_second']:.0f} GB/s, {gpu['l2_mib']} MiB L2 at "
            f"{gpu['l2_gigabytes_per_second']:.0f} GB/s (copies); CUDA {gpu['cuda']}, {machine['cpu']}"
        )
    else:
        first = (
            f"{machine['cpu']}, {machine['cores']} cores ({' '.join(machine['cpu_features'])}), our op's kernel for "
            f"{machine['op_kernel']}"
        )
    load = ", ".join(map(str, machine["load_average"]))
    return f"{first}; {machine['os']}; {packages}; {machine['date']}; load average {load}."


def as_markdown(results: list[Result], machine: dict) -> str:
    cases = cases_of(results)
    names = list(dict.fromkeys(result.contender for result in results))
    lines = ["# Key-aware deformable attention: kernels", "", machine_text(machine), ""]
    lines += [how("cuda" if "gpu" in machine else "cpu"), ""]
    lines += ["Median in milliseconds, and how many times our op's it is:", ""]
    better = [better_openvino(case) for case in cases]
    columns = names + ["OpenVINO, better graph"] * any(better)
    lines += markdown_row(["", *columns]) + markdown_row(["---"] + ["---:"] * len(columns))
    for case, best in zip(cases, better):
        found = [next((result for result in case if result.contender == name), None) for name in names]
        cells = [summary_cell(result, case) for result in found + [best] * any(better)]
        lines += markdown_row([case_title(case), *cells])
    for case in cases:
        headings, *rows = table_rows(case, machine)
        lines += ["", f"## {case_title(case)}", "", f"{case[0].size}", ""]
        lines += markdown_row(headings) + markdown_row(["---"] + ["---:"] * (len(headings) - 1))
        for row in rows:
            lines += markdown_row(row + [""] * (len(headings) - len(row)))
    return "\n".join(lines) + "\n"


def markdown_row(cells: Sequence[str]) -> list[str]:
    return ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"]


def summary_cell(result: Result | None, case: list[Result]) -> str:
    return f"{three_digits(result.median * 1e3)}{ratio_text(result, case)}" if result and result.seconds else "-"


def ratio_text(result: Result, case: list[Result]) -> str:
    ratio = times_op(result, case)
    return "" if result.contender == OUR_OP or math.isnan(ratio) else f" ({three_digits(ratio)}x)"


def three_digits(number: float) -> str:
    """At least three significant digits, without an exponent."""
    return f"{number:.{max(0, 2 - math.floor(math.log10(number)))}f}"


def draw(results: list[Result], machine: dict, path: Path) -> None:
    """A bar chart as PNG: one panel a size and batch, one bar a contender and number of threads, or type."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    titles = list(dict.fromkeys(image_title(result.size) for result in results))
    names = list(dict.fromkeys(result.contender for result in results))
    series = list(dict.fromkeys(result.series for result in results))
    columns = min(3, len(titles))
    rows = math.ceil(len(titles) / columns)
    bar = 0.8 / len(series)
    opacity = {one: 1 - 0.7 * i / max(1, len(series) - 1) for i, one in enumerate(series)}

    figure = Figure(figsize=(2.2 + 4.2 * columns, 1.6 + (0.8 + (0.2 + 0.08 * len(series)) * len(names)) * rows),
                    layout="constrained")  # fmt: skip
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False)
    for title, axes in zip(titles, panels.flat):
        shown = [result for result in results if image_title(result.size) == title]
        for case in cases_of(shown):
            for result in case:
                place = series.index(result.series) - (len(series) - 1) / 2
                y = names.index(result.contender) + place * bar
                text = {"textcoords": "offset points", "va": "center", "fontsize": 7, "color": "#333333"}
                if not result.seconds:
                    axes.annotate("no time", (0, y), (3, 0), xycoords=axes.get_yaxis_transform(), **text)
                    continue
                milliseconds = result.median * 1e3
                colour = "#d1495b" if result.contender == OUR_OP else "#30638e"
                axes.barh(y, milliseconds, bar * 0.92, color=colour, alpha=opacity[result.series])
                label = f"{three_digits(milliseconds)} ms{ratio_text(result, case)}"
                axes.annotate(label, (milliseconds, y), (3, 0), **text)
        timed = [result.median * 1e3 for result in shown if result.seconds]
        axes.set_xscale("log")
        if timed:
            axes.set_xlim(min(timed) / 2, max(timed) * 12)  # room for the texts behind the bars
        axes.xaxis.set_major_formatter(lambda milliseconds, _: f"{milliseconds:g}")
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(labelsize=8, labelbottom=True)
        axes.tick_params(axis="y", length=0)
        axes.set_title(f"{title}: {shown[0].size.queries:,} {shown[0].size.query_kind} as queries", fontsize=10)
        axes.set_xlabel("median, milliseconds, log scale", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="x", color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
    panels.flat[0].invert_yaxis()  # shared by all panels: the first contender on top
    for axes in panels.flat[len(titles) :]:
        axes.set_visible(False)
    figure.legend(
        [Patch(color="#555555", alpha=opacity[one]) for one in series],
        series,
        loc="outside lower center", ncols=len(series), frameon=False, fontsize=9,
    )  # fmt: skip
    on = machine["gpu"]["name"] if "gpu" in machine else f"{machine['cpu']}, {machine['cores']} cores, float32"
    figure.suptitle(f"One key-aware deformable attention; (x): times our op\n{on}, {machine['date'][:10]}", fontsize=11)
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
    """The names in a comma-separated list, in their own order; all when the list is empty.

    Raises ValueError where one is unknown.
    """
    names = list(names)
    wanted = {part.strip().lower() for part in text.split(",") if part.strip()}
    unknown = wanted - {name.lower() for name in names}
    if unknown:
        raise ValueError(f"{option} has {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return [name for name in names if not wanted or name.lower() in wanted]


def counts(text: str, option: str) -> list[int]:
    """The numbers in a comma-separated list.  Raises ValueError where one is none, or below 1."""
    if not all(part.strip().isdigit() and int(part) > 0 for part in text.split(",")):
        raise ValueError(f"{option} is {text!r}; it should be numbers of 1 or more, such as 1,2")
    return list(dict.fromkeys(map(int, text.split(","))))


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time one key-aware deformable attention: our op, and what else can compute it: on the CPU "
        "standard operators in ONNX Runtime and in OpenVINO, PyTorch, and torch.compile; on a GPU PyTorch, "
        "torch.compile, and the CUDA kernel of Deformable DETR. Every output is checked before it is timed; a wrong "
        "one is not timed, and the exit status is 1.",
        epilog="Run it on a quiet machine. Everything takes about a quarter of an hour; Ctrl-C leaves what was "
        "measured so far on the screen.",
    )
    parser.add_argument("--device", choices=CONTENDERS, default="cpu", help="where to measure; default cpu")
    parser.add_argument("--sizes", default="", help=f"separated by commas: {', '.join(SIZES)}; default all")
    names = "; ".join(f"{device}: {', '.join(c.name for c in contenders)}" for device, contenders in CONTENDERS.items())
    parser.add_argument("--only", default="", help=f"contenders, separated by commas: {names}; default all")
    parser.add_argument("--threads", help="cpu: numbers of threads, separated by commas; default 1,2")
    parser.add_argument("--batches", help="cuda: numbers of images, separated by commas; default 1,4,16")
    parser.add_argument("--dtypes", help=f"cuda: types, separated by commas: {', '.join(DTYPES)}; default all")
    parser.add_argument("--deformable-detr", type=Path, metavar="FOLDER",
                        help="cuda: a checkout of Deformable DETR, whose kernel is compiled and timed as well; needs "
                        "nvcc and ninja")  # fmt: skip
    parser.add_argument("--seconds", type=float, help="time for each contender on each size, number of threads, batch "
                        f"and type; slow ones take what {timing.FEWEST} calls need; default 5, cuda: 0.5")  # fmt: skip
    parser.add_argument("--cold", action="store_true", help="time calls with overwritten caches as well")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png as well, for instance "
                        "benchmarks/results/kernels")  # fmt: skip
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    options = make_parser().parse_args(arguments)
    try:
        check_options(options)
        names = [contender.name for contender in CONTENDERS[options.device]]
        if options.deformable_detr:
            names.append(DEFORMABLE_DETR)
        names = chosen(options.only, names, "--only")
        sizes = [SIZES[name] for name in chosen(options.sizes, SIZES, "--sizes")]
        thread_counts = counts(options.threads or "1,2", "--threads") if options.device == "cpu" else [None]
        if options.device == "cuda":
            batches = counts(options.batches or "1,4,16", "--batches")
            dtypes = chosen(options.dtypes or "", DTYPES, "--dtypes")
            sizes = [
                dataclasses.replace(size, batch=batch, dtype=dtype)
                for size in sizes
                for batch in batches
                for dtype in dtypes
            ]
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    seconds = (5.0 if options.device == "cpu" else 0.5) if options.seconds is None else options.seconds

    try:
        kernel = ld.native.load_core().kda_cpu_isa().decode()
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    contenders = [contender for contender in CONTENDERS[options.device] if contender.name in names]
    machine = timing.machine(PACKAGES)
    if options.device == "cpu":
        machine["op_kernel"] = kernel
    else:
        machine["gpu"] = timing.device()
        contenders += deformable_detr(options.deformable_detr) if DEFORMABLE_DETR in names else []
        if not options.deformable_detr:
            print(f"no {DEFORMABLE_DETR}: give --deformable-detr a checkout of it", file=sys.stderr)
    print(machine_text(machine) + "\n", flush=True)
    results = []
    try:
        measure_all(sizes, options.device, thread_counts, contenders, seconds, results, machine, options.cold)
    except KeyboardInterrupt:
        print("interrupted: these are the calls made so far; no file was written", file=sys.stderr)
        return 130
    print(how(options.device))
    if options.output is not None:
        settings = {"device": options.device, "seconds": seconds, "threads": thread_counts, "cold": options.cold}
        paths = write_reports(results, machine, settings, options.output)
        print("wrote", ", ".join(map(str, paths)))
        if len(paths) == 2:
            print("no chart: matplotlib is missing: pip install 'litedetr-deploy[benchmark]'", file=sys.stderr)
    return 1 if any(result.wrong or (result.contender == OUR_OP and not result.seconds) for result in results) else 0


def check_options(options: argparse.Namespace) -> None:
    """Raises ValueError where options do not go together, or ask for what is not there: now, not after an hour."""
    others = {"cpu": ("batches", "dtypes", "deformable_detr"), "cuda": ("threads",)}[options.device]
    for name in others:
        if getattr(options, name) is not None:
            option = "--" + name.replace("_", "-")
            raise ValueError(f"{option} is not for --device {options.device}: leave it out, or choose the other device")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--device is cuda and PyTorch {torch.__version__} finds no CUDA device: run it on a machine with an "
            "NVIDIA GPU, its driver, and a PyTorch that was built with CUDA"
        )
    if options.seconds is not None and not options.seconds >= 0:
        raise ValueError(f"--seconds is {options.seconds}; it should be 0 or more")
    if options.deformable_detr and not (options.deformable_detr / DEFORMABLE_DETR_SOURCE).is_dir():
        raise ValueError(
            f"--deformable-detr is {options.deformable_detr}, which has no folder {DEFORMABLE_DETR_SOURCE}; it should "
            "be a checkout of the Deformable-DETR repository"
        )
    if options.output is not None:
        folder = options.output.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            message = f"{folder} cannot be made: {error.strerror}; give --output a folder that is yours"
            raise ValueError(message) from None
        if not os.access(folder, os.W_OK):
            raise ValueError(f"{folder} cannot be written; give --output a folder that is yours")


def deformable_detr(checkout: Path) -> list[Contender]:
    """Deformable DETR's kernel; none, and the reason on stderr, where it does not compile."""
    print(f"compiling {checkout / DEFORMABLE_DETR_SOURCE}: a minute or two", file=sys.stderr)
    try:
        extension = build_deformable_detr(checkout)
    except (OSError, RuntimeError, ImportError) as error:  # the others can be timed without it
        print(f"no {DEFORMABLE_DETR}: {error}", file=sys.stderr)
        return []
    return [Contender(DEFORMABLE_DETR, functools.partial(deformable_detr_call, extension), plain=True)]


def measure_all(
    sizes: list[Size],
    device: str,
    thread_counts: list[int | None],
    contenders: list[Contender],
    seconds: float,
    results: list[Result],
    machine: dict,
    cold: bool,
) -> None:
    """`measure` on every size and number of threads, with its progress on stderr and its table on stdout."""
    # Graphs keep their memory: on a GPU, contenders must not meet.
    groups = [contenders] if device == "cpu" else [[contender] for contender in contenders]
    total = len(sizes) * len(thread_counts) * len(groups)
    done = 0
    for size in sizes:
        problem = Problem(size, device)
        for threads in thread_counts:
            case = []
            try:
                for group in groups:

                    def show(stage: str, fraction: float) -> None:
                        percent = 100 * (done + fraction) / total
                        show_line(f"{percent:.0f} %  {image_title(size)}, {case[0].series}: {stage}")

                    measure(problem, threads, group, seconds, case, show, cold)
                    done += 1
                    if device == "cuda":
                        torch.cuda.empty_cache()
            finally:
                show_line("")
                results.extend(case)
                if case:
                    print_case(case, machine)


def show_line(text: str) -> None:
    """Replaces the last line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
