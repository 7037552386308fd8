"""What `vlm-tune init` does: a recipe for data, or from another framework's configuration."""
