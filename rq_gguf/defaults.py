"""What the commands take where the user names nothing (types: rq_gguf.types.LADDER)."""

BUDGET = "q8_0"
TOKENS = 65536
"""Tokens of the calibration text."""
OTHER = "Q8_0"
"""Type of all tensors but the routed experts, in llama-quantize's sense."""
MAX_TIERS = 4
"""Most types that a layer and matrix group gets: what a fifth one saves is little (docs/planning.md), and each costs the decode kernels."""
BALANCE_WEIGHT = 0.5
"""Per cents by which predicted KL divergence may rise for each per cent by which copies lower the load imbalance."""
