"""A worker that runs a network for photos in PyTorch; started by photos.py.

Usage: python photos_torch.py NETWORK MODE DTYPE PATH. MODE is train or features, DTYPE float32 or
bfloat16 (autocast), and PATH the file that photos_jax.py wrote. The networks are those of timm and
torchvision, in channels_last, with the names of this project.
"""

import sys
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from worker import serve

# Width, repeats, kernel, stride and expansion of the stages of EfficientNet-Lite0.
LITE0 = (
    (16, 1, 3, 1, 1),
    (24, 2, 3, 2, 6),
    (40, 2, 5, 2, 6),
    (80, 3, 3, 2, 6),
    (112, 3, 5, 1, 6),
    (192, 4, 5, 2, 6),
    (320, 1, 3, 1, 6),
)
BLOCKS = {"resnet18": (2, 2, 2, 2), "resnet34": (3, 4, 6, 3), "resnet50": (3, 4, 6, 3)}


class SameConv(nn.Conv2d):
    """A convolution with TensorFlow's SAME padding, as timm's of that name."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the convolution."""
        kernel, stride = self.kernel_size[0], self.stride[0]
        if stride == 1:
            return F.conv2d(x, self.weight, None, 1, kernel // 2, 1, self.groups)
        extra = [max((-(-n // stride) - 1) * stride + kernel - n, 0) for n in x.shape[:1:-1]]
        x = F.pad(x, [side for n in extra for side in (n // 2, n - n // 2)])
        return F.conv2d(x, self.weight, None, stride, 0, 1, self.groups)


class InvertedBlock(nn.Module):
    """A block of EfficientNet-Lite0."""

    def __init__(self, n_in: int, width: int, kernel: int, stride: int, expansion: int) -> None:
        super().__init__()
        inner = n_in * expansion
        if expansion > 1:
            self.expand = SameConv(n_in, inner, 1, bias=False)
            self.expand_norm = nn.BatchNorm2d(inner, eps=1e-3)
        self.depthwise = SameConv(inner, inner, kernel, stride, groups=inner, bias=False)
        self.depthwise_norm = nn.BatchNorm2d(inner, eps=1e-3)
        self.project = SameConv(inner, width, 1, bias=False)
        self.project_norm = nn.BatchNorm2d(width, eps=1e-3)
        self.skips = stride == 1 and n_in == width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the block's result."""
        y = x
        if hasattr(self, "expand"):
            y = F.relu6(self.expand_norm(self.expand(y)), inplace=True)
        y = F.relu6(self.depthwise_norm(self.depthwise(y)), inplace=True)
        y = self.project_norm(self.project(y))
        return x + y if self.skips else y


class Lite0(nn.Module):
    """EfficientNet-Lite0."""

    def __init__(self, n_classes: int) -> None:
        super().__init__()
        self.stem = SameConv(3, 32, 3, 2, bias=False)
        self.stem_norm = nn.BatchNorm2d(32, eps=1e-3)
        width = 32
        for i, (out, repeats, kernel, stride, expansion) in enumerate(LITE0, start=1):
            stage = nn.Sequential()
            for j in range(1, repeats + 1):
                block = InvertedBlock(width, out, kernel, stride if j == 1 else 1, expansion)
                stage.add_module(f"block{j}", block)
                width = out
            self.add_module(f"stage{i}", stage)
        self.top = SameConv(320, 1280, 1, bias=False)
        self.top_norm = nn.BatchNorm2d(1280, eps=1e-3)
        self.head = nn.Linear(1280, n_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what the head reads."""
        x = F.relu6(self.stem_norm(self.stem(x)), inplace=True)
        for i in range(1, len(LITE0) + 1):
            x = getattr(self, f"stage{i}")(x)
        return F.relu6(self.top_norm(self.top(x)), inplace=True).mean((2, 3))


class ResidualBlock(nn.Module):
    """A block of a ResNet, with two convolutions or, `wide` four times as much, with three."""

    def __init__(self, n_in: int, width: int, stride: int, wide: bool) -> None:
        super().__init__()
        out = 4 * width if wide else width
        sizes = [(n_in, width, 3, stride), (width, width, 3, 1)]
        if wide:
            sizes = [(n_in, width, 1, 1), (width, width, 3, stride), (width, out, 1, 1)]
        self.n_convs = len(sizes)
        for i, (a, b, kernel, step) in enumerate(sizes, start=1):
            conv = nn.Conv2d(a, b, kernel, step, kernel // 2, bias=False)
            self.add_module(f"conv{i}", conv)
            self.add_module(f"norm{i}", nn.BatchNorm2d(b))
        if stride > 1 or n_in != out:
            self.shortcut = nn.Conv2d(n_in, out, 1, stride, bias=False)
            self.shortcut_norm = nn.BatchNorm2d(out)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns the block's result."""
        y = x
        for i in range(1, self.n_convs + 1):
            y = getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(y))
            y = F.relu(y, inplace=True) if i < self.n_convs else y
        x = self.shortcut_norm(self.shortcut(x)) if hasattr(self, "shortcut") else x
        return F.relu(x + y, inplace=True)


class ResNet(nn.Module):
    """ResNet-18, 34 or 50."""

    def __init__(self, name: str, n_classes: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.stem_norm = nn.BatchNorm2d(64)
        width, wide = 64, name == "resnet50"
        for i, repeats in enumerate(BLOCKS[name]):
            stage = nn.Sequential()
            for j in range(1, repeats + 1):
                stride = 2 if i and j == 1 else 1
                stage.add_module(f"block{j}", ResidualBlock(width, 64 * 2**i, stride, wide))
                width = 64 * 2**i * (4 if wide else 1)
            self.add_module(f"stage{i + 1}", stage)
        self.head = nn.Linear(width, n_classes)

    def features(self, x: torch.Tensor) -> torch.Tensor:
        """Returns what the head reads."""
        x = F.relu(self.stem_norm(self.stem(x)), inplace=True)
        x = F.max_pool2d(x, 3, 2, 1)
        for i in range(1, 5):
            x = getattr(self, f"stage{i}")(x)
        return x.mean((2, 3))


NAMES = {"scale": "weight", "kernel": "weight", "mean": "running_mean", "var": "running_var"}


def load(network: nn.Module, arrays: dict[str, np.ndarray]) -> None:
    """Gives the network the variables of this project, whose names differ in the last part."""
    state = {}
    for name, array in arrays.items():
        *path, last = name.split("/")
        kernel = torch.tensor(array)
        kernel = kernel.permute(*{4: (3, 2, 0, 1), 2: (1, 0), 1: (0,)}[kernel.ndim])
        state[".".join([*path, NAMES.get(last, last)])] = kernel
    missing, unexpected = network.load_state_dict(state, strict=False)
    assert not unexpected and all("num_batches" in name for name in missing)


def make_runner(name: str, mode: str, dtype: str, path: str) -> Callable[[int], list[float]]:
    """Returns a function that runs so many steps: as photos_jax.py."""
    arrays = dict(np.load(path))
    images = torch.tensor(arrays.pop("images")).permute(0, 3, 1, 2)
    labels = torch.tensor(arrays.pop("labels")).long()
    network = ResNet(name, 10) if name in BLOCKS else Lite0(10)
    load(network, arrays)
    network = network.to(memory_format=torch.channels_last).train(mode == "train")
    optimizer = torch.optim.SGD(network.parameters(), 1e-4, momentum=0.9)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16")

    def features() -> float:
        with torch.inference_mode(), autocast:
            found = network.features((images.float() / 255 - 0.5) / 0.5)
        return found.float().abs().mean().item()

    def step() -> float:
        with autocast:
            logits = network.head(network.features((images.float() / 255 - 0.5) / 0.5))
            loss = F.cross_entropy(logits.float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return lambda n_steps: [step() if mode == "train" else features() for _ in range(n_steps)]


if __name__ == "__main__":
    serve(make_runner(*sys.argv[1:]))
