"""What Python says of the native side, against what a compiler says of its headers."""

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

from litedetr_deploy.ops import native, schema

PLUGINS = Path(__file__).parents[2] / "plugins"
STRUCTURES = {"kda_arguments": native.Arguments, "kda_gradients": native.Gradients, "kda_executor": native.Executor}
NUMBERS = {
    "KDA_ABI_VERSION": native.ABI_VERSION,
    "KDA_FLOAT32": native.FLOAT32,
    "KDA_FLOAT16": native.FLOAT16,
    "KDA_BFLOAT16": native.BFLOAT16,
    "KDA_OK": native.OK,
    "KDA_INVALID_ARGUMENT": native.INVALID_ARGUMENT,
    "litedetr::kOpVersion": schema.VERSION,
}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, str]:
    """What the headers say, by expression: sizes, offsets, numbers, and the ops' description."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("there is no C++ compiler")
    lines = [f'printf("{name} %lld\\n", (long long)({name}));' for name in NUMBERS]
    for structure, mirror in STRUCTURES.items():
        lines.append(f'printf("{structure} %zu\\n", sizeof({structure}));')
        for field, _ in mirror._fields_:
            lines.append(
                f'printf("{structure}.{field} %zu:%zu\\n", offsetof({structure}, {field}), '
                f"sizeof({structure}::{field}));"
            )
    lines.append('printf("domain %s\\n", litedetr::kDomain);')
    lines.append('for (const auto& attribute : litedetr::kAttributes) printf("attribute:%s 1\\n", attribute.name);')
    for key_aware in ("true", "false"):
        lines.append(f'printf("op:{key_aware} %s\\n", litedetr::op_name({key_aware}));')
        lines.append(
            f"for (int i = 0; i < (int)litedetr::kNumInputs - !{key_aware}; ++i) "
            f'printf("input:{key_aware}:%d %s,%c,%zu\\n", i, litedetr::input_name({key_aware}, i), '
            "litedetr::kInputs[i].type, litedetr::kInputs[i].rank);"
        )
    folder = tmp_path_factory.mktemp("layout")
    program = '#include "op.h"\n#include <cstddef>\n#include <cstdio>\nint main() {\n' + "\n".join(lines) + "\n}\n"
    (folder / "layout.cpp").write_text(program)
    includes = [f"-I{PLUGINS}", f"-I{PLUGINS / 'kda'}"]
    command = [compiler, "-std=c++17", "-Wno-invalid-offsetof", *includes, "layout.cpp", "-o", "layout"]
    subprocess.run(command, cwd=folder, check=True)
    output = subprocess.run([folder / "layout"], capture_output=True, text=True, check=True).stdout
    return dict(line.split(" ", 1) for line in output.splitlines())


@pytest.mark.parametrize("structure, mirror", STRUCTURES.items())
def test_structures_have_the_compilers_layout(compiled, structure, mirror):
    fields = {name: getattr(mirror, name) for name, _ in mirror._fields_}
    assert {name: f"{field.offset}:{field.size}" for name, field in fields.items()} == {
        name: compiled[f"{structure}.{name}"] for name in fields
    }
    assert str(ctypes.sizeof(mirror)) == compiled[structure]


def test_structures_have_no_field_that_python_lacks(compiled):
    """The fields are all there: they fill the structure, but for no padding."""
    for structure, mirror in STRUCTURES.items():
        assert sum(ctypes.sizeof(kind) for _, kind in mirror._fields_) == int(compiled[structure])


def test_numbers(compiled):
    assert {name: int(compiled[name]) for name in NUMBERS} == NUMBERS


def test_ops_inputs_and_attributes(compiled):
    assert compiled["domain"] == schema.DOMAIN
    assert [name[10:] for name in compiled if name.startswith("attribute:")] == list(schema.ATTRIBUTES)
    assert {name.partition(":")[2]: text for name, text in compiled.items() if name.startswith("op:")} == {
        "true": schema.KEY_AWARE,
        "false": schema.PLAIN,
    }
    for key_aware, op_type in (("true", schema.KEY_AWARE), ("false", schema.PLAIN)):
        described = [text for name, text in compiled.items() if name.startswith(f"input:{key_aware}:")]
        assert described == [
            f"{name},{letter},{len(schema.SHAPES[name])}" for name, letter, _ in schema.INPUTS[op_type]
        ]
