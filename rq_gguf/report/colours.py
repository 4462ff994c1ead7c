"""The colours of page and figures, light and dark. Figures name them; what a name looks like is decided here."""

# Few bits light, many dark, apart for those who see red and green alike; steps wide enough to tell neighbours.
_LIGHT_TYPES = ("#f6d743", "#9ccf4e", "#3fae72", "#2391a0", "#3b6fc4", "#6d4bb8", "#3b1152")
_DARK_TYPES = ("#f8e68a", "#a8dd63", "#4cc48a", "#36a7b8", "#5a8be0", "#8a6ae0", "#7a3ca8")
_LIGHT_HEAT = ("#f4efe6", "#fbd7a4", "#f8a55d", "#e2672f", "#b0351b", "#6b1212")
_DARK_HEAT = ("#24262b", "#4a2a20", "#8b3a1c", "#cf6a2a", "#f4ab5c", "#ffe7bd")

HEAT_STEPS = 16
"""Colours of the load, `heat0` (least) to `heat15`."""

LIGHT = {
    "paper": "#fcfbf8", "card": "#ffffff", "ink": "#1d2126", "muted": "#5b6470", "rule": "#dcdfe3", "grid": "#eceef0",
    "accent": "#1f6feb", "before": "#c2571a", "after": "#1f6feb", "dot": "#ffffff", "edge": "#1d2126",
}  # fmt: skip
DARK = {
    "paper": "#15171a", "card": "#1c1f23", "ink": "#e8eaed", "muted": "#a2aab4", "rule": "#363b42", "grid": "#2a2e34",
    "accent": "#6ea8fe", "before": "#f0944d", "after": "#6ea8fe", "dot": "#ffffff", "edge": "#0c0d0f",
}  # fmt: skip


def palette(n_types: int, *, dark: bool) -> dict[str, str]:
    """Name -> #rrggbb, with `type0` (fewest bits) to `type{n_types - 1}` for the types of a report."""
    ramp = _DARK_TYPES if dark else _LIGHT_TYPES
    types = {f"type{i}": _mix(ramp, i / (n_types - 1) if n_types > 1 else 0.5) for i in range(n_types)}
    stops = _DARK_HEAT if dark else _LIGHT_HEAT
    heat = {f"heat{i}": _mix(stops, i / (HEAT_STEPS - 1)) for i in range(HEAT_STEPS)}
    return (DARK if dark else LIGHT) | heat | types


def _mix(stops: tuple[str, ...], at: float) -> str:
    """The colour at 0 to 1 of a ramp."""
    position = min(max(at, 0.0), 1.0) * (len(stops) - 1)
    i = min(int(position), len(stops) - 2)
    pairs = zip(_rgb(stops[i]), _rgb(stops[i + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (position - i)):02x}" for a, b in pairs)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
