"""Exports of the golden variants, each made once."""

import pytest

import litedetr_deploy as ld


@pytest.fixture(scope="session")
def exported(model_of, tmp_path_factory):
    """(golden variant, attention) -> path of its ONNX model: dynamic size, with a pixel mask, not yet verified."""
    folder = tmp_path_factory.mktemp("exported")

    def get(name: str, attention: str):
        path = folder / f"{name}_{attention}.onnx"
        if not path.exists():
            ld.export_onnx(model_of(name), path, attention=attention, image_size=None, pixel_mask=True, verify=False)
        return path

    return get
