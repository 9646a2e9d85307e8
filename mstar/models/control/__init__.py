"""Control loops around models that act."""
