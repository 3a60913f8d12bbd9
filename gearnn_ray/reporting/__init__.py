"""What a job shows: progress, tables, figures."""
