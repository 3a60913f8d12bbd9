"""What the adapt job shows of a comparison: figures, and one HTML page."""
