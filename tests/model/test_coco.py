import litedetr_deploy as ld
from litedetr_deploy.model.coco import CLASS_NAMES


def test_coco_names():
    assert len(CLASS_NAMES) == 91
    assert sum(name == "N/A" for name in CLASS_NAMES) == 11
    # From COCO's annotations
    for label, name in (
        (1, "person"),
        (13, "stop sign"),
        (18, "dog"),
        (44, "bottle"),
        (67, "dining table"),
        (90, "toothbrush"),
    ):
        assert CLASS_NAMES[label] == name


def test_a_model_with_cocos_classes_knows_their_names():
    assert ld.load_model(variant="lite-dino-r26n", num_classes=91).class_names == CLASS_NAMES
    assert ld.load_model(variant="lite-dino-r26n").class_names is None
    assert ld.load_model("lite-dino-shapes").class_names[0] == "disc"
