"""The command line."""

from rq_gguf.cli.group import main as main
