"""The code that calls TensorRT, against the types of its own bindings: stubs made from 10.13, and TensorRT-RTX."""

import ast
import importlib.util
import re
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "litedetr_deploy"
SOURCES = [FOLDER / "engine" / "api.py", FOLDER / "runtime" / "tensorrt.py"]
# What one of the two does not have.
RTX_ONLY = {"ComputeCapability", "ComputeCapability.__members__", "CudaGraphStrategy",
            "CudaGraphStrategy.WHOLE_GRAPH_CAPTURE"}  # fmt: skip

OPTIONS = ["--check-untyped-defs", "--ignore-missing-imports", "--follow-imports=silent"]

mypy_api = pytest.importorskip("mypy.api", reason="mypy is not installed")
INSTALLED = next((path for path in sys.path if Path(path, "tensorrt_bindings", "tensorrt.pyi").is_file()), None)
if INSTALLED is None:
    pytest.skip("tensorrt-stubs is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def stubs(tmp_path_factory):
    """The installed stubs, of which some lines are no Python, and one hides Python's `bool`."""
    folder = tmp_path_factory.mktemp("stubs")
    for file in ("tensorrt/__init__.pyi", "tensorrt_bindings/__init__.pyi", "tensorrt_bindings/tensorrt.pyi"):
        text = Path(INSTALLED, file).read_text()
        text = text.replace("channel_axis: int) ->", "channel_axis: int = ...) ->").replace(", in: ", ", in_: ")
        text = re.sub(r"^bool: DataType.*$", "", text, flags=re.MULTILINE)
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(text)
    return folder


def check(stubs, monkeypatch, *files):
    """The checker's lines about these files; not those about the stubs."""
    monkeypatch.setenv("MYPYPATH", str(stubs))
    found, errors, status = mypy_api.run([*OPTIONS, "--cache-dir", str(stubs / "cache"), *map(str, files)])
    assert status < 2 and not errors, found + errors
    return [line for line in found.splitlines() if Path(line.partition(":")[0]).resolve() in files]


def test_arguments_and_methods(stubs, monkeypatch):
    found = check(stubs, monkeypatch, *SOURCES)
    assert not found, "\n".join(found)


def test_the_checker_sees_a_wrong_call(stubs, monkeypatch, tmp_path):
    """The classes are known: they are not `Any`."""
    text = SOURCES[0].read_text().replace("from ..", "from litedetr_deploy.")
    right, wrong = "set_memory_pool_limit(", "set_memory_pool_limits("
    assert right in text
    (tmp_path / "wrong.py").write_text(text.replace(right, wrong))
    found = check(stubs, monkeypatch, tmp_path / "wrong.py")
    assert '"IBuilderConfig" has no attribute "set_memory_pool_limits"' in "".join(found)


def chains():
    """What the sources read of the module: 'BuilderFlag.TF32' of `trt.BuilderFlag.TF32`."""
    found = set()
    for source in SOURCES:
        for node in ast.walk(ast.parse(source.read_text())):
            text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
            for root in ("self.trt.", "self._trt.", "trt."):
                if text.startswith(root):
                    found.add(text.removeprefix(root))
                    break
    return {chain for chain in found if "(" not in chain}


def stub_names(stubs):
    names = {"__version__", "__name__"}

    def visit(body, prefix):
        for node in body:
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                names.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(prefix + node.target.id)

    for file in stubs.glob("tensorrt_bindings/*.pyi"):
        visit(ast.parse(file.read_text()).body, "")
    return names


def test_names_of_the_module_in_tensorrt(stubs):
    assert chains() >= {"BuilderFlag.TF32", "IProgressMonitor", "OnnxParser", "Runtime"}
    known = stub_names(stubs)
    assert {chain for chain in chains() if chain not in known} == RTX_ONLY


@pytest.mark.skipif(importlib.util.find_spec("tensorrt_rtx") is None, reason="tensorrt_rtx is not installed")
def test_names_of_the_module_in_tensorrt_rtx():
    import tensorrt_rtx

    def has(chain):
        value = tensorrt_rtx
        for name in chain.split("."):
            value = getattr(value, name, None)
        return value is not None

    assert {chain for chain in chains() if not has(chain)} == set()
