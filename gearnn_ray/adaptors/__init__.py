"""Adaptors A_q: taken from a network, stored, restored."""
