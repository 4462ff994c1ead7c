"""How much a command says, kept as the level of the logger `rq_gguf`: what rooms ask before they show anything but results."""

import logging
import sys

QUIET, NORMAL, VERBOSE = logging.WARNING, logging.INFO, logging.DEBUG

_logger = logging.getLogger("rq_gguf")


def set_level(level: int) -> None:
    """QUIET: warnings only. NORMAL: progress bars and step lines too. VERBOSE: also what each step does, in log.debug's lines."""
    _logger.setLevel(level)


def is_quiet() -> bool:
    """True if neither bars nor step lines are wanted. A program that uses this package and sets no level gets them."""
    return _logger.level > NORMAL


def say(line: str, *, always: bool = False) -> None:
    """A line about a step, to stderr: stdout belongs to what a command was asked for. always: even if quiet."""
    if always or not is_quiet():
        print(line, file=sys.stderr, flush=True)
