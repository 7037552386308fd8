"""The version of the operators."""

VERSION = 1
"""Part of every operator's name, because a compiler's cache identifies an operator by its name.

It must be raised whenever the code of an operator or of its kernels changes; a test compares the
sources with the checksum that was recorded for the version.
"""
