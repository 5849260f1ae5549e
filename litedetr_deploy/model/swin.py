"""Swin Transformers (arXiv 2103.14030), as the checkpoints name them (models/dino/swin_transformer.py).  Padding,
shifting and cutting into windows is one gather of tokens, and its inverse another; an export at a fixed size folds the
indices, which follow from the map's size alone."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn

# Channels of the first stage, blocks of every stage, and heads of the first stage, which double as the channels do.
SHAPES = {"swin-t": (96, (2, 2, 6, 2), 3), "swin-l": (192, (2, 2, 18, 2), 6)}

PATCH = 4  # pixels
HIDDEN = -100.0  # added to the logits of pairs that must not attend to each other, as in the official code


class WindowAttention(nn.Module):
    """Self-attention in windows of window x window tokens, with a learned bias for every relative position."""

    def __init__(self, dim: int, window: int, num_heads: int):
        super().__init__()
        self.window, self.num_heads = window, num_heads
        self.relative_position_bias_table = nn.Parameter(torch.zeros((2 * window - 1) ** 2, num_heads))
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x [N, windows, window^2, dim]; mask [windows, window^2, window^2] is added to the logits -> as x."""
        query, key, value = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(3, 0, 1, 4, 2, 5).unbind(0)
        index = relative_position_index(self.window, x.device)
        bias = self.relative_position_bias_table.index_select(0, index.flatten())
        bias = bias.unflatten(0, index.shape).permute(2, 0, 1)  # heads, window^2, window^2
        logits = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1) + bias
        if mask is not None:
            logits = logits + mask[:, None]
        return self.proj((logits.softmax(-1) @ value).transpose(2, 3).flatten(3))


def relative_position_index(window: int, device=None) -> Tensor:
    """[window^2, window^2]: for a query and a key in row-major order, the row of the table of biases."""
    place = torch.arange(window, device=device)
    distance = place[:, None] - place[None] + window - 1  # 0 to 2 window - 2
    index = distance[:, None, :, None] * (2 * window - 1) + distance[None, :, None, :]
    return index.flatten(2).flatten(0, 1)


class SwinBlock(nn.Module):
    def __init__(self, dim: int, window: int, num_heads: int):
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(dim)
        self.attn = WindowAttention(dim, window, num_heads)
        self.norm2 = nn.LayerNorm(dim)
        layers = {"fc1": nn.Linear(dim, 4 * dim), "act": nn.GELU(), "fc2": nn.Linear(4 * dim, dim)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def forward(self, x: Tensor, windows: Windows) -> Tensor:
        """x [N, height * width, dim], the tokens of a map -> as x."""
        tokens = with_zero_token(self.norm1(x)).index_select(1, windows.tokens)
        tokens = self.attn(tokens.unflatten(1, (-1, self.window**2)), windows.mask).flatten(1, 2)
        x = x + tokens.index_select(1, windows.places)
        return x + self.mlp(self.norm2(x))


class Windows:
    """A map cut into windows of window x window tokens, after a cyclic shift up and left by `shift` tokens.  It is
    padded with zeros at the bottom and the right; padding attends and is attended to, as in the official code.

    tokens [windows * window^2]: which token stands at each place of the windows; height * width is a zero token.
    places [height * width]: where each token of the map stands.
    mask [windows, window^2, window^2]: HIDDEN between tokens that the shift brought together; None without a shift.
    """

    def __init__(self, height: int, width: int, window: int, shift: int, device=None):
        rows, row_places, row_regions = _cut(height, window, shift, device)
        columns, column_places, column_regions = _cut(width, window, shift, device)
        inside = (rows < height)[:, None, :, None] & (columns < width)[None, :, None, :]
        tokens = rows[:, None, :, None] * width + columns[None, :, None, :]
        self.tokens = torch.where(inside, tokens, height * width).flatten()
        down, in_row = row_places.unbind(1)
        across, in_column = column_places.unbind(1)
        first = (down[:, None] * columns.shape[0] + across[None]) * window**2
        self.places = (first + in_row[:, None] * window + in_column[None]).flatten()
        self.mask = None
        if shift:
            regions = (row_regions[:, None, :, None] * 3 + column_regions[None, :, None, :]).flatten(2).flatten(0, 1)
            self.mask = (regions[:, :, None] != regions[:, None]).float() * HIDDEN


def _cut(size: int, window: int, shift: int, device) -> tuple[Tensor, Tensor, Tensor]:
    """Along one side: the row at each place [windows, window], `size` or more where it is padding; window and place in
    it of each row [size, 2]; and region of each place [windows, window], of those that a shift keeps apart."""
    padded = (size + window - 1) // window * window
    place = torch.arange(padded, device=device)
    rows = _wrap(place + shift, padded).unflatten(0, (-1, window))
    places = _wrap(torch.arange(size, device=device) + (padded - shift), padded)
    places = torch.stack((places // window, places % window), -1)
    regions = (place >= padded - window).long() + (place >= padded - shift).long()
    return rows, places, regions.unflatten(0, (-1, window))


def _wrap(place: Tensor, size: int) -> Tensor:
    """0 to 2 size - 1 -> 0 to size - 1.  The exporter has no remainder by a dynamic size."""
    return torch.where(place >= size, place - size, place)


def with_zero_token(x: Tensor) -> Tensor:
    """[N, S, C] -> [N, S + 1, C]"""
    return torch.cat((x, x.new_zeros(x.shape[0], 1, x.shape[2])), 1)


class PatchMerging(nn.Module):
    """Two by two tokens become one of twice the channels; odd sides are padded with zeros."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        """x [N, height * width, dim] -> [N, ceil(height / 2) * ceil(width / 2), 2 dim]"""
        row = torch.arange((height + 1) // 2, device=x.device)[:, None, None] * 2
        column = torch.arange((width + 1) // 2, device=x.device)[None, :, None] * 2
        row = row + torch.tensor((0, 1, 0, 1), device=x.device)  # the official order: down before across
        column = column + torch.tensor((0, 0, 1, 1), device=x.device)
        tokens = torch.where((row < height) & (column < width), row * width + column, height * width)
        merged = with_zero_token(x).index_select(1, tokens.flatten()).unflatten(1, (-1, 4)).flatten(2)
        return self.reduction(self.norm(merged))


class Stage(nn.Module):
    def __init__(self, dim: int, blocks: int, window: int, num_heads: int, last: bool):
        super().__init__()
        self.window = window
        self.blocks = nn.ModuleList(SwinBlock(dim, window, num_heads) for _ in range(blocks))
        self.downsample = None if last else PatchMerging(dim)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        plain, shifted = (Windows(height, width, self.window, shift, x.device) for shift in (0, self.window // 2))
        for i, block in enumerate(self.blocks):
            x = block(x, shifted if i % 2 else plain)
        return x


class PatchEmbed(nn.Module):
    """Patches of 4 x 4 pixels become tokens; the image is padded with zeros at the bottom and the right."""

    def __init__(self, dim: int):
        super().__init__()
        self.proj = nn.Conv2d(3, dim, PATCH, PATCH)
        self.norm = nn.LayerNorm(dim)

    def forward(self, images: Tensor) -> tuple[Tensor, int, int]:
        """images [N, 3, H, W] -> tokens [N, height * width, dim], height, width."""
        # With 3 rows and columns more, the convolution's last step falls on the last pixel at every size.
        x = self.proj(nn.functional.pad(images, (0, PATCH - 1, 0, PATCH - 1)))
        height, width = x.shape[-2:]
        return self.norm(x.flatten(2).transpose(1, 2)), height, width


class SwinTransformer(nn.Module):
    """Images [N, 3, H, W] in; the normalised maps of strides 8, 16 and 32 out."""

    def __init__(self, name: str, window: int):
        super().__init__()
        dim, stages, num_heads = SHAPES[name]
        self.out_channels = tuple(dim << stage for stage in (1, 2, 3))
        self.patch_embed = PatchEmbed(dim)
        self.layers = nn.ModuleList(
            Stage(dim << stage, blocks, window, num_heads << stage, last=stage == len(stages) - 1)
            for stage, blocks in enumerate(stages)
        )
        for stage in (1, 2, 3):
            self.add_module(f"norm{stage}", nn.LayerNorm(dim << stage))

    def forward(self, images: Tensor) -> list[Tensor]:
        x, height, width = self.patch_embed(images)
        maps = []
        for stage, layer in enumerate(self.layers):
            x = layer(x, height, width)
            if stage > 0:
                maps.append(getattr(self, f"norm{stage}")(x).transpose(1, 2).unflatten(2, (height, width)))
            if layer.downsample is not None:
                x = layer.downsample(x, height, width)
                height, width = (height + 1) // 2, (width + 1) // 2
        return maps
