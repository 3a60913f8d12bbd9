"""What a job is told: options, their checks, and the command line made from them."""
