"""Upstream's own tests on the patched and the unpatched llama.cpp: both must give the same results.

    python tools/upstream_tests.py --work DIR [--patched SOURCE] [--unpatched SOURCE] [--jobs N] [--ops]

SOURCE: the trees of `rq-gguf runtime install` and `rq-gguf runtime install --unpatched` where not given. Builds each with its tests (half
an hour each on 2 cores, much of it shared through ccache where that is installed), runs `ctest -L main` in both, and prints the tests whose
result differs or that only one tree has. Tests that need a network or a model (other labels, test-thread-safety, test-eval-callback) are
left out. --ops compares `test-backend-ops test -b CPU` case by case too. Exit status 1 for any difference but tests of the series itself.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from rq_gguf.errors import UserError
from rq_gguf.runtime.tools import source_path

OURS = ("test-moe-tiers",)
"""Tests that the series adds."""
OUR_OPS = ("MUL_MAT_TIERS", "EXPERT_REMAP")
LEFT_OUT = "test-thread-safety|test-eval-callback|test-download-model|test-backend-ops|test-opt"
_RESULT = re.compile(r"^\s*\d+/\d+ Test\s+#\d+: (\S+) \.+\s*(.*?)\s+[\d.]+ sec", re.MULTILINE)
_CASE = re.compile(r"^\s+(\w+\(.*\)): (?:\x1b\[[\d;]*m)*(OK|FAIL|not supported.*?)(?:\x1b\[[\d;]*m)*$", re.MULTILINE)


def run(args: list[str | Path], log: Path, **options: object) -> str:
    """What a command prints, which is kept in a log too. It may fail."""
    done = subprocess.run([str(a) for a in args], capture_output=True, text=True, errors="replace", check=False, **options)  # type: ignore[call-overload]
    with log.open("a") as f:
        f.write(f"$ {' '.join(map(str, args))}\n{done.stdout}{done.stderr}\nexit status {done.returncode}\n")
    return done.stdout + done.stderr


def build(source: Path, build_dir: Path, jobs: int, log: Path) -> None:
    """All of a tree with its tests. Raises UserError where that fails."""
    launcher = shutil.which("ccache") or ""
    generator = ["-G", "Ninja"] if shutil.which("ninja") else []
    options = [
        "-DCMAKE_BUILD_TYPE=Release",
        "-DLLAMA_BUILD_TESTS=ON",
        "-DLLAMA_BUILD_SERVER=ON",  # test-chat links it
        "-DLLAMA_USE_PREBUILT_UI=OFF",
        "-DLLAMA_BUILD_EXAMPLES=OFF",
        "-DLLAMA_CURL=OFF",
        "-DLLAMA_OPENSSL=OFF",
    ]
    options += [f"-DCMAKE_{x}_COMPILER_LAUNCHER={launcher}" for x in ("C", "CXX")]
    run(["cmake", "-S", source, "-B", build_dir, *generator, *options], log)
    run(["cmake", "--build", build_dir, "-j", str(jobs)], log)
    if not (build_dir / "bin" / "test-backend-ops").is_file():
        raise UserError(f"the tests of {source} cannot be built; see {log}")


def results(build_dir: Path, jobs: int, log: Path) -> dict[str, str]:
    """Test -> `Passed`, `***Failed` and the like, as ctest prints it."""
    text = run(["ctest", "--test-dir", build_dir, "-L", "main", "-E", LEFT_OUT, "-j", str(jobs), "--timeout", "900"], log)
    return {m[1]: m[2] for m in _RESULT.finditer(text)}


def cases(build_dir: Path, log: Path) -> dict[str, str]:
    """Case of test-backend-ops -> OK, FAIL, not supported."""
    text = run([build_dir / "bin" / "test-backend-ops", "test", "-b", "CPU"], log)
    return {m[1]: m[2] for m in _CASE.finditer(text)}


def differences(before: dict[str, str], after: dict[str, str], ours: tuple[str, ...]) -> list[str]:
    """A line for each name whose result differs, or that one side lacks, but for the series' own."""
    names = sorted(before.keys() | after.keys())
    told = [(name, before.get(name, "absent"), after.get(name, "absent")) for name in names if not name.startswith(ours)]
    return [f"{name}: unpatched {a}, patched {b}" for name, a, b in told if a != b]


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--patched", type=Path)
    parser.add_argument("--unpatched", type=Path)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--ops", action="store_true", help="compare test-backend-ops on the CPU too")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    trees = {
        "unpatched": args.unpatched or source_path(unpatched=True).parent,
        "patched": args.patched or source_path().parent,
    }
    found: dict[str, dict[str, str]] = {}
    ops: dict[str, dict[str, str]] = {}
    for name, tree in trees.items():
        log = args.work / f"{name}.log"
        print(f"{name}: building {tree}", file=sys.stderr)
        build(tree.resolve(), args.work / name, args.jobs, log)
        print(f"{name}: testing", file=sys.stderr)
        found[name] = results(args.work / name, args.jobs, log)
        if args.ops:
            ops[name] = cases(args.work / name, log)
    told = differences(found["unpatched"], found["patched"], OURS)
    passed = {name: sum(result == "Passed" for result in r.values()) for name, r in found.items()}
    for name, r in found.items():
        print(f"{name}: {passed[name]} of {len(r)} tests passed" + (f", {len(ops[name])} cases of ops" if args.ops else ""))
    told += differences(ops.get("unpatched", {}), ops.get("patched", {}), OUR_OPS)
    print("\n".join(told) or "the same results")
    return 1 if told or not found["unpatched"] else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.exit(f"Error: {error}")
