"""SPViT's fine-tuned models as written down in the paper, on official names: nothing folded, plain functions.

The checkpoints here are random; ``logits`` is what converted models are compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

State = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Net:
    """Sizes of a DeiT (``depths`` of one entry) or Swin; lists are stages of layers."""

    mixers: list[list[str]]
    hidden: list[list[int]]
    width: int
    heads: list[int]
    image: tuple[int, int]
    patch: int
    window: int = 0
    distilled: bool = False
    labels: int = 5
    tau: float = 0.01
    eps: float = 1e-6
    centre_first: bool = False


def random_state(net: Net, seed: int = 0, tables: str = "random") -> State:
    """Weights under official names. ``tables``: every mixing table is random, or only its column that is trained."""
    generator = torch.Generator().manual_seed(seed)
    state: State = {}

    def linear(name: str, inputs: int, outputs: int, bias: bool = True) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs, generator=generator) * inputs**-0.5
        if bias:
            state[f"{name}.bias"] = torch.randn(outputs, generator=generator) * 0.2

    def norm(name: str, width: int, batch: bool = False) -> None:
        state[f"{name}.weight"] = 1 + torch.randn(width, generator=generator) * 0.2
        state[f"{name}.bias"] = torch.randn(width, generator=generator) * 0.2
        if batch:
            state[f"{name}.running_mean"] = torch.randn(width, generator=generator) * 0.3
            state[f"{name}.running_var"] = 0.5 + torch.rand(width, generator=generator)
            state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    linear("patch_embed.proj", 3 * net.patch**2, net.width)
    state["patch_embed.proj.weight"] = state["patch_embed.proj.weight"].view(net.width, 3, net.patch, net.patch)
    rows, columns = net.image[0] // net.patch, net.image[1] // net.patch
    if net.window:
        norm("patch_embed.norm", net.width)
    else:
        extra = 1 + net.distilled
        state["cls_token"] = torch.randn(1, 1, net.width, generator=generator)
        if net.distilled:
            state["dist_token"] = torch.randn(1, 1, net.width, generator=generator)
        state["pos_embed"] = torch.randn(1, rows * columns + extra, net.width, generator=generator)
    for s, stage in enumerate(net.mixers):
        d, h = net.width * 2**s, net.heads[s]
        for b, mixer in enumerate(stage):
            name = f"layers.{s}.blocks.{b}" if net.window else f"blocks.{b}"
            norm(f"{name}.norm1", d)
            norm(f"{name}.norm2", d)
            linear(f"{name}.mlp.fc1", d, net.hidden[s][b])
            linear(f"{name}.mlp.fc2", net.hidden[s][b], d)
            if mixer == "identity":
                continue
            linear(f"{name}.attn.v", d, d)
            linear(f"{name}.attn.proj", d, d)
            if mixer == "attention":
                linear(f"{name}.attn.qk", d, 2 * d)
                if net.window:
                    table = torch.randn((2 * net.window - 1) ** 2, h, generator=generator)
                    state[f"{name}.attn.relative_position_bias_table"] = table
                    state[f"{name}.attn.relative_position_index"] = position_index(net.window)
                    if b % 2:
                        state[f"{name}.attn_mask"] = torch.zeros(1)
            else:
                # spread so that the softmax is neither flat nor one-hot at this temperature
                probs = torch.randn(h, 9, generator=generator) * net.tau
                if tables == "trained" and mixer == "conv1x1":
                    only = 0 if net.centre_first else 4
                    probs = torch.where(torch.arange(9) == only, probs, torch.full((h, 9), 0.93))
                state[f"{name}.attn.head_probs"] = probs
                norm(f"{name}.attn.bn_{mixer[-3:]}", d // h, batch=True)
        if net.window and s + 1 < len(net.mixers):
            norm(f"layers.{s}.downsample.norm", 4 * d)
            linear(f"layers.{s}.downsample.reduction", 4 * d, 2 * d, bias=False)
    top = net.width * 2 ** (len(net.mixers) - 1)
    norm("norm", top)
    linear("head", top, net.labels)
    if net.distilled:
        linear("head_dist", top, net.labels)
    return state


def position_index(window: int) -> torch.Tensor:
    """(window^2, window^2): row of the position table for every pair of places in a window."""
    place = [(y, x) for y in range(window) for x in range(window)]
    side = 2 * window - 1
    return torch.tensor([[(a - c + window - 1) * side + (b - d + window - 1) for c, d in place] for a, b in place])


class Reference:
    """Runs a checkpoint."""

    def __init__(self, net: Net, state: State) -> None:
        self.net = net
        self.state = {k: t.double() if t.is_floating_point() else t for k, t in state.items()}

    def linear(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x, self.state[f"{name}.weight"], self.state.get(f"{name}.bias"))

    def norm(self, name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], self.state[f"{name}.weight"], self.state[f"{name}.bias"], self.net.eps)

    def attention(self, name: str, x: torch.Tensor, heads: int, bias: torch.Tensor | float = 0.0) -> torch.Tensor:
        """(..., N, d) -> (..., N, d); ``bias`` is added to the scores (..., heads, N, N)."""
        d_h = x.shape[-1] // heads
        q, k = self.linear(f"{name}.qk", x).split(x.shape[-1], -1)
        q, k, v = (t.unflatten(-1, (heads, d_h)).transpose(-3, -2) for t in (q, k, self.linear(f"{name}.v", x)))
        scores = q @ k.transpose(-1, -2) / d_h**0.5 + bias
        return self.linear(f"{name}.proj", (scores.softmax(-1) @ v).transpose(-3, -2).flatten(-2))

    def convolution(self, name: str, x: torch.Tensor, heads: int, kernel: int) -> torch.Tensor:
        """The values of every head, shifted, mixed and summed: (B, rows, columns, d) -> the same."""
        rows, columns, d = x.shape[1:]
        table = self.state[f"{name}.head_probs"]
        if self.net.centre_first:
            table = torch.cat([table[:, 1:5], table[:, :1], table[:, 5:]], 1)
        p = (table / self.net.tau).exp()
        p = p / p.sum(0)
        v = F.linear(x, self.state[f"{name}.v.weight"]).unflatten(-1, (heads, d // heads))
        v_bias = self.state[f"{name}.v.bias"].view(heads, -1)
        w_o = self.state[f"{name}.proj.weight"].view(d, heads, -1)
        around = F.pad(v, (0, 0, 0, 0, 1, 1, 1, 1))
        hidden: torch.Tensor | float = 0.0
        back: torch.Tensor | float = 0.0
        for position in range(9) if kernel == 3 else [4]:
            down, across = position % 3, position // 3  # positions run down the columns of the kernel
            for h in range(heads):
                shifted = around[:, down : down + rows, across : across + columns, h]
                hidden = hidden + p[h, position] * (shifted + v_bias[h])
                back = back + p[h, position] * w_o[:, h]
        bn = {
            k: self.state[f"{name}.bn_{kernel}x{kernel}.{k}"]
            for k in ("running_mean", "running_var", "weight", "bias")
        }
        hidden = (hidden - bn["running_mean"]) / (bn["running_var"] + 1e-5).sqrt() * bn["weight"] + bn["bias"]
        return F.linear(hidden.clamp(min=0), back, self.state[f"{name}.proj.bias"])

    def windows(self, name: str, x: torch.Tensor, heads: int, shift: int) -> torch.Tensor:
        """Attention in (shifted) windows: a token sees those of its window that were not rolled in from elsewhere."""
        w, rows, columns = self.net.window, x.shape[1], x.shape[2]
        x = torch.roll(x, (-shift, -shift), (1, 2))
        region = torch.zeros(rows, columns, dtype=torch.long)
        for axis, size in ((0, rows), (1, columns)):
            place = torch.arange(size)
            part = (place >= size - w).long() + (place >= size - shift).long() if shift else torch.zeros_like(place)
            region = region * 3 + (part[:, None] if axis == 0 else part[None])

        def cut(t: torch.Tensor) -> torch.Tensor:  # (B, rows, columns, C) -> (B, windows, w * w, C)
            return t.unflatten(2, (-1, w)).unflatten(1, (-1, w)).transpose(2, 3).flatten(3, 4).flatten(1, 2)

        region = cut(region[None, :, :, None])[0, :, :, 0]
        mask = torch.where(region[:, :, None] == region[:, None, :], 0.0, -100.0).double()
        table = self.state[f"{name}.relative_position_bias_table"]
        bias = table[position_index(w)].permute(2, 0, 1) + mask[:, None]
        out = self.attention(name, cut(x), heads, bias)
        out = (
            out.unflatten(2, (w, w))
            .unflatten(1, (rows // w, columns // w))
            .transpose(2, 3)
            .flatten(3, 4)
            .flatten(1, 2)
        )
        return torch.roll(out, (shift, shift), (1, 2))

    def layer(
        self, name: str, x: torch.Tensor, mixer: str, heads: int, grid: tuple[int, int], shift: int
    ) -> torch.Tensor:
        y = self.norm(f"{name}.norm1", x)
        extra = x.shape[1] - grid[0] * grid[1]
        patches = y[:, extra:].unflatten(1, grid)
        if mixer in ("conv3x3", "conv1x1"):
            y = torch.cat(
                [y[:, :extra], self.convolution(f"{name}.attn", patches, heads, int(mixer[-1])).flatten(1, 2)], 1
            )
        elif mixer == "attention" and self.net.window:
            y = self.windows(f"{name}.attn", patches, heads, shift).flatten(1, 2)
        elif mixer == "attention":
            y = self.attention(f"{name}.attn", y, heads)
        x = x + y
        return x + self.linear(
            f"{name}.mlp.fc2", F.gelu(self.linear(f"{name}.mlp.fc1", self.norm(f"{name}.norm2", x)))
        )

    def logits(self, pixels: torch.Tensor) -> torch.Tensor:
        net, state = self.net, self.state
        patches = F.conv2d(
            pixels.double(), state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], net.patch
        )
        grid = (patches.shape[2], patches.shape[3])
        x = patches.flatten(2).transpose(1, 2)
        if not net.window:
            tokens = [state[name].expand(len(x), 1, -1) for name in ("cls_token", "dist_token") if name in state]
            x = torch.cat([*tokens, x], 1) + state["pos_embed"]
            for b, mixer in enumerate(net.mixers[0]):
                x = self.layer(f"blocks.{b}", x, mixer, net.heads[0], grid, 0)
            x = self.norm("norm", x)
            out = self.linear("head", x[:, 0])
            return (out + self.linear("head_dist", x[:, 1])) / 2 if net.distilled else out
        x = self.norm("patch_embed.norm", x)
        for s, stage in enumerate(net.mixers):
            for b, mixer in enumerate(stage):
                shift = net.window // 2 if b % 2 and min(grid) > net.window else 0
                x = self.layer(f"layers.{s}.blocks.{b}", x, mixer, net.heads[s], grid, shift)
            if s + 1 < len(net.mixers):
                square = x.unflatten(1, grid)
                corners = [square[:, y::2, x0::2] for x0 in (0, 1) for y in (0, 1)]
                merged = torch.cat(corners, -1).flatten(1, 2)
                x = self.linear(f"layers.{s}.downsample.reduction", self.norm(f"layers.{s}.downsample.norm", merged))
                grid = (grid[0] // 2, grid[1] // 2)
        return self.linear("head", self.norm("norm", x).mean(1))
