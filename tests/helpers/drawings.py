"""What figures hold."""

import numpy as np
from matplotlib.axes import Axes


def pixels(ax: Axes, index: int = 0) -> np.ma.MaskedArray:
    """Returns what an image of the axes shows."""
    found = ax.images[index].get_array()
    assert found is not None
    return found
