"""The PyTorch side of gpu_check.py: `python gpu_torch.py [--rehearsal]`, a worker.

It gets a line of JSON and answers by one. {"network", "batch", "dtype", "compile", "blocks",
"dense", "dropout"}: the seconds of a training step (momentum, cross-entropy) on images that lie on
the device; {"forget": true}: drops all that was built. Images are channels_last; bfloat16 is
autocast's.
"""

import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
_SECONDS, _MOST_STEPS = 0.4, 50


class Flatten(nn.Module):
    """Flattens height, width, channels in this order: free of copies with channels_last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [batch, features] from [batch, channels, height, width]."""
        return x.permute(0, 2, 3, 1).flatten(1)


def chapter(blocks: list[list[int]], dense: list[int], dropout: float) -> nn.Module:
    """Returns one of the chapter's networks, for images of 32x32."""
    modules: list[nn.Module] = []
    n_in, side = 3, 32
    for widths in blocks:
        for width in widths:
            modules += [nn.Conv2d(n_in, width, 3, padding=1), nn.ReLU()]
            n_in = width
        modules.append(nn.MaxPool2d(2))
        side //= 2
    modules.append(Flatten())
    n_in *= side * side
    for width in dense:
        modules += [nn.Linear(n_in, width), nn.ReLU()] + [nn.Dropout(dropout)] * bool(dropout)
        n_in = width
    return nn.Sequential(*modules, nn.Linear(n_in, 10))


def airbench(blocks: list[list[int]]) -> nn.Module:
    """Returns the network of airbench94, after its author's description."""
    modules: list[nn.Module] = [nn.Conv2d(3, 24, 2), nn.GELU()]
    n_in = 24
    for widths in blocks:
        for i, width in enumerate(widths):
            modules.append(nn.Conv2d(n_in, width, 3, padding=1, bias=False))
            modules += [nn.MaxPool2d(2)] * (i == 0) + [nn.BatchNorm2d(width), nn.GELU()]
            n_in = width
    side = (31 >> len(blocks)) // 3
    modules += [nn.MaxPool2d(3), Flatten(), nn.Linear(n_in * side * side, 10, bias=False)]
    return nn.Sequential(*modules)


class Residual(nn.Module):
    """A basic block, with a 1x1 convolution where the shapes differ."""

    def __init__(self, n_in: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(n_in, width, 3, stride, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, 1, 1, bias=False),
            nn.BatchNorm2d(width),
        )
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or n_in != width:
            conv = nn.Conv2d(n_in, width, 1, stride, bias=False)
            self.shortcut = nn.Sequential(conv, nn.BatchNorm2d(width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns relu(shortcut(x) + body(x))."""
        return nn.functional.relu(self.shortcut(x) + self.body(x))


def resnet_small(blocks: list[list[int]]) -> nn.Module:
    """Returns the residual network for small images."""
    n_in = blocks[0][0]
    modules = [nn.Conv2d(3, n_in, 3, padding=1, bias=False), nn.BatchNorm2d(n_in), nn.ReLU()]
    for i, widths in enumerate(blocks):
        for j, width in enumerate(widths):
            modules.append(Residual(n_in, width, 2 if i and not j else 1))
            n_in = width
    return nn.Sequential(*modules, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(n_in, 10))


def build(request: dict) -> nn.Module:
    """Returns the network that a request asks for, on the device."""
    name = request["network"]
    if name == "resnet50":
        import torchvision

        model = torchvision.models.resnet50(num_classes=10)
    elif name == "efficientnet_lite0":
        import timm

        model = timm.create_model("tf_efficientnet_lite0", num_classes=10)
    elif name == "airbench":
        model = airbench(request["blocks"])
    elif name == "resnet_small":
        model = resnet_small(request["blocks"])
    else:
        model = chapter(request["blocks"], request["dense"], request["dropout"])
    return model.to(DEVICE, memory_format=torch.channels_last)


def stepper(request: dict) -> Callable[[int], float]:
    """Returns a function that takes so many steps and returns the seconds of one."""
    model, batch = build(request), request["batch"]
    photos = request["network"] in ("resnet50", "efficientnet_lite0")
    n, side = (2 * batch, 224) if photos else (4 * batch, 32)
    rng = np.random.default_rng(0)
    images = torch.tensor(rng.integers(0, 256, (n, side, side, 3), np.uint8), device=DEVICE)
    images = images.permute(0, 3, 1, 2)
    labels = torch.tensor(rng.integers(0, 10, n), device=DEVICE)
    optimizer = torch.optim.SGD(model.parameters(), 0.001, 0.9)
    network = torch.compile(model) if request["compile"] else model
    low = request["dtype"] == "bfloat16"

    def run(n_steps: int) -> float:
        start = time.perf_counter()
        total = torch.zeros((), device=DEVICE)
        for _ in range(n_steps):
            index = torch.randint(n, (batch,), device=DEVICE)
            with torch.autocast(DEVICE, torch.bfloat16, enabled=low):
                logits = network(images[index].float() / 255)
                loss = nn.functional.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            total += loss.detach()
        assert np.isfinite(total.item())  # which waits for the device
        return (time.perf_counter() - start) / n_steps

    return run


def main() -> None:
    """Serves timings."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    torch.backends.cudnn.benchmark = True
    built: dict[str, tuple[Callable[[int], float], int, dict[str, float]]] = {}
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("forget"):
            built.clear()
            torch.compiler.reset()
            if DEVICE == "cuda":
                torch.cuda.empty_cache()
            print("{}", flush=True)
            continue
        if line not in built:
            built[line] = first_steps(request)
        run, n_steps, figures = built[line]
        print(json.dumps({"seconds": run(n_steps), **figures}), flush=True)


def first_steps(request: dict) -> tuple[Callable[[int], float], int, dict[str, float]]:
    """Returns the stepper, the steps of one timing, and what compiling took in time and memory."""
    held = 0
    if DEVICE == "cuda":
        held = torch.cuda.memory_allocated()  # by what was built before
        torch.cuda.reset_peak_memory_stats()
    start, run = time.perf_counter(), stepper(request)
    run(2)
    figures = {"compile_seconds": time.perf_counter() - start}
    most = 2 if "--rehearsal" in sys.argv else _MOST_STEPS
    n_steps = max(2, min(int(_SECONDS / run(2)), most))
    if DEVICE == "cuda":
        figures["memory_mb"] = (torch.cuda.max_memory_allocated() - held) / 1e6
    return run, n_steps, figures


if __name__ == "__main__":
    main()
