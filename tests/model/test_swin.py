"""Swin's windows, masks and biases against loops that are written from the paper (section 3.2)."""

import pytest
import torch

from litedetr_deploy.model.swin import HIDDEN, PatchEmbed, PatchMerging, SwinBlock, Windows, relative_position_index


@pytest.mark.parametrize("window", [1, 4, 7, 12])
def test_relative_position_index(window):
    index = relative_position_index(window)
    for query in range(window**2):
        for key in range(0, window**2, 5):
            down = query // window - key // window
            across = query % window - key % window
            assert index[query, key] == (down + window - 1) * (2 * window - 1) + across + window - 1


def attended(block: SwinBlock, x: torch.Tensor, height: int, width: int, shift: int) -> torch.Tensor:
    """x [height * width, dim] after the block's attention, query by query."""
    window, heads = block.window, block.attn.num_heads
    rows, columns = -(-height // window) * window, -(-width // window) * window
    normed = block.norm1(x).view(height, width, -1)
    padded = torch.zeros(rows, columns, x.shape[1], dtype=x.dtype)
    padded[:height, :width] = normed
    query, key, value = block.attn.qkv(padded).view(rows, columns, 3, heads, -1).unbind(2)
    result = torch.zeros_like(normed)
    for y in range(height):
        for x_ in range(width):
            # Where the token stands after the shift, and who stands in its window.
            row, column = (y - shift) % rows, (x_ - shift) % columns
            logits, values = [], []
            for r in range(row - row % window, row - row % window + window):
                for c in range(column - column % window, column - column % window + window):
                    ky, kx = (r + shift) % rows, (c + shift) % columns
                    place = (row - r + window - 1) * (2 * window - 1) + column - c + window - 1
                    bias = block.attn.relative_position_bias_table[place]
                    # Neighbours in the window that the shift brought there from the other side of the map.
                    wrapped = shift and ((row + shift >= rows) != (r + shift >= rows)
                                         or (column + shift >= columns) != (c + shift >= columns))  # fmt: skip
                    scale = query.shape[-1] ** -0.5
                    logits.append((query[y, x_] * key[ky, kx]).sum(-1) * scale + bias + (HIDDEN if wrapped else 0))
                    values.append(value[ky, kx])
            weights = torch.stack(logits).softmax(0)  # [window^2, heads]
            result[y, x_] = block.attn.proj((weights[..., None] * torch.stack(values)).sum(0).flatten())
    return result.flatten(0, 1)


@pytest.mark.parametrize("height,width,window,shift", [
    (4, 4, 2, 0), (4, 6, 2, 1), (5, 7, 3, 0), (5, 7, 3, 1), (2, 3, 4, 2), (8, 5, 4, 2), (1, 1, 3, 1),
])  # fmt: skip
def test_attention_in_windows(height, width, window, shift):
    torch.manual_seed(0)
    block = SwinBlock(8, window, num_heads=2).double()
    torch.nn.init.normal_(block.attn.relative_position_bias_table)
    torch.nn.init.normal_(block.norm1.bias)
    x = torch.randn(2, height * width, 8, dtype=torch.float64)
    with torch.no_grad():
        wanted = torch.stack([tokens + attended(block, tokens, height, width, shift) for tokens in x])
        wanted = wanted + block.mlp(block.norm2(wanted))
        windows = Windows(height, width, window, shift)
        found = block(x, windows)
    # The mask is made in float32, of small whole numbers.
    assert (found - wanted).abs().max() < 1e3 * torch.finfo(torch.float64).eps


def test_every_token_comes_back():
    for height, width, window, shift in ((5, 9, 4, 2), (14, 7, 7, 3), (3, 3, 7, 3)):
        windows = Windows(height, width, window, shift)
        assert windows.tokens[windows.places].tolist() == list(range(height * width))
        assert (windows.tokens == height * width).sum() == len(windows.tokens) - height * width


@pytest.mark.parametrize("height,width", [(4, 6), (5, 6), (4, 3), (1, 1)])
def test_merging(height, width):
    torch.manual_seed(0)
    merging = PatchMerging(4).double()
    x = torch.randn(2, height * width, 4, dtype=torch.float64)
    padded = torch.zeros(2, height + height % 2, width + width % 2, 4, dtype=torch.float64)
    padded[:, :height, :width] = x.view(2, height, width, 4)
    with torch.no_grad():
        rows = [
            torch.cat([padded[:, y + dy, x_ + dx] for dx in (0, 1) for dy in (0, 1)], -1)
            for y in range(0, height, 2) for x_ in range(0, width, 2)
        ]  # fmt: skip
        wanted = merging.reduction(merging.norm(torch.stack(rows, 1)))
        assert (merging(x, height, width) - wanted).abs().max() < 1e2 * torch.finfo(torch.float64).eps


@pytest.mark.parametrize("height,width", [(8, 12), (9, 14), (11, 7)])
def test_patches_cover_the_image(height, width):
    torch.manual_seed(0)
    patches = PatchEmbed(6).double()
    image = torch.randn(1, 3, height, width, dtype=torch.float64)
    padded = torch.nn.functional.pad(image, (0, -width % 4, 0, -height % 4))
    with torch.no_grad():
        tokens, rows, columns = patches(image)
        wanted = patches.norm(patches.proj(padded).flatten(2).transpose(1, 2))
    assert (rows, columns) == (-(-height // 4), -(-width // 4))
    assert (tokens - wanted).abs().max() < 1e2 * torch.finfo(torch.float64).eps
