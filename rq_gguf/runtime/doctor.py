"""`rq-gguf runtime doctor`: what the runtime needs and has, and the command that gets what is missing."""

import platform
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

from rq_gguf.errors import UserError
from rq_gguf.runtime import build, fetch, patch, tools
from rq_gguf.runtime.cache import cache_dir, current_file, read_json
from rq_gguf.runtime.installation import DISK_NEEDED

INSTALL = "rq-gguf runtime install"
OK, OPTIONAL, MISSING = "ok", "optional", "MISSING"


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    state: str
    found: str
    fix: str = ""


def package_command(name: str) -> str:
    """How this system installs one of its packages."""
    for manager, command in (("apt-get", "apt-get install"), ("dnf", "dnf install"), ("pacman", "pacman -S"), ("brew", "brew install")):
        if shutil.which(manager):
            return f"{command} {name}"
    return f"install {name} with the system's package manager"


def program_row(name: str, fix: str, needed: bool) -> Row:
    path = shutil.which(name)
    if path:
        return Row(name, OK, build.first_line([path, "--version"]) or path)
    return Row(name, MISSING if needed else OPTIONAL, "not found", fix)


def compiler_row() -> Row:
    command = build.find_compiler()
    if command:
        version = build.first_line([*command, "--version"])
        if version:
            return Row("C++ compiler", OK, version)
        return Row("C++ compiler", MISSING, f"{' '.join(command)} does not run", "unset CXX or set it to a working compiler")
    if sys.platform == "win32":
        return Row("C++ compiler", OPTIONAL, "left to CMake", "install Visual Studio's C++ build tools if CMake finds none")
    return Row("C++ compiler", MISSING, "not found", "xcode-select --install" if sys.platform == "darwin" else package_command("g++"))


def disk_row(directory: Path) -> Row:
    existing = next(p for p in (directory, *directory.parents) if p.exists())
    free = shutil.disk_usage(existing).free
    enough = free >= DISK_NEEDED
    return Row("disk space", OK if enough else MISSING, f"{free / 1e9:.1f} GB free",
               "" if enough else "free 1 GB or set RQ_GGUF_CACHE to another disk")  # fmt: skip


def runtime_rows() -> list[Row]:
    """Source package, patch series, and the installed builds."""
    kept = cache_dir() / "downloads" / fetch.ARCHIVE
    fetched = kept.is_file()
    rows = [Row("source package", OK if fetched else OPTIONAL, str(kept) if fetched else "not fetched yet", "" if fetched else INSTALL)]
    try:
        series = patch.read_series(patch.series_dir())
        rows.append(Row("patch series", OK, f"{len(series.patches)} patches, {series.sha256[:12]}"))
    except UserError as e:
        rows.append(Row("patch series", MISSING, str(e), "pip install --force-reinstall rq-gguf"))
    try:
        where = tools.bin_dir()
        stamp = read_json(Path(read_json(current_file()).get("patched", "")))
        how = f" ({stamp['backend']})" if stamp.get("backend") and where.parent.name.startswith("build-") else ""
        rows.append(Row("llama.cpp, patched", OK, f"{where}{how}"))
    except UserError as e:
        rows.append(Row("llama.cpp, patched", MISSING, str(e).partition(";")[0], INSTALL))
    try:
        rows.append(Row("llama.cpp, stock", OK, str(tools.bin_dir(unpatched=True))))
    except UserError:
        rows.append(Row("llama.cpp, stock", OPTIONAL, "not installed; only comparisons need it", f"{INSTALL} --unpatched"))
    return rows


def diagnose() -> list[Row]:
    """Everything that is looked at. Build tools are needed only while the runtime is not built."""
    runtime = runtime_rows()
    building = any(row.state == MISSING for row in runtime)
    pip = build.first_line([sys.executable, "-m", "pip", "--version"]).partition(" from ")[0]
    rows = [
        Row("python", OK, f"{platform.python_version()} ({sys.executable})"),
        Row("pip", OK, pip) if pip else Row("pip", MISSING if building else OPTIONAL, "not found", f"{sys.executable} -m ensurepip"),
        compiler_row(),
        program_row("cmake", package_command("cmake"), building),
        program_row("git", package_command("git"), building),
        program_row("ninja", package_command("ninja-build"), False),
        program_row("ccache", package_command("ccache"), False),
        Row("cache directory", OK, str(cache_dir())),
        disk_row(cache_dir()),
    ]
    if not building:
        rows = [Row(r.what, OPTIONAL if r.state == MISSING else r.state, r.found, r.fix) for r in rows]
    return rows + runtime


def doctor() -> bool:
    """Print the table to stdout; True if nothing that is needed is missing."""
    rows = diagnose()
    wide = max(len(row.what) for row in rows)
    for row in rows:
        print(f"{row.what:{wide}}  {row.state:8}  {row.found}{f'  -> {row.fix}' if row.fix else ''}")
    ok = all(row.state != MISSING for row in rows)
    print("everything that is needed is there" if ok else "something is missing: see the lines marked MISSING")
    return ok
