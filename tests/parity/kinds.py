"""Small networks of kinds that Transformers' own do not cover: long skips, mixing, several losses, adapters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional
from transformers.utils import ModelOutput

WIDTH = 6


def images(samples: int, size: int = 8) -> torch.Tensor:
    """Random images."""
    return torch.randn(samples, 3, size, size, generator=torch.Generator().manual_seed(0)).double()


def rows(samples: int) -> torch.Tensor:
    """Random numbers (samples, WIDTH)."""
    return torch.randn(samples, WIDTH, generator=torch.Generator().manual_seed(0)).double()


def convolution(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.GroupNorm(1, outputs), nn.GELU())


class UNet(nn.Module):
    """Values of the first stages are needed in the last ones."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.middle = convolution(3, 4), convolution(6, 6)
        self.down = nn.ModuleList([convolution(4, 6), convolution(6, 6)])
        self.up = nn.ModuleList([convolution(12, 6), convolution(12, 4)])
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> dict[str, Any]:
        skips = [self.stem(x)]
        for layer in self.down:
            skips.append(layer(functional.max_pool2d(skips[-1], 2)))
        h = self.middle(skips[-1])
        for layer in self.up:
            h = functional.interpolate(layer(torch.cat([h, skips.pop()], 1)), scale_factor=2.0, mode="bilinear")
        mask = self.out(torch.cat([h, skips.pop()], 1))
        return {"loss": functional.cross_entropy(mask, labels), "mask": mask, "means": [h.mean((1, 2, 3))]}


class Mixer(nn.Module):
    """Mixes patches and channels; returns its loss alone."""

    def __init__(self) -> None:
        super().__init__()
        self.patches, self.head = nn.Conv2d(3, WIDTH, 2, 2), nn.Linear(WIDTH, 3)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {"norm": nn.LayerNorm(WIDTH), "tokens": nn.Linear(16, 16), "channels": nn.Linear(WIDTH, WIDTH)}
            )
            for _ in range(4)
        )

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        h = self.patches(x).flatten(2).transpose(1, 2)
        for layer in self.layers:
            h = h + layer["tokens"](layer["norm"](h).transpose(1, 2)).transpose(1, 2)
            h = h + layer["channels"](functional.gelu(h))
        return functional.cross_entropy(self.head(h.mean(1)), labels)


@dataclass
class Output(ModelOutput):
    loss: torch.Tensor | None = None
    auxiliary: torch.Tensor | None = None
    logits: torch.Tensor | None = None


@dataclass
class Record:
    loss: torch.Tensor
    logits: torch.Tensor


class Named(NamedTuple):
    loss: torch.Tensor
    logits: torch.Tensor


class Deep(nn.Module):
    """Losses at several depths, one of a target that a batch may lack; returns them as `kind` says."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(6))
        self.heads = nn.ModuleList(nn.Linear(WIDTH, 3) for _ in range(2))

    def forward(self, x: torch.Tensor, labels: torch.Tensor, target: torch.Tensor | None = None) -> Any:
        losses, logits = [], []
        for index, layer in enumerate(self.layers):
            x = torch.tanh(layer(x))
            if index % 3 == 2:
                logits.append(self.heads[index // 3](x))
                losses.append(functional.cross_entropy(logits[-1], labels))
        loss = losses[0] * 0.3 + losses[1] + 0.1 * x.pow(2).mean()
        if target is not None:
            loss = loss + functional.mse_loss(x[:, 0], target)
        return {
            "output": lambda: Output(loss=loss, auxiliary=losses[0], logits=logits[-1]),
            "dataclass": lambda: Record(loss, logits[-1]),
            "named": lambda: Named(loss, logits[-1]),
            "nested": lambda: {"loss": loss, "losses": {"first": losses[0]}, "logits": logits},
            "tuple": lambda: (loss, losses, logits),
        }[self.kind]()


class Adapted(nn.Module):
    """A frozen linear layer with a trained one of low rank beside it (LoRA)."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(2, base.in_features).to(base.weight) * 0.1)
        self.up = nn.Parameter(torch.randn(base.out_features, 2).to(base.weight) * 0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base(x) + functional.linear(functional.linear(x, self.down), self.up) * 2


def adapt(model: nn.Module, *names: str) -> nn.Module:
    """Freeze `model`, and put adapters on the linear layers whose names contain one of `names`."""
    model.requires_grad_(False)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and any(n in name for n in names):
            owner, _, key = name.rpartition(".")
            setattr(model.get_submodule(owner), key, Adapted(module))
    return model


class Moody(nn.Module):
    """Does something else in each mode."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: torch.Tensor, labels: torch.Tensor | None = None) -> Any:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        x = x * 2 if self.training else x
        x = x + 1 if torch.is_grad_enabled() else x
        return x if labels is None else (functional.cross_entropy(x, labels), x)
