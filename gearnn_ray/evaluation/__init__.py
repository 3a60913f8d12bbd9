"""Does it work? Every method at every level, on the same images."""
