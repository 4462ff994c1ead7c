"""The model card of a written file, for publishing it."""
