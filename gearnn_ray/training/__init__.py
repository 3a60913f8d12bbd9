"""Fine-tuning, and the one forward pass of the package."""
