"""The page and the figures of an evaluation."""
