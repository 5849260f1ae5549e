"""Times the attention ops on a CUDA device against PyTorch, beside the bandwidth of the device's memory and L2 cache.

    python tools/gpu_check_timing.py --output FOLDER/NAME

writes NAME.json and NAME.md.  Needs torch alone; the library is found as the package finds it (LITEDETR_LIBRARY_PATH).
tools/gpu_check.py runs it after building and testing.
"""

from __future__ import annotations

import argparse
import datetime
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from torch import Tensor

from litedetr_deploy.ops import reference, torch_op  # noqa: F401, registers the ops

HEADS, HEAD_DIM, POINTS = 8, 32, 4
CHANNELS = HEADS * HEAD_DIM
MAPS = ((100, 167), (50, 84), (25, 42), (13, 21))  # (height, width) of an image of 800x1333
DTYPES = {"fp16": torch.float16, "fp32": torch.float32, "bf16": torch.bfloat16}
CHECKED_QUERIES = 64
REPETITIONS = 50
SECONDS = 2.0  # for one contender on one size; fewer repetitions where it is slow
FASTEST_CLOCK = 2e9  # Hz; for the cycles of torch.cuda._sleep


@dataclass(frozen=True)
class Size:
    """One attention over MAPS, and which queries look at them."""

    name: str
    first_level: int = 0  # the tokens of this level and the coarser ones are the queries of an encoder
    boxes: int = 0  # or so many boxes are, of a decoder

    @property
    def queries(self) -> int:
        return self.boxes or sum(height * width for height, width in MAPS[self.first_level :])

    def bytes_gathered(self, batch: int, element: int) -> int:
        """Four corners of D elements for every sample, each read once."""
        return batch * self.queries * HEADS * len(MAPS) * POINTS * 4 * HEAD_DIM * element

    def bytes_compulsory(self, batch: int, element: int) -> int:
        """Every input read once, the output written once."""
        tokens = sum(height * width for height, width in MAPS)
        samples = HEADS * len(MAPS) * POINTS
        references = len(MAPS) * (4 if self.boxes else 2) * 4
        per_query = 2 * CHANNELS * element + 2 * samples * element + references
        return batch * (self.queries * per_query + tokens * CHANNELS * element)


SIZES = (Size("full800"), Size("high800", first_level=1), Size("dec800", boxes=900))


def make_inputs(size: Size, batch: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """The inputs of the key-aware op but spatial_shapes, always the same numbers for a size: each head looks in a
    direction of its own, 1 to 4 pixels far (quarters of half a box in the decoder), and strays around that."""
    generator = torch.Generator().manual_seed(0)
    tokens = sum(height * width for height, width in MAPS)
    angles = torch.arange(HEADS) * (2 * math.pi / HEADS)
    directions = torch.stack((angles.cos(), angles.sin()), -1)[:, None, None]  # [M, 1, 1, 2]
    distances = torch.arange(1.0, POINTS + 1)[:, None]  # [P, 1]
    strayed = 1.5 * torch.randn(batch, size.queries, HEADS, len(MAPS), POINTS, 2, generator=generator)
    if size.boxes:
        centres = torch.rand(batch, size.boxes, 2, generator=generator)
        sides = 0.02 * 30 ** torch.rand(batch, size.boxes, 2, generator=generator)
        references = torch.cat((centres, sides), -1)
    else:
        references = _token_centres(size).expand(batch, -1, -1)
    inputs = {
        "query": torch.randn(batch, size.queries, CHANNELS, generator=generator).to(dtype),
        "value": torch.randn(batch, tokens, CHANNELS, generator=generator).to(dtype),
        "reference_points": references[:, :, None].repeat(1, 1, len(MAPS), 1),
        "sampling_offsets": (directions * distances + strayed).flatten(2).to(dtype),
    }
    return {name: tensor.to(device) for name, tensor in inputs.items()}


def _token_centres(size: Size) -> Tensor:
    """[Q, 2]"""
    centres = []
    for height, width in MAPS[size.first_level :]:
        y, x = torch.meshgrid((torch.arange(height) + 0.5) / height, (torch.arange(width) + 0.5) / width, indexing="ij")
        centres.append(torch.stack((x.flatten(), y.flatten()), -1))
    return torch.cat(centres)


# Contenders: functions of the inputs and of spatial_shapes on the device


def key_aware_op(query, value, reference_points, sampling_offsets, spatial_shapes):
    op = torch.ops.litedetr.key_aware_deform_attn
    return op(query, value, reference_points, sampling_offsets, spatial_shapes, HEADS, POINTS)


def key_aware_op_own_key(query, value, reference_points, sampling_offsets, spatial_shapes):
    op = torch.ops.litedetr.key_aware_deform_attn
    return op(query, value, reference_points, sampling_offsets, spatial_shapes, HEADS, POINTS, value)


def plain_op(query, value, reference_points, sampling_offsets, spatial_shapes):
    """Attention weights from elsewhere: the first M*L*P channels of the query serve as logits."""
    logits = query[..., : HEADS * len(MAPS) * POINTS].contiguous()
    op = torch.ops.litedetr.ms_deform_attn
    return op(logits, value, reference_points, sampling_offsets, spatial_shapes, HEADS, POINTS)


def official_form(query, value, reference_points, sampling_offsets, spatial_shapes):
    """The arithmetic of the official pure-PyTorch code, which samples key and value apart though they are equal."""
    grids = sampling_grids(reference_points, sampling_offsets)
    keys, values = (sample(value, grids) for _ in range(2))
    return attend(query, keys, values)


def sampling_once(query, value, reference_points, sampling_offsets, spatial_shapes):
    samples = sample(value, sampling_grids(reference_points, sampling_offsets))
    return attend(query, samples, samples)


def sampling_grids(references: Tensor, offsets: Tensor) -> Tensor:
    """Where grid_sample reads, -1 to 1, in the dtype of the offsets: [N, Q, M, L, P, 2]."""
    n, q, levels, width = references.shape
    dtype = offsets.dtype
    offsets = offsets.view(n, q, HEADS, levels, POINTS, 2).float()
    references = references[:, :, None, :, None]
    if width == 2:
        sizes = torch.tensor([(w, h) for h, w in MAPS], dtype=torch.float32, device=offsets.device)
        locations = references + offsets / sizes[:, None]
    else:
        locations = references[..., :2] + offsets / POINTS * references[..., 2:] * 0.5
    return (2 * locations - 1).to(dtype)


def sample(tokens: Tensor, grids: Tensor) -> Tensor:
    """[N*M, D, Q, L*P]"""
    n = tokens.shape[0]
    sampled = []
    for level, level_tokens in enumerate(tokens.split([height * width for height, width in MAPS], 1)):
        image = level_tokens.transpose(1, 2).reshape(n * HEADS, HEAD_DIM, *MAPS[level])
        grid = grids[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [N*M, Q, P, 2]
        sampled.append(F.grid_sample(image, grid, mode="bilinear", padding_mode="zeros", align_corners=False))
    return torch.stack(sampled, -2).flatten(-2)


def attend(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """[N, Q, M*D]"""
    n, q, channels = query.shape
    query = query.view(n, q, HEADS, 1, HEAD_DIM).transpose(1, 2).flatten(0, 1)  # [N*M, Q, 1, D]
    weights = (query @ keys.permute(0, 2, 1, 3) / math.sqrt(HEAD_DIM)).softmax(-1)
    output = weights @ values.permute(0, 2, 3, 1)  # [N*M, Q, 1, D]
    return output.view(n, HEADS, q, HEAD_DIM).transpose(1, 2).reshape(n, q, channels)


OUR_OP = "op"
CONTENDERS: dict[str, Callable] = {
    OUR_OP: key_aware_op,
    "op, own key": key_aware_op_own_key,
    "plain op": plain_op,
    "PyTorch official form": official_form,
    "PyTorch sampling once": sampling_once,
    "torch.compile": sampling_once,
}


# Measuring


@dataclass
class Result:
    contender: str
    size: str
    batch: int
    dtype: str
    queries: int
    bytes_gathered: int
    bytes_compulsory: int
    error: float | None = None  # the largest, from the definition in float64, on CHECKED_QUERIES queries
    tolerance: float | None = None  # 3 times the definition's own error in this dtype
    warm_ms: list[float] = field(default_factory=list)
    cold_ms: list[float] = field(default_factory=list)
    trouble: str | None = None


def measure(name: str, size: Size, batch: int, dtype: str, repetitions: int = REPETITIONS) -> Result:
    element = DTYPES[dtype].itemsize
    result = Result(name, size.name, batch, dtype, size.queries, size.bytes_gathered(batch, element),
                    size.bytes_compulsory(batch, element))  # fmt: skip
    try:
        inputs = make_inputs(size, batch, DTYPES[dtype], "cuda")
        spatial_shapes = torch.tensor(MAPS, device="cuda")
        contender = CONTENDERS[name]
        if name == "torch.compile":
            torch._dynamo.reset()
            contender = torch.compile(contender, fullgraph=True, dynamic=False)
        with torch.inference_mode():
            output = contender(**inputs, spatial_shapes=spatial_shapes)
            if name != "plain op":
                result.error, result.tolerance = errors(inputs, output)
            del output

            def call():
                contender(**inputs, spatial_shapes=spatial_shapes)

            result.warm_ms = time_on_device(call, repetitions)
            result.cold_ms = time_on_device(call, repetitions, flush=flush_l2)
    except Exception as error:  # out of memory, no Triton, ...: told in the report, and the others go on
        result.trouble = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    torch.cuda.empty_cache()
    return result


def errors(inputs: dict[str, Tensor], output: Tensor) -> tuple[float, float]:
    """The largest error of the last batch item's spread-out queries, and what our op may have."""
    queries = output.shape[1]
    chosen = torch.arange(0, queries, max(1, queries // CHECKED_QUERIES))
    item = {name: tensor[-1:].cpu() for name, tensor in inputs.items()}
    few = {name: tensor if name == "value" else tensor[:, chosen] for name, tensor in item.items()}

    def define(dtype: torch.dtype | None) -> Tensor:
        cast = {name: tensor.to(dtype) if dtype else tensor for name, tensor in few.items()}
        return reference.key_aware_deform_attn(
            **cast, spatial_shapes=torch.tensor(MAPS), num_heads=HEADS, num_points=POINTS
        ).double()

    wanted = define(torch.float64)
    error = (output[-1:].cpu()[:, chosen].double() - wanted).abs().max().item()
    return error, 3 * (define(None) - wanted).abs().max().item()


def time_on_device(call: Callable[[], None], repetitions: int, flush: Callable[[], None] | None = None) -> list[float]:
    """Milliseconds between two events around the call.

    The device sleeps before each call for longer than the host takes to enqueue it, so that the events do not measure
    the host.
    """
    for _ in range(3):
        call()
    torch.cuda.synchronize()
    start = time.perf_counter()
    call()
    enqueued = time.perf_counter() - start
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    cycles = int((enqueued * 2 + 2e-4) * FASTEST_CLOCK)
    times = []
    for _ in range(max(5, min(repetitions, int(SECONDS / seconds)))):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        if flush:
            flush()
        torch.cuda._sleep(cycles)
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return times


def l2_bytes() -> int:
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 0) or 50 << 20


_flushed: list[Tensor] = []


def flush_l2() -> None:
    """Writes twice as much as the cache holds."""
    if not _flushed:
        _flushed.append(torch.empty(2 * l2_bytes(), dtype=torch.uint8, device="cuda"))
    _flushed[0].zero_()


def bandwidth(size: int, copies: int) -> float:
    """GB/s, read and written, of copying `size` bytes again and again."""
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)

    def call():
        for _ in range(copies):
            target.copy_(source)

    return 2 * size * copies / statistics.median(time_on_device(call, 20)) / 1e6


def describe_device() -> dict:
    properties = torch.cuda.get_device_properties(0)
    large = max(4 * l2_bytes(), min(1 << 30, torch.cuda.mem_get_info()[0] // 8))
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_gib": round(properties.total_memory / (1 << 30), 1),
        "l2_mib": round(l2_bytes() / (1 << 20), 1),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "dram_gbps": round(bandwidth(large, 1), 1),
        "l2_gbps": round(bandwidth(l2_bytes() // 4, 20), 1),
    }


# Reports


def as_markdown(device: dict, results: Sequence[Result]) -> str:
    lines = [
        f"# The attention ops on {device['name']}",
        "",
        f"{device['multiprocessors']} multiprocessors, compute capability {device['capability']}, "
        f"{device['memory_gib']} GiB, L2 {device['l2_mib']} MiB; PyTorch {device['torch']}, CUDA {device['cuda']}; "
        f"{device['date']}.",
        "",
        f"Copies measured in the same run, read and written: memory {device['dram_gbps']:.0f} GB/s, "
        f"L2 {device['l2_gbps']:.0f} GB/s.",
        "",
        f"{HEADS} heads of {HEAD_DIM} channels, four levels of {POINTS} points; medians of times between CUDA events, "
        "with the L2 cache as the call before left it (warm) and overwritten (cold). 'gathered' counts four corners a "
        "sample, by the warm time and as a share of the L2 copy (above 100 %: the L1 caches help); 'compulsory' counts "
        "every tensor once, by the cold time and as a share of the memory copy. 'error' is the largest difference from "
        "the definition in float64; only the op's own is held against a tolerance.",
    ]
    cases = list(dict.fromkeys((result.size, result.batch, result.dtype) for result in results))
    for case in cases:
        rows = [result for result in results if (result.size, result.batch, result.dtype) == case]
        ours = next((result for result in rows if result.contender == OUR_OP and result.warm_ms), None)
        lines += [
            "",
            f"## {case[0]}, batch {case[1]}, {case[2]}: {rows[0].queries} queries, "
            f"{rows[0].bytes_gathered / 1e6:.0f} MB gathered, {rows[0].bytes_compulsory / 1e6:.0f} MB compulsory",
            "",
            "| | warm ms | cold ms | times the op | gathered GB/s | of L2 | compulsory GB/s | of memory | error |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        lines += [f"| {result.contender} | " + " | ".join(_cells(device, result, ours)) + " |" for result in rows]
    return "\n".join(lines) + "\n"


def _cells(device: dict, result: Result, ours: Result | None) -> list[str]:
    if not result.warm_ms or not result.cold_ms:
        return [(result.trouble or "not measured").replace("|", "\\|")] + [""] * 7
    warm, cold = statistics.median(result.warm_ms), statistics.median(result.cold_ms)
    gathered, compulsory = result.bytes_gathered / warm / 1e6, result.bytes_compulsory / cold / 1e6
    return [
        f"{warm:.4f}",
        f"{cold:.4f}",
        f"{warm / statistics.median(ours.warm_ms):.2f}" if ours else "",
        f"{gathered:.0f}",
        f"{100 * gathered / device['l2_gbps']:.0f} %",
        f"{compulsory:.0f}",
        f"{100 * compulsory / device['dram_gbps']:.0f} %",
        "" if result.error is None else f"{result.error:.1e}",
    ]


def wrong(results: Sequence[Result]) -> list[str]:
    """The op's own results that are not right, NaN included, or that could not be had."""
    ours = [result for result in results if result.contender.startswith(OUR_OP)]
    return [
        f"{result.contender}, {result.size}, batch {result.batch}, {result.dtype}: "
        + (result.trouble or f"error {result.error:.2e}, allowed {result.tolerance:.2e}")
        for result in ours
        if result.trouble or result.error is None or not result.error <= result.tolerance
    ]


def as_json(device: dict, results: Sequence[Result]) -> str:
    def finite(value):
        return None if isinstance(value, float) and not math.isfinite(value) else value

    rows = [{key: finite(value) for key, value in asdict(result).items()} for result in results]
    return json.dumps({"benchmark": "gpu", "device": device, "results": rows}, indent=2, allow_nan=False) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="write OUTPUT.json and OUTPUT.md")
    parser.add_argument("--batches", default="1,4,16", help="batch sizes, separated by commas")
    parser.add_argument("--dtypes", default=",".join(DTYPES), help="of fp16, fp32, bf16")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("torch.cuda.is_available() is false: nothing to time", file=sys.stderr)
        return 1
    device = describe_device()
    results: list[Result] = []
    for dtype in options.dtypes.split(","):
        for batch in map(int, options.batches.split(",")):
            for size in SIZES:
                for name in CONTENDERS:
                    result = measure(name, size, batch, dtype)
                    results.append(result)
                    warm = f"{statistics.median(result.warm_ms):.4f} ms" if result.warm_ms else result.trouble
                    print(f"{size.name}, batch {batch}, {dtype}: {name}: {warm}", flush=True)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.with_name(options.output.name + ".json").write_text(as_json(device, results))
    options.output.with_name(options.output.name + ".md").write_text(as_markdown(device, results))
    for line in wrong(results):
        print("wrong:", line, file=sys.stderr)
    return 1 if wrong(results) else 0


if __name__ == "__main__":
    sys.exit(main())
