import numpy as np

from litedetr_deploy.runtime.postprocess import postprocess


def test_hand_computed():
    # Two queries, three classes.  Logits of 0, log 3 and -log 3 are scores of 0.5, 0.75 and 0.25.
    log3 = np.log(3)
    logits = np.array([[[0, log3, -9], [-log3, -8, -7]]], np.float32)
    boxes = np.array([[[0.5, 0.5, 0.2, 0.4], [0.1, 0.9, 0.4, 0.4]]], np.float32)
    labels, corners, scores = postprocess(logits, boxes, np.array([[100, 50]]))
    assert labels.dtype == np.int64 and labels.tolist() == [[1, 0, 0, 2, 1, 2]]
    np.testing.assert_allclose(scores[0, :3], [0.75, 0.5, 0.25], rtol=1e-6)
    first, second = [40, 15, 60, 35], [-10, 35, 30, 55]  # not clipped to the image
    np.testing.assert_allclose(corners[0, :4], [first, first, second, second], atol=1e-4)


def test_at_most_300_and_every_image_by_itself():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(3, 900, 91)).astype(np.float32)
    boxes = rng.random((3, 900, 4), np.float32)
    sizes = np.array([[640, 480], [100, 200], [7, 5]])
    labels, corners, scores = postprocess(logits, boxes, sizes)
    assert labels.shape == scores.shape == (3, 300) and corners.shape == (3, 300, 4)
    assert (np.diff(scores, axis=1) <= 0).all()
    for image in range(3):
        alone = postprocess(logits[image : image + 1], boxes[image : image + 1], sizes[image : image + 1])
        for whole, part in zip((labels, corners, scores), alone):
            np.testing.assert_array_equal(whole[image], part[0])


def test_saturated_scores_keep_their_order():
    logits = np.array([[[90.0, 95.0, -1000.0, 100.0]]], np.float32)
    labels, _, scores = postprocess(logits, np.zeros((1, 1, 4), np.float32), np.array([[1, 1]]))
    assert labels.tolist() == [[3, 1, 0, 2]]
    assert scores[0].tolist() == [1, 1, 1, 0]
