"""What users configure: options, their checks, and the command line generated from them."""
