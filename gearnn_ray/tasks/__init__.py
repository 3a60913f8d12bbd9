"""How a network is taught and judged."""
