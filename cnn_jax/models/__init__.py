"""The networks by name. A network of your own is "my_file.py:Net", and works with every tool.

Each network is a linen module whose submodules have explicit names, such as "block1/conv1", "fc1"
and "head". Summaries, checkpoints, patterns and the tools of `inspection` use these names.
"""

import inspect
from collections.abc import Callable
from typing import Any

import flax.linen as nn

from cnn_jax import user_code
from cnn_jax.config import ModelConfig
from cnn_jax.errors import UserError, one_line
from cnn_jax.models import airbench, chapter, efficientnet, resnet

NETWORKS: dict[str, Callable[[ModelConfig, int], nn.Module]] = {
    "simple_cnn": chapter.simple_cnn,
    "vgg": chapter.vgg,
    "vgg16": chapter.vgg16,
    "airbench": airbench.airbench,
    "airbench_residual": airbench.airbench_residual,
    "resnet_small": resnet.resnet_small,
    "resnet18": resnet.resnet,
    "resnet34": resnet.resnet,
    "resnet50": resnet.resnet,
    "efficientnet_lite0": efficientnet.efficientnet,
    "efficientnet_lite1": efficientnet.efficientnet,
    "efficientnet_lite2": efficientnet.efficientnet,
}
"""What makes each network from its config and the number of classes."""


def build(config: ModelConfig, n_classes: int) -> nn.Module:
    """Returns the network that `config.name` names.

    It is called as `model(images, train=False)`, with images float [batch, height, width, channels]
    and float32 logits [batch, classes] as the result.

    Raises:
        UserError: `config` does not suit that network, or "my_file.py:Net" is not such a network.
    """
    if config.name in NETWORKS:
        return NETWORKS[config.name](config, n_classes)
    make = user_code.load(config.name)
    field = f"model.name={config.name}"
    _check_call(f"{field} must take (config, n_classes)", make, config, n_classes)
    model = make(config, n_classes)
    if not isinstance(model, nn.Module):
        raise UserError(f"{field} must return a linen module, not {type(model).__name__}")
    _check_call(f"{field}: __call__ must take (images, train)", model.__call__, None, train=False)
    return model


def _check_call(problem: str, function: Any, *args: Any, **kwargs: Any) -> None:
    try:
        inspect.signature(function).bind(*args, **kwargs)
    except TypeError as error:
        raise UserError(f"{problem}: {one_line(error)}") from None


def last_block(model: nn.Module) -> str:
    """Returns the regular expression that "{last}" stands for in the patterns of `optim.groups`.

    It matches the names of the last block and of the hidden dense layers above it. A network of
    your own sets it as its attribute or property `last_block`.

    Raises:
        UserError: the network has no such attribute.
    """
    pattern = getattr(model, "last_block", None)
    if pattern is None:
        raise UserError(
            f'optim.groups: "{{last}}" needs the attribute last_block of {type(model).__name__}: a '
            'regular expression for the names of its last block, such as "stage3"'
        )
    return f"(?:{pattern})"
