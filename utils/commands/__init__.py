"""What `python -m utils` does: one module a command, each with a `run(options)`."""
