"""The reference itself: against the official formulation with F.grid_sample, and at what grid_sample cannot say."""

import hypothesis
import pytest
import torch
import torch.nn.functional as F

from . import cases


def official(shape, inputs):
    """Lite DETR's and Deformable DETR's own form: grid_sample on every level, in float64."""
    inputs = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
    n, s, channels = inputs["value"].shape
    m, p, levels = shape.heads, shape.points, len(shape.maps)
    references = inputs["reference_points"][:, :, None, :, None]
    offsets = inputs["sampling_offsets"].view(n, -1, m, levels, p, 2)
    if shape.width == 2:
        locations = references + offsets / inputs["spatial_shapes"].flip(-1)[:, None]
    else:
        locations = references[..., :2] + offsets / p * references[..., 2:] * 0.5

    def sample(tokens):
        """[N, S, M*D] -> [N*M, D, Q, L*P]"""
        maps = tokens.view(n, s, m, -1).split([h * w for h, w in shape.maps], 1)
        sampled = [
            F.grid_sample(
                maps[level].permute(0, 2, 3, 1).reshape(n * m, -1, *shape.maps[level]),
                2 * locations[:, :, :, level].transpose(1, 2).flatten(0, 1) - 1,
                padding_mode="zeros",
                align_corners=False,
            )
            for level in range(levels)
        ]
        return torch.cat(sampled, -1)

    values = sample(inputs["value"])
    if shape.key == "none":
        logits = inputs["attention_logits"].view(n, -1, m, levels * p).transpose(1, 2).flatten(0, 1)[:, None]
    else:
        query = inputs["query"].view(n, -1, m, shape.head_dim).permute(0, 2, 3, 1).flatten(0, 1)
        keys = sample(inputs["key"]) if "key" in inputs else values
        logits = (query[..., None] * keys).sum(1, keepdim=True) / shape.head_dim**0.5
    output = (logits.softmax(-1) * values).sum(-1)  # [N*M, D, Q]
    return output.view(n, channels, -1).transpose(1, 2)


@cases.quick(max_examples=40)
@hypothesis.given(cases.shapes())
def test_equals_grid_sample(shape):
    inputs = cases.make_inputs(shape)
    torch.testing.assert_close(cases.run_reference(shape, inputs), official(shape, inputs), rtol=1e-10, atol=1e-12)


def test_sample_outside_takes_part_in_the_softmax():
    shape = cases.Shape(batch=1, queries=1, heads=1, head_dim=4, maps=[(1, 1)], points=2)
    inputs = {
        "query": torch.zeros(1, 1, 4),
        "value": torch.ones(1, 1, 4),
        "reference_points": torch.full((1, 1, 1, 2), 0.5),
        "sampling_offsets": torch.tensor([[[0.0, 0.0, 100.0, 0.0]]]),  # the second point is outside
        "spatial_shapes": torch.tensor([[1, 1]]),
    }
    assert cases.run_reference(shape, inputs).tolist() == [[[0.5] * 4]]


@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["sampling_offsets", "reference_points"])
@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("key", ["shared", "own", "none"])
def test_coordinate_that_is_no_number_is_outside(key, width, name, number):
    """The same as a sample far away, whatever other coordinates it has."""
    shape = cases.Shape(key=key, width=width)
    inputs, far = cases.make_inputs(shape), cases.make_inputs(shape)
    cases.put_samples_nowhere(inputs, name, number)
    size = 2 if name == "sampling_offsets" else width
    nowhere = inputs[name].view(-1, size).isfinite().all(-1).logical_not()
    far[name].view(-1, size)[nowhere] = torch.tensor([1e6, 1e6, 0.0, 0.0])[:size]
    assert torch.equal(cases.run_reference(shape, inputs), cases.run_reference(shape, far))


@pytest.mark.parametrize("offset, reached", [(0.0, True), (0.75, True), (1.0, False), (1.25, False), (-1.25, False)])
def test_nan_does_not_leave_the_pixels_around_it(offset, reached):
    # One row of three pixels, the first NaN; the sample starts on its centre, 1.0 is the centre of the next.
    shape = cases.Shape(batch=1, queries=1, heads=1, head_dim=4, maps=[(1, 3)], points=1, key="none")
    inputs = {
        "attention_logits": torch.zeros(1, 1, 1),
        "value": torch.tensor([torch.nan, 1.0, 2.0])[None, :, None].expand(1, 3, 4),
        "reference_points": torch.tensor([[[[0.5 / 3, 0.5]]]], dtype=torch.float64),
        "sampling_offsets": torch.tensor([[[offset, 0.0]]]),
        "spatial_shapes": torch.tensor([[1, 3]]),
    }
    assert cases.run_reference(shape, inputs).isnan().all().item() == reached
