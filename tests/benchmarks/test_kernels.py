"""The benchmark of kernels on sizes that take no time: what it refuses to time, and what it writes."""

import dataclasses
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from litedetr_deploy.benchmark import harness, kernels, official, timing
from litedetr_deploy.errors import LiteDetrError
from litedetr_deploy.ops import reference

pytestmark = pytest.mark.usefixtures("quick")

MAPS = ((6, 5), (3, 4), (2, 2))
TINY = kernels.Size("tiny", MAPS)
TINY_SIZES = [TINY, kernels.Size("tiny decoder", MAPS, boxes=7)]
OPENVINO = importlib.util.find_spec("openvino") is not None
# torch.compile is left out: it compiles for half a minute.
QUICK = [
    rival
    for rival in kernels.RIVALS["cpu"]
    if rival.name != "torch.compile" and (OPENVINO or "openvino" not in rival.packages)
]
BY_NAME = {rival.name: rival for rival in kernels.RIVALS["cpu"]}
ON_GPU = [rival for rival in kernels.RIVALS["cuda"] if rival.name != "torch.compile"]
GPU = {
    "name": "A GPU", "capability": "9.0", "multiprocessors": 100, "memory_gib": 80.0, "l2_mib": 50.0, "cuda": "13.0",
    "l2_gigabytes_per_second": 4000.0, "memory_gigabytes_per_second": 2000.0,
}  # fmt: skip


def measure(*rivals, size=TINY, threads=1):
    problem = kernels.Problem(size)
    contenders = [kernels.Attention(rival, problem, threads) for rival in rivals]
    return harness.measure(contenders, harness.Settings(0.0, len(contenders)))


def rival(function, name="other", packages=()):
    """One that makes its output out of the right one."""

    def make(problem, threads):
        right = kernels.official_call(problem, threads)
        return lambda: function(right())

    return kernels.Rival(name, make, packages)


def test_sizes():
    assert {name: size.queries for name, size in kernels.SIZES.items()} == {
        "full800": 22223, "high800": 5523, "dec800": 900, "full640": 8500, "high640": 2100,
    }  # fmt: skip
    # 22223 queries x 8 heads x 16 samples, each 4 corners of 128 bytes, each 6 x 32 multiply-adds
    assert kernels.SIZES["full800"].work["bytes_gathered"] == 22223 * 8 * 16 * 512
    assert kernels.SIZES["full800"].work["flop"] == 22223 * 8 * 16 * 384
    half = dataclasses.replace(kernels.SIZES["full800"], dtype="fp16", batch=4)
    assert half.work["bytes_gathered"] == 4 * 22223 * 8 * 16 * 256 and half.work["flop"] == 4 * 22223 * 8 * 16 * 384


@pytest.mark.parametrize("size", TINY_SIZES, ids=lambda size: size.name)
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_compulsory_bytes_are_those_of_the_tensors(size, dtype):
    size = dataclasses.replace(size, dtype=dtype, batch=3)
    inputs = kernels.make_inputs(size)
    tensors = [*inputs.values(), inputs["query"]]  # the output is like the query
    assert size.work["bytes_compulsory"] == sum(tensor.nbytes for tensor in tensors)


def test_encoder_queries_are_the_centres_of_their_tokens():
    references = kernels.make_inputs(TINY)["reference_points"]
    assert references.shape == (1, 46, 3, 2)
    assert references[0, 0].tolist() == [pytest.approx([1 / 10, 1 / 12])] * 3  # (x, y) in the 6x5 map
    assert references[0, 31].tolist() == [pytest.approx([3 / 8, 1 / 6])] * 3  # the second token of the 3x4 map
    coarse = kernels.make_inputs(kernels.Size("tiny high", MAPS, first_level=1))["reference_points"]
    assert torch.equal(coarse, references[:, 30:])


@pytest.mark.parametrize("size", TINY_SIZES, ids=lambda size: size.name)
@pytest.mark.parametrize("threads", [1, 2])
def test_all_contenders_are_right(size, threads):
    for result in measure(*QUICK, size=size, threads=threads):
        assert not result.trouble
        assert result.figures["error"] <= result.figures["tolerance"] < 1e-3
        assert len(result.seconds) == timing.FEWEST and result.median > 0


@pytest.mark.parametrize("size", TINY_SIZES, ids=lambda size: size.name)
@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_contenders_of_a_gpu_are_right_in_every_type(size, dtype):
    """On the CPU: the same functions."""
    for result in measure(*ON_GPU, size=dataclasses.replace(size, dtype=dtype, batch=2)):
        assert not result.trouble
        assert result.figures["error"] <= result.figures["tolerance"] < 300 * torch.finfo(kernels.DTYPES[dtype]).eps


@pytest.mark.parametrize("size", TINY_SIZES, ids=lambda size: size.name)
def test_deformable_detr_gets_locations_and_weights(size):
    class Extension:
        @staticmethod
        def ms_deform_attn_forward(value, spatial_shapes, starts, locations, weights, images_at_once):
            """As the CUDA kernel reads its arguments."""
            assert all(tensor.is_contiguous() for tensor in (value, spatial_shapes, starts, locations, weights))
            assert starts.tolist() == [0, 30, 42] and starts.dtype == spatial_shapes.dtype == torch.int64
            samples = official.sample(value.flatten(2), locations, spatial_shapes.tolist())  # [N*M, D, Q, L*P]
            weights = weights.flatten(4).flatten(3).transpose(1, 2).flatten(0, 1)  # [N*M, Q, L*P]
            return torch.einsum("bdqs,bqs->bqd", samples, weights).unflatten(0, (2, -1)).transpose(1, 2).flatten(2)

    size = dataclasses.replace(size, batch=2, dtype="fp16")
    make = lambda problem, threads: kernels.deformable_detr_call(Extension, problem, threads)  # noqa: E731
    (result,) = measure(kernels.Rival("kernel", make, answer="plain"), size=size)
    assert not result.trouble and result.figures["right"]


def test_what_is_checked_is_the_definition_of_all_queries_together():
    """A query's output depends on no other query: a few of them stand for all."""
    size = kernels.Size("many", ((20, 20), (5, 4)))
    problem = kernels.Problem(size)
    assert len(problem.checked) == kernels.Problem.CHECKED_QUERIES < size.queries
    assert len(set(problem.checked.tolist())) == len(problem.checked)
    inputs = {name: tensor.double() for name, tensor in problem.inputs.items()}
    shapes = problem.spatial_shapes
    everything = reference.key_aware_deform_attn(**inputs, spatial_shapes=shapes, num_heads=8, num_points=4)
    wanted, tolerance = problem.answers["key-aware"]
    assert torch.equal(everything[:, problem.checked], wanted)
    assert problem.error(everything, wanted) == 0
    everything[0, problem.checked[-1]] += 2 * tolerance
    assert problem.error(everything, wanted) > tolerance


def test_the_last_image_is_checked():
    problem = kernels.Problem(dataclasses.replace(TINY, batch=2))
    right = kernels.official_call(problem, 1)()
    wanted, tolerance = problem.answers["key-aware"]
    assert problem.error(right, wanted) <= tolerance
    assert problem.error(right.flip(0), wanted) > 0.1


@pytest.mark.parametrize(
    "spoil",
    [
        lambda right: right + 0.01,
        lambda right: right.roll(1, 1),
        lambda right: right.masked_fill(right == right.max(), torch.nan),
    ],
    ids=["biased", "queries mixed up", "nan"],
)
def test_a_wrong_contender_is_reported_and_not_timed(spoil):
    wrong, right = measure(rival(spoil), BY_NAME["torch op"])
    assert wrong.status == harness.WRONG and not wrong.seconds and "is allowed, and not timed" in wrong.trouble
    assert wrong.figures["right"] is False
    assert right.status == harness.MEASURED and right.figures["right"] and right.seconds


def test_a_contender_that_fails_is_reported():
    def fail(right):
        raise RuntimeError("no memory\nand more")

    failed, misshapen, timed = measure(
        rival(fail, "fails"), rival(lambda right: right[:, 1:], "cuts"), rival(lambda right: right)
    )
    assert failed.trouble == "RuntimeError: no memory"
    assert misshapen.trouble == "the output has shape [1, 45, 256]; it should be [1, 46, 256]"
    assert timed.seconds


def test_a_missing_package_is_a_line_that_says_how_to_install_it():
    (result,) = measure(rival(lambda right: right, packages=("no_such_package",)))
    assert "no_such_package" in result.trouble and "pip install" in result.trouble
    assert kernels.case_table([result], {})[-1] == f"- other: missing: {result.trouble}"


def test_chosen():
    assert kernels.chosen("", ["a", "b"], "--only") == ["a", "b"]
    assert kernels.chosen(" B,a", ["a", "b", "c"], "--only") == ["a", "b"]
    with pytest.raises(LiteDetrError, match="--only has x; there are a, b"):
        kernels.chosen("a,x", ["a", "b"], "--only")


def test_rows_of_a_gpu():
    size = dataclasses.replace(kernels.SIZES["full800"], dtype="fp16")

    def result(name, seconds=(), cold=(), error=0.0, trouble=""):
        figures = {"error": error, "tolerance": 2e-3, "right": True}
        status = harness.FAILED if trouble else harness.MEASURED
        return harness.Result(name, (size, None), status, trouble, list(seconds), list(cold), figures=figures)

    case = [
        result("op", [2e-4, 1e-4, 3e-4], [4e-4], 1e-3),
        result("other", [2e-3], [2e-3]),
        result("third", trouble="no | Triton"),
    ]
    machine = {"gpu": GPU}
    assert kernels.title(size, None) == "full800, fp16"
    lines = kernels.case_table(case, machine)
    headings, ours, other = ([cell.strip() for cell in lines[i].split("|")[1:-1]] for i in (5, 7, 8))
    assert dict(zip(headings, ours)) == {
        "contender": "op", "median ms": "0.200", "p90 ms": "0.280", "cold ms": "0.400", "cold p90": "0.400",
        "calls": "3", "GB/s": "3641", "of L2": "91 %", "of memory": "6 %", "GFLOP/s": "5462", "times op": "1.00",
        "error": "1e-03",
    }  # fmt: skip
    assert other[1] == "2.00" and other[headings.index("times op")] == "10.0"
    assert lines[-1] == "- third: failed: no \\| Triton"
    machine |= timing.machine([])
    assert lines[-1] in kernels.as_markdown([case], machine)
    row = kernels.as_dict([case], machine, {})["results"][0]
    assert (
        row["bytes_compulsory"] == size.work["bytes_compulsory"] and row["threads"] is None and row["dtype"] == "fp16"
    )
    assert row["of_memory"] == pytest.approx(size.work["bytes_compulsory"] / 4e-4 / 2e12)


@pytest.fixture
def command(monkeypatch, capsys):
    """Runs the script's command on the tiny sizes with the given contenders: exit status, stdout and stderr."""
    monkeypatch.setattr(kernels, "SIZES", {size.name: size for size in TINY_SIZES})

    def run(rivals, *arguments, device="cpu"):
        monkeypatch.setitem(kernels.RIVALS, device, tuple(rivals))
        status = kernels.main(["--device", device, "--seconds", "0", *map(str, arguments)])
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def no_gpu_needed(monkeypatch):
    """What stands for a GPU is the CPU."""

    class OnCpu(kernels.Problem):
        def __init__(self, size, device):
            super().__init__(size)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(timing, "device", lambda: GPU)
    monkeypatch.setattr(kernels, "Problem", OnCpu)


def test_reports(command, tmp_path):
    rivals = [*QUICK, rival(lambda right: right, "absent", ("no_such_package",))]
    status, printed, _ = command(rivals, "--threads", "1,2", "--cold", "--output", tmp_path / "new" / "kernels.v1")
    assert status == 0
    drawn = importlib.util.find_spec("matplotlib") is not None
    endings = [".json", ".md"] + [".png"] * drawn
    written = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in written] == ["kernels.v1" + ending for ending in endings]
    assert "pip install" in printed and "GB/s" in printed

    report = json.loads(written[0].read_text())
    assert set(report) == {"benchmark", "machine", "settings", "sizes", "results"}
    assert report["machine"]["packages"]["torch"] == torch.__version__
    assert {"cpu", "op_kernel", "date", "load_average"} <= set(report["machine"])
    assert report["sizes"]["tiny decoder"]["reference_width"] == 4
    assert report["sizes"]["tiny"] == {"maps": [list(shape) for shape in MAPS], "queries": 46, "reference_width": 2}
    names = [(row["size"], row["threads"], row["contender"]) for row in report["results"]]
    assert names == [(size, threads, c.name) for size in ("tiny", "tiny decoder") for threads in (1, 2) for c in rivals]
    for row in report["results"]:
        if row["contender"] == "absent":
            assert row["right"] is None and "no_such_package" in row["trouble"] and "median_ms" not in row
        else:
            assert row["right"] and row["error"] <= row["tolerance"] and row["calls"] == timing.FEWEST
            assert 0 < row["median_ms"] <= row["p90_ms"]
            assert 0 < row["cold_median_ms"] <= row["cold_p90_ms"]
            assert row["gigabytes_per_second"] == pytest.approx(row["bytes_gathered"] / row["median_ms"] / 1e6)
    assert all(row["times_op"] == 1 for row in report["results"] if row["contender"] == kernels.OUR_OP)
    if OPENVINO:
        assert sum(row.get("better_openvino_graph", False) for row in report["results"]) == 4  # one a case

    text = written[1].read_text()
    assert "## tiny decoder, 2 threads" in text and ("OpenVINO, better graph" in text) == OPENVINO
    if drawn:
        assert written[2].read_bytes().startswith(b"\x89PNG")


def test_reports_of_a_gpu(command, no_gpu_needed, tmp_path):
    options = ["--batches", "1,3", "--dtypes", "fp16,fp32", "--output", tmp_path / "gpu"]
    status, printed, errors = command(ON_GPU, *options, device="cuda")
    assert status == 0 and "A GPU, 100 multiprocessors" in printed
    assert f"no {kernels.DEFORMABLE_DETR}: give --deformable-detr" in errors
    rows = json.loads((tmp_path / "gpu.json").read_text())["results"]
    assert [(row["size"], row["batch"], row["dtype"], row["contender"]) for row in rows] == [
        (size.name, batch, dtype, c.name)
        for size in TINY_SIZES for batch in (1, 3) for dtype in ("fp32", "fp16") for c in ON_GPU
    ]  # fmt: skip
    assert all(row["right"] and row["of_l2"] > 0 for row in rows)
    assert "## tiny decoder, batch 3, fp16" in (tmp_path / "gpu.md").read_text()


def test_a_deformable_detr_that_does_not_compile_is_left_out(command, no_gpu_needed, tmp_path, monkeypatch):
    def fail(checkout):
        raise RuntimeError("Ninja is required to load C++ extensions")

    monkeypatch.setattr(kernels, "build_deformable_detr", fail)
    (tmp_path / "models/ops/src").mkdir(parents=True)
    options = ["--deformable-detr", tmp_path, "--only", "op", "--sizes", "tiny", "--batches", "1"]
    status, _, errors = command(ON_GPU, *options, device="cuda")
    assert status == 0 and "Ninja" not in errors  # it was not asked for
    options[3] = f"op,{kernels.DEFORMABLE_DETR}"
    status, printed, errors = command(ON_GPU, *options, device="cuda")
    assert status == 0 and f"no {kernels.DEFORMABLE_DETR}: Ninja is required" in errors and "times op" in printed


def test_old_sources_are_patched(tmp_path, monkeypatch):
    cpp_extension = pytest.importorskip("torch.utils.cpp_extension")
    source = tmp_path / "models/ops/src"
    (source / "cuda").mkdir(parents=True)
    (source / "cuda" / "kernel.cu").write_text(
        "#include <THC/THCAtomics.cuh>\nif (value.type().is_cuda()) DISPATCH(value.type(), value.data<scalar_t>());"
    )
    compiled = {}

    def load(name, sources, **options):
        assert options["build_directory"]
        compiled.update({name: Path(name).read_text() for name in sources})

    monkeypatch.setattr(cpp_extension, "load", load)
    kernels.build_deformable_detr(tmp_path)
    (text,) = compiled.values()
    assert text.splitlines() == [
        "#include <ATen/cuda/Atomic.cuh>",
        "if (value.is_cuda()) DISPATCH(value.scalar_type(), value.data_ptr<scalar_t>());",
    ]
    assert "THC" in (source / "cuda" / "kernel.cu").read_text()


def test_without_matplotlib_there_is_no_chart(command, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    status, _, errors = command([BY_NAME["op"]], "--sizes", "tiny", "--threads", "1", "--output", tmp_path / "kernels")
    assert status == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]
    assert "matplotlib is missing: pip install" in errors


def test_a_wrong_contender_fails_the_command(command, tmp_path):
    rivals = [BY_NAME["torch op"], rival(lambda right: right * torch.nan, "spoilt")]
    status, printed, _ = command(rivals, "--sizes", "tiny", "--threads", "1", "--output", tmp_path / "kernels")
    assert status == 1
    assert "- spoilt: wrong: off by nan" in printed
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["results"][1]["right"] is False and report["results"][1]["error"] is None


def test_without_our_op_the_command_fails(command):
    rivals = [rival(lambda right: right, kernels.OUR_OP, ("no_such_package",)), BY_NAME["torch op"]]
    status, _, _ = command(rivals, "--sizes", "tiny", "--threads", "1")
    assert status == 1


@pytest.mark.parametrize("finished", [0, 1])
def test_an_interrupted_command_prints_and_leaves_the_finished_cases(command, tmp_path, finished):
    def interrupt(right):
        if len(list(tmp_path.iterdir())) == 2 * finished:  # JSON and Markdown, as soon as a case is finished
            raise KeyboardInterrupt
        return right

    rivals = [BY_NAME["torch op"], rival(interrupt, "last")]
    status, printed, errors = command(rivals, "--threads", "1", "--output", tmp_path / "kernels")
    assert status == 130
    assert "torch op" in printed and "interrupted" in errors
    written = [json.loads(file.read_text()) for file in tmp_path.glob("*.json")]
    assert [{row["size"] for row in contents["results"]} for contents in written] == [{"tiny"}] * finished


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--sizes", "huge"], "--sizes has huge; there are tiny"),
        (["--only", "cuDNN"], "--only has cudnn"),
        (["--threads", "0"], "--threads is '0'"),
        (["--threads", "two"], "--threads is 'two'"),
        (["--threads", "100000"], "--threads is 100000; this machine has"),
        (["--seconds", "-1"], "--seconds is -1.0"),
        (["--seconds", "nan"], "--seconds is nan"),
        (["--batches", "4"], "--batches is not for --device cpu"),
        (["--deformable-detr", "."], "--deformable-detr is not for --device cpu"),
        (["--output", "/dev/null/kernels"], "/dev/null"),
    ],
)
def test_wrong_use(command, arguments, part):
    status, printed, errors = command(QUICK, *arguments)
    assert status == 2 and not printed
    assert errors.startswith("error: ") and part in errors and errors.count("\n") == 1


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--threads", "1"], "--threads is not for --device cuda"),
        (["--batches", "0"], "--batches is '0'"),
        (["--dtypes", "fp8"], "--dtypes has fp8; there are fp32, fp16, bf16"),
        (["--deformable-detr", "/no/such/folder"], "models/ops/src"),
    ],
)
def test_wrong_use_on_a_gpu(command, no_gpu_needed, arguments, part):
    status, printed, errors = command(ON_GPU, *arguments, device="cuda")
    assert status == 2 and not printed and errors.startswith("error: ") and part in errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_the_command_refuses_and_needs_pytorch_alone():
    """In a process where nothing can be imported that a machine with a GPU may lack."""
    code = """if True:
        import runpy, sys
        for name in ("numpy", "onnx", "onnxscript", "onnxruntime", "rich", "typer", "matplotlib", "scipy"):
            sys.modules[name] = None
        sys.argv = sys.argv[1:]
        runpy.run_path(sys.argv[0], run_name="__main__")
    """
    script = Path(__file__).parents[2] / "benchmarks" / "kernels.py"
    command = [sys.executable, "-W", "ignore", "-c", code, str(script), "--device", "cuda"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: --device is cuda") and done.stderr.count("\n") == 1, done.stderr
