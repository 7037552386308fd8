"""The package's version, by itself: code that writes it into files needs no other import."""

__version__ = "0.1.0"
