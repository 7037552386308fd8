"""Recipes that `vlm-tune init` writes: for data, or from another framework's configuration."""
