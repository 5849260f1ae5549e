from dataclasses import replace

import pytest

import litedetr_deploy as ld
from litedetr_deploy.engine import api, known_bad
from litedetr_deploy.engine.known_bad import Target, gate
from litedetr_deploy.files import tomllib

GOOD = Target("tensorrt", (10, 15, 1), "fp16", frozenset({"Conv", "KeyAwareDeformAttn"}), ("8.6",))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"version": (10, 3)},
        {"version": (11, 4, 1)},
        {"version": (10, 13), "operators": frozenset({"GridSample"})},
        {"version": (10, 7), "jetpack": 6, "compute_capabilities": ("8.7",)},
        {"version": (11, 4, 1), "jetpack": 7},
        {"version": (10, 15), "jetpack": 7, "compute_capabilities": ("11.0",)},
        {"backend": "tensorrt-rtx", "version": (1, 7, 1)},
        {"compute_capabilities": ("12.0",), "precision": "fp32"},
    ],
)
def test_nothing_against(changes):
    assert gate(replace(GOOD, **changes)) == []


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"version": (10, 2, 0)}, "the interfaces of TensorRT 10.3"),
        ({"version": (12, 0)}, "newer than what litedetr-deploy knows"),
        ({"version": (10, 14), "operators": frozenset({"GridSample"})}, "GridSample nodes wrong"),
        ({"version": (11, 1), "operators": frozenset({"GridSample"})}, "GridSample nodes wrong"),
        ({"backend": "tensorrt-rtx", "version": (1, 7), "operators": frozenset({"GridSample"})}, "GridSample"),
        ({"version": (10, 3), "jetpack": 6}, "JetPack 6"),
        ({"version": (11, 4, 1), "jetpack": 6}, "does not support JetPack 6"),
        ({"version": (10, 14), "jetpack": 7}, "before 10.15"),
        ({"version": (11, 4, 0), "jetpack": 7}, "11.0 to 11.4.0 does not support JetPack"),
        ({"version": (10, 14), "compute_capabilities": ("11.0",)}, "Thor"),
    ],
)
def test_refused_and_allowed(changes, why):
    target = replace(GOOD, **changes)
    version = ".".join(map(str, target.version))
    with pytest.raises(ld.LiteDetrError, match=f"{target.backend} {version} .*{why}.*--allow-known-bad"):
        gate(target)
    assert any(why in warning for warning in gate(target, allow_known_bad=True))


@pytest.mark.parametrize("precision", ["fp16", "bf16", "int8"])
def test_warned_about(precision):
    [warning] = gate(replace(GOOD, compute_capabilities=("8.6", "12.0"), precision=precision))
    assert "fused multi-head attention" in warning


@pytest.mark.parametrize(
    "text, jetpack",
    [
        ("# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic", 6),
        ("# R38 (release), REVISION: 2.0", 7),
        ("# R35 (release), REVISION: 4.1", None),
        ("something else", None),
        (None, None),
    ],
)
def test_jetpack(monkeypatch, tmp_path, text, jetpack):
    monkeypatch.setattr(known_bad, "TEGRA_RELEASE", tmp_path / "nv_tegra_release")
    if text is not None:
        known_bad.TEGRA_RELEASE.write_text(text)
    assert known_bad.find_jetpack() == jetpack


def test_the_table_holds_what_its_head_describes():
    text = known_bad.TABLE.read_text()
    head = text.partition("[[row]]")[0]
    for row in tomllib.loads(text)["row"]:
        assert {"why", "fix", "source"} < set(row)
        assert all(key in head for key in row), row
        assert all(isinstance(row.get(key, ""), str) for key in ("since", "before", "compute_capability", "operator"))


def test_version_numbers():
    assert api.version_numbers("10.14.1.48") == (10, 14, 1, 48)
    assert api.version_numbers("11.4.0") < api.version_numbers("11.4.1.2")
