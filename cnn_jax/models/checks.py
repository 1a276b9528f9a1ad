"""What a network of fixed structure refuses: images that are too small, and settings it ignores."""

from jaxtyping import Array

from cnn_jax.config import ModelConfig
from cnn_jax.errors import UserError


def check_image_side(images: Array, least: int, config: ModelConfig) -> None:
    """Refuses images [batch, height, width, channels] of which downsampling would leave nothing."""
    height, width = images.shape[1:3]
    if min(height, width) < least:
        network = f"{len(config.blocks)} blocks need" if config.blocks else f"{config.name} needs"
        field = "model.blocks" if config.blocks else "model.name"
        raise UserError(
            f"{field}: {network} images of {least}x{least} or larger, not {height}x{width}"
        )


def check_fixed_settings(config: ModelConfig, activation: bool = False) -> None:
    """Refuses changes of settings that the network does not read.

    Those that only the chapter's networks read are always among them, with `activation` so is
    model.activation.
    """
    if config.dense:
        raise UserError(f"model.name={config.name} has no hidden dense layers; set model.dense=[]")
    names = ["pooling", "initializer"] + ["activation"] * activation
    if changed := [n for n in names if getattr(config, n) != getattr(ModelConfig, n)]:
        raise UserError(
            f"model.name={config.name} has its own {' and '.join(changed)}; leave out "
            f"{' and '.join(f'model.{name}' for name in changed)}"
        )


def check_dense(config: ModelConfig) -> None:
    """Refuses dropout where no hidden dense layer has it."""
    if config.dropout and not config.dense:
        raise UserError("model.dropout follows the hidden dense layers, and model.dense has none")
