"""Serving: a frame in, the level it was distorted to found, and the network adapted to that level applied."""
