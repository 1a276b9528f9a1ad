"""What Newton-Schulz makes of a matrix, by its SVD."""

import numpy as np


def polynomial(values: np.ndarray, steps: int) -> np.ndarray:
    """Returns what Newton-Schulz makes of singular values."""
    values = values / np.linalg.norm(values)
    for _ in range(steps):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return values


def orthogonal(matrix: np.ndarray, steps: int) -> np.ndarray:
    """Returns what Newton-Schulz makes of a matrix, by its SVD in float64."""
    left, values, right = np.linalg.svd(np.asarray(matrix, np.float64), full_matrices=False)
    return left * polynomial(values, steps) @ right
