"""One GPU and the RAM beside it: which experts VRAM holds, what it catches, how fast a model decodes, and types for such a machine."""
