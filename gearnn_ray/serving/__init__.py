"""Serving: the level of a frame or stream found, and the network adapted to that level applied. Knows nothing of HTTP or Ray."""
