"""Make docs/families.md: build and run a random model of every family (tests/families), and write down what works.

    python tools/family_table.py                   all of them, some minutes
    python tools/family_table.py mixtral jamba     those rows only

Needs the patched and the unpatched llama.cpp (`rq-gguf runtime install`, with and without --unpatched).
"""

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from families.cases import CASES  # noqa: E402
from families.check import check  # noqa: E402
from families.table import is_of, page, row  # noqa: E402

from rq_gguf.runtime import tools  # noqa: E402

PAGE = ROOT / "docs" / "families.md"


def main(names: list[str]) -> None:
    unknown = set(names) - {case.model_type for case in CASES}
    if unknown:
        sys.exit(f"no such family: {', '.join(sorted(unknown))}")
    old = PAGE.read_text(encoding="utf-8").splitlines() if PAGE.exists() else []
    rows = {case.model_type: line for case in CASES for line in old if is_of(line, case)}
    for case in CASES:
        if names and case.model_type not in names:
            continue
        with tempfile.TemporaryDirectory() as work:
            found = check(case, Path(work), tools.bin_dir(), tools.bin_dir(unpatched=True))
        rows[case.model_type] = row(case, found)
        print(f"{rows[case.model_type]}\n    from transformers {found.from_transformers:.1e}, from F32 {found.from_f32:.1e}", flush=True)
        PAGE.write_text(page([rows[c.model_type] for c in CASES if c.model_type in rows]), encoding="utf-8")


if __name__ == "__main__":
    main(sys.argv[1:])
