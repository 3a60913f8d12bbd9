"""Networks, their layers, and weights files."""
