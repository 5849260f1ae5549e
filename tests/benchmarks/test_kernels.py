"""benchmarks/kernels.py on sizes that take no time: what it refuses to time, and what it writes."""

import importlib.util
import json

import kernels
import pytest
import timing
import torch
import typer
from typer.testing import CliRunner

MAPS = ((6, 5), (3, 4), (2, 2))
TINY = kernels.Size("tiny", MAPS)
TINY_SIZES = [TINY, kernels.Size("tiny decoder", MAPS, boxes=7)]
OPENVINO = importlib.util.find_spec("openvino") is not None
# torch.compile is left out: it compiles for half a minute.
QUICK = [
    contender
    for contender in kernels.CONTENDERS
    if contender.name != "torch.compile" and (OPENVINO or "openvino" not in contender.packages)
]
BY_NAME = {contender.name: contender for contender in kernels.CONTENDERS}


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(timing, "REST", 0)
    monkeypatch.setattr(timing, "evict_caches", lambda: None)


@pytest.fixture(autouse=True)
def same_torch_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def measure(*contenders, size=TINY, threads=1):
    results = []
    kernels.measure(kernels.Problem(size), threads, contenders, 0.0, results)
    return results


def contender(function, name="other", packages=()):
    """One that makes its output out of the right one."""

    def make(problem, threads):
        right = kernels.sampling_once_call(problem, threads)
        return lambda: function(right())

    return kernels.Contender(name, make, packages)


def test_sizes():
    assert {name: size.queries for name, size in kernels.SIZES.items()} == {
        "full800": 22223, "high800": 5523, "dec800": 900, "full640": 8500, "high640": 2100,
    }  # fmt: skip
    # 22223 queries x 8 heads x 16 samples, each 4 corners of 128 bytes, each 6 x 32 multiply-adds
    assert kernels.SIZES["full800"].bytes_gathered == 22223 * 8 * 16 * 512
    assert kernels.SIZES["full800"].flop == 22223 * 8 * 16 * 384


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
        assert result.error <= result.tolerance < 1e-3
        assert len(result.seconds) == timing.FEWEST and result.median > 0


def test_all_queries_together_are_what_each_is_alone():
    """The check looks at a few queries only; here it looks at all."""
    problem = kernels.Problem(TINY)
    assert sorted(problem.checked.tolist()) == list(range(TINY.queries))


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
    wrong, right = measure(contender(spoil), BY_NAME["torch op"])
    assert wrong.wrong and not wrong.seconds and wrong.trouble.startswith("WRONG")
    assert not right.wrong and right.seconds


def test_a_contender_that_fails_is_reported():
    def fail(right):
        raise RuntimeError("no memory\nand more")

    failed, misshapen, timed = measure(
        contender(fail, "fails"), contender(lambda right: right[:, 1:], "cuts"), contender(lambda right: right)
    )
    assert failed.trouble == "failed: no memory"
    assert misshapen.trouble == "failed: the output has shape [1, 45, 256]; it should be [1, 46, 256]"
    assert timed.seconds


def test_a_missing_package_is_a_line_that_says_how_to_install_it():
    (result,) = measure(contender(lambda right: right, packages=("no_such_package",)))
    assert "no_such_package" in result.trouble and "pip install" in result.trouble
    assert kernels.table_rows([result]) == [["other", result.trouble]]


def test_an_interruption_leaves_what_was_measured():
    calls = []

    def interrupt_later(right):
        calls.append(right)
        if len(calls) == 6:  # the check, the estimate and one timed call, each with one before it, and this
            raise KeyboardInterrupt
        return right

    results = []
    contenders = [contender(interrupt_later), BY_NAME["torch op"]]
    with pytest.raises(KeyboardInterrupt):
        kernels.measure(kernels.Problem(TINY), 1, contenders, 0.0, results)
    assert [len(result.seconds) for result in results] == [1, 1]


def test_chosen():
    assert kernels.chosen("", ["a", "b"], "--only") == ["a", "b"]
    assert kernels.chosen(" B,a", ["a", "b", "c"], "--only") == ["a", "b"]
    with pytest.raises(typer.BadParameter, match="--only has x; there are a, b"):
        kernels.chosen("a,x", ["a", "b"], "--only")


@pytest.mark.parametrize("number, text", [(0.01234, "0.0123"), (1.0, "1.00"), (56.78, "56.8"), (1234.5, "1234")])
def test_three_digits(number, text):
    assert kernels.three_digits(number) == text


@pytest.fixture
def command(monkeypatch):
    """Runs the script's command on the tiny sizes with the given contenders."""
    monkeypatch.setattr(kernels, "SIZES", {size.name: size for size in TINY_SIZES})
    app = typer.Typer()
    app.command()(kernels.main)

    def run(contenders, *arguments):
        monkeypatch.setattr(kernels, "CONTENDERS", tuple(contenders))
        return CliRunner().invoke(app, ["--seconds", "0", *map(str, arguments)])

    return run


def test_reports(command, tmp_path):
    contenders = [*QUICK, contender(lambda right: right, "absent", ("no_such_package",))]
    done = command(contenders, "--sizes", "tiny,tiny decoder", "--output", tmp_path / "new" / "kernels.v1")
    assert done.exit_code == 0, done.output
    drawn = importlib.util.find_spec("matplotlib") is not None
    endings = [".json", ".md"] + [".png"] * drawn
    written = sorted((tmp_path / "new").iterdir())
    assert [path.name for path in written] == ["kernels.v1" + ending for ending in endings]
    assert "pip install" in done.output and "GB/s" in done.output

    report = json.loads(written[0].read_text())
    assert set(report) == {"benchmark", "machine", "settings", "sizes", "results"}
    assert report["machine"]["packages"]["torch"] == torch.__version__
    assert {"cpu", "op_kernel", "date", "load_average"} <= set(report["machine"])
    assert report["sizes"]["tiny decoder"]["reference_width"] == 4
    assert report["sizes"]["tiny"] == {
        "maps": [list(shape) for shape in MAPS], "queries": 46, "reference_width": 2,
        "bytes_gathered": TINY.bytes_gathered, "flop": TINY.flop,
    }  # fmt: skip
    names = [(row["size"], row["threads"], row["contender"]) for row in report["results"]]
    assert names == [
        (size, threads, c.name) for size in ("tiny", "tiny decoder") for threads in (1, 2) for c in contenders
    ]
    for row in report["results"]:
        if row["contender"] == "absent":
            assert row["right"] is None and "no_such_package" in row["trouble"] and "median_ms" not in row
        else:
            assert row["right"] and row["error"] <= row["tolerance"] and row["calls"] == timing.FEWEST
            assert 0 < row["median_ms"] <= row["p90_ms"]
            gathered = report["sizes"][row["size"]]["bytes_gathered"]
            assert row["gigabytes_per_second"] == pytest.approx(gathered / row["median_ms"] / 1e6)
    assert all(row["times_op"] == 1 for row in report["results"] if row["contender"] == kernels.OUR_OP)
    if OPENVINO:
        assert sum(row.get("better_openvino_graph", False) for row in report["results"]) == 4  # one a case

    text = written[1].read_text()
    assert "## tiny decoder, 2 threads" in text and ("OpenVINO, better graph" in text) == OPENVINO
    if drawn:
        assert written[2].read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_there_is_no_chart(command, tmp_path, monkeypatch):
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "matplotlib" else find_spec(name))
    done = command([BY_NAME["torch op"]], "--sizes", "tiny", "--threads", "1", "--output", tmp_path / "kernels")
    assert done.exit_code == 0
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".json", ".md"]
    assert "matplotlib is missing: pip install" in done.output


def test_a_wrong_contender_fails_the_command(command, tmp_path):
    contenders = [BY_NAME["torch op"], contender(lambda right: right * torch.nan, "spoilt")]
    done = command(contenders, "--sizes", "tiny", "--threads", "1", "--output", tmp_path / "kernels")
    assert done.exit_code == 1
    assert "spoilt: WRONG" in done.output
    report = json.loads((tmp_path / "kernels.json").read_text())
    assert report["results"][1]["right"] is False and report["results"][1]["error"] is None


def test_an_interrupted_command_prints_and_writes_nothing(command, tmp_path):
    def interrupt(right):
        raise KeyboardInterrupt

    contenders = [BY_NAME["torch op"], contender(interrupt, "last")]
    done = command(contenders, "--sizes", "tiny", "--threads", "1", "--output", tmp_path / "kernels")
    assert done.exit_code == 130
    assert "torch op" in done.output and "interrupted" in done.output
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments, part",
    [
        (["--sizes", "huge"], "huge"),
        (["--only", "cuDNN"], "cudnn"),
        (["--threads", "0"], "--threads"),
        (["--threads", "two"], "--threads"),
        (["--seconds", "-1"], "--seconds"),
    ],
)
def test_wrong_use(command, arguments, part):
    done = command(QUICK, *arguments)
    assert done.exit_code == 2 and part in done.output
