"""Accuracy and memory of every method at every level of a release, on the same images."""
