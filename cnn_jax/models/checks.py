"""What a network of fixed structure refuses: images that are too small, and settings it ignores."""

from jaxtyping import Array

from cnn_jax.config import ModelConfig
from cnn_jax.errors import UserError


def check_image_side(images: Array, least: int, config: ModelConfig) -> None:
    """Refuses images [batch, height, width, channels] of which pooling would leave nothing."""
    height, width = images.shape[1:3]
    if min(height, width) < least:
        raise UserError(
            f"model.blocks: {len(config.blocks)} blocks need images of {least}x{least} or larger, "
            f"not {height}x{width}"
        )


def check_fixed_settings(config: ModelConfig) -> None:
    """Refuses changes of settings that only the chapter's networks read."""
    if config.dense:
        raise UserError(f"model.name={config.name} has no hidden dense layers; set model.dense=[]")
    if (config.pooling, config.initializer) != (ModelConfig.pooling, ModelConfig.initializer):
        raise UserError(
            f"model.name={config.name} has its own pooling and initial values; leave out "
            "model.pooling and model.initializer"
        )
