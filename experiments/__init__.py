"""Experiments: what is compared, how it is run and reported, and what came of it in results/."""
