"""Batch normalisation in training mode: statistics of slices, exact against plain training over the same slices."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.parity.slices import check_sliced


class Bottleneck(nn.Module):
    """As torchvision writes it: in place, with a shortcut that has a norm of its own."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, 4, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.conv2 = nn.Conv2d(4, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += x if self.downsample is None else self.downsample(x)
        return self.relu(y)


class ResNet(nn.Module):
    """Stem, two layers of two blocks, head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 6, 3, 2, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(6)
        self.layer1 = nn.Sequential(Bottleneck(6, 6, 1), Bottleneck(6, 6, 1))
        self.layer2 = nn.Sequential(Bottleneck(6, 8, 2), Bottleneck(8, 8, 1))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        logits = self.fc(self.layer2(self.layer1(x)).mean((2, 3)))
        return functional.cross_entropy(logits, labels), logits


def images(samples: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {"x": torch.randn(samples, 3, 8, 8, generator=generator).double(), "labels": torch.arange(samples) % 3}


def resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet().double()


PLANS = [
    ((3,), "1f1b", "none", 1),
    ((1, 3), "1f1b", "blocks", 1),
    ((2, 1, 1), "1f1b", "none", 1),
    ((1, 1), "interleaved", "none", 2),
]


@pytest.mark.parametrize(("replicas", "schedule", "recompute", "laps"), PLANS, ids=lambda x: str(x).replace(" ", ""))
def test_resnet(replicas: tuple[int, ...], schedule: str, recompute: str, laps: int):
    # 13 samples in 2 microbatches: 7 and 6.
    check_sliced(resnet(), images(13), replicas, schedule=schedule, recompute=recompute, laps=laps)
