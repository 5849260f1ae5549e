"""The models of Lite DETR's tables (arXiv 2303.07335) and what they cost; paper.json lists them by their training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import NamedTuple


class PublishedModel(NamedTuple):
    variant: str
    ap: float  # on COCO val2017
    gflops: int  # 1 multiply-add = 1, one image of 850x1040
    encoder_gflops: int


_TABLES = json.loads(Path(__file__).with_suffix(".json").read_text())
PUBLISHED = tuple(PublishedModel(*row) for rows in _TABLES.values() for row in rows)
