"""What the base install leaves out, and how to get it."""

from importlib.util import find_spec

from rq_gguf.errors import UserError

EXTRAS = {
    "calibrate": ("torch", "transformers", "safetensors", "sentencepiece", "huggingface_hub"),
    "report": ("matplotlib",),
}
"""Extra -> the modules that it brings (pyproject.toml names the packages)."""


def has(module: str) -> bool:
    """True if a module can be imported, without importing it."""
    try:
        return find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def missing(extra: str) -> list[str]:
    """Modules of an extra that are not there."""
    return [module for module in EXTRAS[extra] if not has(module)]


def of_module(module: str | None) -> str | None:
    """The extra that brings a module; None for one that no extra brings."""
    return next((extra for extra, modules in EXTRAS.items() if module in modules), None)


def command(extra: str) -> str:
    """The line that installs an extra."""
    return f"pip install 'rq-gguf[{extra}]'"


def need(extra: str, what: str) -> None:
    """Raise UserError where a module of an extra is not there. what: the work that needs it."""
    lacking = missing(extra)
    if lacking:
        verb = "is" if len(lacking) == 1 else "are"
        raise UserError(f"{what} needs {', '.join(lacking)}, which {verb} not installed; run: {command(extra)}")
