"""Datasets, one module per layout, and the cache of distorted images."""
