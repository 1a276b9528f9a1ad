"""Convolutional image classifiers in JAX and Flax: a textbook chapter, as a research codebase."""

__version__ = "0.1.0"
