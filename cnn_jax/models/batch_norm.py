"""BatchNorm together with the activation function that follows it."""

from typing import Any

import flax.linen as nn
import jax

from cnn_jax.layers import ACTIVATIONS


class BatchNorm(nn.BatchNorm):
    """linen's BatchNorm, with the same variables; `activation` is applied to its result.

    A named norm thus returns what the next layer reads.
    """

    activation: str | None = None

    @nn.compact
    def __call__(
        self, x: Any, use_running_average: bool | None = None, *, mask: Any = None
    ) -> jax.Array:
        """Returns the activations, of the shape of x [batch, ..., channels]."""
        x = super().__call__(x, use_running_average, mask=mask)
        return ACTIVATIONS[self.activation](x) if self.activation else x
