"""Distil image classifiers in JAX: logit ranking alignment, and the methods it is compared with."""
