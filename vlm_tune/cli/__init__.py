"""The command line: `vlm-tune`, or `python -m vlm_tune.cli`."""

from vlm_tune.cli.entry import app, main

__all__ = ["app", "main"]
