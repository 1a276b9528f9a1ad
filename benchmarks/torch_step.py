"""A worker that trains one of the chapter's networks in PyTorch; started by speed.py.

Usage: python torch_step.py SPEC, a JSON file with blocks, dense, dropout, batch_size, order,
learning_rate, momentum, autocast, compile and arrays, an .npz with images, labels and the initial
parameters in flax' names and layouts.
"""

import json
import sys

import numpy as np
import torch
from torch import nn
from worker import serve


class Flatten(nn.Module):
    """Flattens in flax' order, height, width, channels: free of copies with channels_last."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Returns [batch, features] from [batch, channels, height, width]."""
        return x.permute(0, 2, 3, 1).flatten(1)


def build(spec: dict, arrays: dict[str, np.ndarray]) -> nn.Module:
    """Returns the network with the parameters of `arrays`."""
    modules: list[nn.Module] = []

    def add(layer: nn.Module, name: str, axes: tuple[int, ...]) -> None:
        kernel = arrays[f"{name}/kernel"].transpose(axes)
        with torch.no_grad():
            layer.weight.copy_(torch.tensor(kernel))
            layer.bias.copy_(torch.tensor(arrays[f"{name}/bias"]))
        modules.append(layer)

    for i, widths in enumerate(spec["blocks"], start=1):
        for j in range(1, len(widths) + 1):
            name = f"block{i}/conv{j}" if spec["name"] == "vgg" else f"conv{j}"
            n_in, n_out = arrays[f"{name}/kernel"].shape[2:]
            add(nn.Conv2d(n_in, n_out, 3, padding=1), name, (3, 2, 0, 1))
            modules.append(nn.ReLU())
        modules.append(nn.MaxPool2d(2))
    modules.append(Flatten())
    for name in [f"fc{i}" for i in range(1, len(spec["dense"]) + 1)] + ["head"]:
        add(nn.Linear(*arrays[f"{name}/kernel"].shape), name, (1, 0))
        if name != "head":
            modules += [nn.ReLU()] + [nn.Dropout(spec["dropout"])] * bool(spec["dropout"])
    return nn.Sequential(*modules).to(memory_format=torch.channels_last)


def main() -> None:
    """Serves training steps."""
    with open(sys.argv[1]) as file:
        spec = json.load(file)
    arrays = dict(np.load(spec["arrays"]))
    model = build(spec, arrays)
    images = torch.tensor(arrays["images"]).permute(0, 3, 1, 2)
    labels = torch.tensor(arrays["labels"]).long()
    order = torch.tensor(spec["order"])
    del arrays
    optimizer = torch.optim.SGD(model.parameters(), spec["learning_rate"], spec["momentum"])
    network = torch.compile(model) if spec["compile"] else model
    done = 0

    def run(n_steps: int) -> list[float]:
        nonlocal done
        losses = []
        for _ in range(n_steps):
            index = order[done % len(order)]
            with torch.autocast("cpu", torch.bfloat16, enabled=spec["autocast"]):
                logits = network(images[index].float() / 255)
                loss = nn.functional.cross_entropy(logits.float(), labels[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            done += 1
        return losses

    serve(run)


if __name__ == "__main__":
    main()
