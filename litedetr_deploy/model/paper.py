"""The rows of Lite DETR's tables (arXiv 2303.07335) that say what a model costs."""

from __future__ import annotations

from typing import NamedTuple


class Row(NamedTuple):
    variant: str
    ap: float  # on COCO val2017
    gflops: int  # 1 multiply-add = 1, one image of 850x1040
    encoder_gflops: int


ROWS = (
    # 50 epochs
    Row("deformable-detr-r50", 46.8, 177, 90),
    Row("lite-deformable-detr-r50-h2l2-2+1x3", 45.8, 108, 23),
    Row("lite-deformable-detr-r50-h3l1-6+1x1", 45.9, 115, 30),
    Row("lite-deformable-detr-r50-h3l1-3+1x2", 46.2, 119, 35),
    Row("lite-deformable-detr-r50-h3l1-2+1x3", 46.7, 123, 39),
    # 36 epochs
    Row("dino-r50", 50.7, 235, 137),
    Row("lite-dino-r50-h2l2-2+1x3", 49.9, 130, 30),
    Row("lite-dino-r50-h3l1-6+1x1", 50.2, 141, 41),
    Row("lite-dino-r50-h3l1-2+1x3", 50.4, 151, 53),
    Row("h-detr-r50", 50.0, 226, 137),
    Row("lite-h-detr-r50-h3l1-2+1x3", 49.5, 142, 53),
    Row("dino-swin-t", 54.1, 243, 137),
    Row("lite-dino-swin-t-h2l2-2+1x3", 53.1, 138, 30),
    Row("lite-dino-swin-t-h3l1-6+1x1", 53.3, 149, 41),
    Row("lite-dino-swin-t-h3l1-2+1x3", 53.9, 159, 53),
    Row("h-detr-swin-t", 53.2, 234, 137),
    Row("lite-h-detr-swin-t-h2l2-2+1x3", 52.3, 131, 30),
    Row("lite-h-detr-swin-t-h3l1-6+1x1", 52.7, 142, 41),
    Row("lite-h-detr-swin-t-h3l1-2+1x3", 53.0, 152, 53),
)
