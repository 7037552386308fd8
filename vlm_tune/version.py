"""The version, by itself: what writes it into files imports nothing else of the package for it."""

__version__ = "0.1.0"
