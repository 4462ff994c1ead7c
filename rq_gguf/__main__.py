"""`python -m rq_gguf` is `rq-gguf`."""

from rq_gguf.cli import main

main(prog_name="rq-gguf")
