"""BatchNorm together with the activation function that follows it."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from cnn_jax import kernels
from cnn_jax.layers import ACTIVATIONS


class BatchNorm(nn.BatchNorm):
    """linen's BatchNorm, with the same variables; `activation` is applied to its result.

    A named norm thus returns what the next layer reads. `kernels` decides what computes it.
    """

    activation: str | None = None

    @nn.compact
    def __call__(
        self, x: Any, use_running_average: bool | None = None, *, mask: Any = None
    ) -> jax.Array:
        """Returns the activations, of the shape of x [batch, ..., channels]."""
        dtype = jnp.dtype(self.dtype or x.dtype)
        if not kernels.normalizes(dtype) or mask is not None:
            x = super().__call__(x, use_running_average, mask=mask)
            return ACTIVATIONS[self.activation](x) if self.activation else x
        use_running_average = nn.merge_param(
            "use_running_average", self.use_running_average, use_running_average
        )
        shape = (x.shape[-1],)
        mean = self.variable("batch_stats", "mean", jnp.zeros, shape)
        variance = self.variable("batch_stats", "var", jnp.ones, shape)
        scale = self.param("scale", self.scale_init, shape) if self.use_scale else jnp.ones(shape)
        bias = self.param("bias", self.bias_init, shape) if self.use_bias else jnp.zeros(shape)
        x, fused = x.astype(dtype), self.activation if self.activation in kernels.CLIPS else None
        if use_running_average:
            factor = scale * jax.lax.rsqrt(variance.value + self.epsilon)
            y = kernels.scale_and_shift(x, factor, bias - mean.value * factor, fused)
        else:
            y, *found = kernels.normalize(x, scale, bias, self.epsilon, fused)
            for record, new in zip((mean, variance), found, strict=True):
                if not self.is_initializing():
                    record.value = self.momentum * record.value + (1 - self.momentum) * new
        return ACTIVATIONS[self.activation](y) if self.activation and not fused else y
