"""What the tests read in a page: its shell commands, the marks that keep them from being run, its links and its headings."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = (ROOT / "README.md", ROOT / "patches" / "README.md", *sorted((ROOT / "docs").glob("*.md")))

MARK = re.compile(r"<!-- not run: *(.*?) *-->")
_FENCE = re.compile(r"```(\w*)")
_PROGRAMS = "rq-gguf|bash|sh|python3?|pip|git|cd|mkdir|export|eval|source|for|apt-get|llama-[\\w-]+|hf"
_SHELL = re.compile(rf"({_PROGRAMS})( |$)|\"?\$\(rq-gguf |[A-Z_]+=\S* ")
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"(?<!!)\[[^\]]+\]\(([^)\s]+)\)|!\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


@dataclass(frozen=True)
class Block:
    """Lines of shell commands."""

    page: Path
    line: int
    commands: str
    reason: str | None
    """Why it is not run, None where it is."""

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The page's shell blocks: fenced ones (without a language, or `sh` or `bash`) and indented ones that begin with a program.

    A mark counts for the next block: <!-- not run: REASON -->.
    """
    found: list[Block] = []
    reason: str | None = None
    lines = [*page.read_text(encoding="utf-8").splitlines(), ""]
    i = 0
    while i < len(lines):
        start, mark, fence = i, MARK.fullmatch(lines[i].strip()), _FENCE.fullmatch(lines[i].strip())
        if mark:
            reason = mark[1]
        elif fence:
            i += 1
            while lines[i].strip() != "```":
                i += 1
            if fence[1] in ("", "sh", "bash"):
                found.append(Block(page, start + 1, "\n".join(lines[start + 1 : i]), reason))
            reason = None
        elif lines[i].startswith("    ") and (i == 0 or not lines[i - 1].strip() or lines[i - 1].startswith(("#", "<!--"))):
            while lines[i].startswith("    "):
                i += 1
            code = [line[4:] for line in lines[start:i]]
            if _SHELL.match(code[0]):
                found.append(Block(page, start + 1, "\n".join(code), reason))
                reason = None
            continue
        i += 1
    return found


def marks(page: Path) -> list[str]:
    """The reasons of all marks."""
    return [m[1] for m in MARK.finditer(page.read_text(encoding="utf-8"))]


def inline_commands(page: Path) -> list[str]:
    """Commands of rq-gguf within sentences."""
    return [code for code in _INLINE.findall(_without_blocks(page)) if code.startswith("rq-gguf ")]


def inline_options(page: Path) -> list[str]:
    """Options that sentences and tables name, such as `--budget q8_0`: the first word."""
    spans = (part for code in _INLINE.findall(_without_blocks(page)) for part in code.split() if re.fullmatch(r"--[a-z][\w-]+", part))
    return sorted(set(spans))


def rq_gguf_calls(commands: str) -> list[list[str]]:
    """The arguments of every call of rq-gguf in shell commands, within "$(...)" too."""
    text = re.sub(r"\\\n", " ", commands)
    calls = []
    for match in re.finditer(r"\brq-gguf +([^\n;|&)]*)", text):
        before = text[text.rfind("\n", 0, match.start()) + 1 : match.start()]
        if re.search(r"(^|[;|&(] *|\w=\S+ )$", before) is None:
            continue  # a word in a comment or a path
        inner = match[1][:-1] if match[1].count('"') % 2 and match[1].endswith('"') else match[1]
        words = shlex.split(inner, comments=True)
        calls.append([w for w in words if not re.match(r"\d?[<>]", w)])
    return calls


def links(page: Path) -> list[str]:
    text = _without_blocks(page)
    return [next(part for part in m.groups() if part) for m in _LINK.finditer(re.sub(r"`[^`\n]*`", "", text))]


def anchors(page: Path) -> set[str]:
    """What `#...` can name: GitHub's form of the headings."""
    headings = re.findall(r"^#+ +(.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _without_blocks(page: Path) -> str:
    """The page's sentences and tables."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    return "\n".join("" if line.startswith("    ") else line for line in text.splitlines())
