"""Distortion levels: names, effects on frames, and places on their axes."""
