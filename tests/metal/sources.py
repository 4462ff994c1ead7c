"""Metal source files as C++ for the harness: the files themselves, and tables of their kernels and function constants.

Two attributes are removed, which clang knows only in Metal, and constants at file scope become local to their file. All else is compiled
as it is.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, replace

PARAMETERS = {
    "threadgroup_position_in_grid": "mtl_position { c.threadgroup }",
    "threadgroups_per_grid": "mtl_position { c.n_threadgroups }",
    "threads_per_threadgroup": "mtl_position { c.n_threads }",
    "thread_position_in_threadgroup": "mtl_position { c.thread }",
    "thread_index_in_threadgroup": "c.index",
    "thread_index_in_simdgroup": "c.lane",
    "simdgroup_index_in_threadgroup": "c.simdgroup",
}
"""Attribute of a kernel's parameter -> what the harness passes."""

CONSTANT_TYPES = {"bool": "MTL_BOOL", "short": "MTL_INT16", "int": "MTL_INT32", "int16_t": "MTL_INT16", "int32_t": "MTL_INT32"}


Edit = Callable[[str, str], str]
"""File name and text -> changed text."""


POINTER = (
    r"\b(char|short|int|float|half|bfloat|void|u?int\d+_t|uint|ushort|ggml_\w+|block_\w+)\s*(const\s*)?"
    r"[*&]+\s*(\w+\s*)?(=|\[|$)"
)
"""A pointer or reference to a type that kernels use, declared or cast to."""


class SourceError(Exception):
    """A source that the harness cannot read; the message names the file and the place."""


@dataclass(frozen=True)
class Kernel:
    """A kernel function."""

    name: str
    host_name: str | None
    """None for a template: its instances have names."""
    arguments: tuple[str, ...]
    """C++ expressions in the order of the parameters."""
    n_shared: int


@dataclass(frozen=True)
class Library:
    """What the host can find in a .metal file."""

    file: str
    kernels: dict[str, tuple[str, Kernel]]
    """Host name -> the function (an instance where it is a template) and its declaration."""
    constants: tuple[tuple[str, str, str], ...]
    """Name, type and index (an expression)."""


def without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", lambda m: "\n" * m.group().count("\n"), text, flags=re.DOTALL)


def as_cpp(text: str) -> str:
    """The text without what clang rejects outside Metal; instances of templates are made where they are listed."""
    text = re.sub(r"^template\s*\[\[host_name\([^)]*\)\]\]\s*kernel[^;]*;", "", text, flags=re.MULTILINE)
    text = re.sub(r'\[\[(host_name\("[^"]*"\s*\)|threadgroup\(\d+\))\]\]', "", text)
    text = re.sub(r"^constant\b(?=[^;]*\[\[function_constant)", "static", text, flags=re.MULTILINE)
    return re.sub(r"^constant\b", "static constant", text, flags=re.MULTILINE)


def declarations(text: str) -> str:
    """The text without the bodies of functions at file scope."""
    text = without_comments(text)
    out, i = [], 0
    while (brace := text.find("{", i)) >= 0:
        end = closing(text, brace)
        is_function = text[:brace].rstrip().endswith(")")
        out.append(text[i:brace] + (";" if is_function else text[brace : end + 1]))
        i = end + 1
    return "".join(out) + text[i:]


def bare_pointers(text: str) -> list[str]:
    """Declarations and casts of pointers and references that name no address space, which Metal demands."""
    found = []
    for part in re.split(r"[;,(){}]|\n\s*\n", re.sub(r"^\s*#.*$", "", without_comments(text), flags=re.MULTILINE)):
        if re.search(POINTER, part.strip()) and not re.search(r"\b(device|threadgroup|constant|thread)\b", part):
            found.append(" ".join(part.split()))
    return found


def split_parameters(text: str) -> list[str]:
    """At commas outside brackets."""
    parts, depth, start = [], 0, 0
    for i, char in enumerate(text):
        depth += (char in "(<[{") - (char in ")>]}")
        if char == "," and depth == 0:
            parts.append(text[start:i].strip())
            start = i + 1
    return [*parts, text[start:].strip()]


def closing(text: str, start: int) -> int:
    """The place of the bracket that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] in "([{") - (text[i] in ")]}")
        if depth == 0:
            return i
    raise SourceError(f"no bracket closes '{text[start : start + 40]}'")


def read_kernel(file: str, name: str, host_name: str | None, parameters: str) -> Kernel | None:
    """None where the kernel takes what the harness does not have; a host that asks for it gets an error."""
    arguments, next_buffer, n_shared = [], 0, 0
    for parameter in split_parameters(parameters):
        attribute = re.search(r"\[\[\s*(\w+)(?:\((\d+)\))?\s*\]\]", parameter)
        kind = attribute.group(1) if attribute else "buffer"
        if kind in PARAMETERS:
            arguments.append(PARAMETERS[kind])
        elif kind == "threadgroup":
            if n_shared != 0 or attribute is None or attribute.group(2) != "0":
                arguments.append(f'(mtl_fail("{name}: more than one block of threadgroup memory"), nullptr)')
            else:
                arguments.append("mtl_shared { c }")
            n_shared += 1
        elif kind == "buffer":
            index = int(attribute.group(2)) if attribute and attribute.group(2) else next_buffer
            next_buffer = index + 1
            by_reference = "&" in parameter
            space = re.match(r"\s*(?:const\s+)?(device|constant)\b", parameter)
            if space is None:
                raise SourceError(f"{file}: parameter '{parameter}' of {name} is in no address space that a buffer can be in")
            arguments.append(f"{'mtl_bytes' if by_reference else 'mtl_buffer'} {{ a, {index} }}")
        else:
            return None
    return Kernel(name, host_name, tuple(arguments), n_shared)


def read_library(file: str, text: str) -> Library:
    """Kernels and function constants of a .metal file (with what it includes). Raises SourceError."""
    text = without_comments(text)
    declared: dict[str, Kernel | None] = {}
    for found in re.finditer(r'(\[\[host_name\("([^"]*?)\s*"\s*\)\]\]\s*)?\bkernel\s+void\s+(\w+)\s*\(', text):
        before = text[: found.start()].rstrip()
        is_template = before.endswith(">") or bool(re.search(r"template\s*<[^;{}]*>\s*$", before))
        name = found.group(3)
        host_name = None if is_template else found.group(2) or name
        end = closing(text, found.end() - 1)
        declared[name] = read_kernel(file, name, host_name, text[found.end() : end])
    kernels = {k.host_name: (k.name, k) for k in declared.values() if k and k.host_name}
    for found in re.finditer(r'template\s*\[\[host_name\("([^"]*?)\s*"\s*\)\]\]\s*kernel\s+\w+\s+((\w+)\s*<.*?>)\s*;', text, re.DOTALL):
        host_name, function, name = found.groups()
        if name not in declared:
            raise SourceError(f"{file}: {host_name} is an instance of {name}, which the file does not declare")
        if host_name in kernels:
            raise SourceError(f"{file}: two kernels have the name {host_name}")
        kernel = declared[name]
        if kernel:
            kernels[host_name] = (" ".join(function.split()), kernel)
    constants = re.findall(r"\bconstant\s+(\w+)\s+(\w+)\s*\[\[\s*function_constant\((.*?)\)\s*\]\]\s*;", text)
    return Library(file, kernels, tuple((name, kind, index) for kind, name, index in constants))


def only(library: Library, pattern: str) -> Library:
    """The kernels whose whole names match."""
    return replace(library, kernels={name: k for name, k in library.kernels.items() if re.fullmatch(pattern, name)})


def registration(library: Library) -> str:
    """C++ that makes the library known to the harness."""
    lines = ["namespace {"]
    launchers = {}
    for number, (host_name, (function, kernel)) in enumerate(library.kernels.items()):
        launchers[host_name] = f"launch_{number}"
        lines.append(
            f"void launch_{number}(const mtl_arguments & a, const mtl_context & c) "
            f"{{ (void) a; (void) c; {function}({', '.join(kernel.arguments)}); }}"
        )
    lines.append(f'const mtl_library library = {{ "{library.file}", {{')
    lines += [f'    {{ "{name}", {launchers[name]}, {k.n_shared} }},' for name, (_, k) in library.kernels.items()]
    lines.append("}, {")
    for name, kind, index in library.constants:
        lines.append(f'    {{ "{name}", {index}, {CONSTANT_TYPES.get(kind, "MTL_OTHER")}, [](int v) {{ {name} = v; }} }},')
    lines += ["} };", "const mtl_register registered(&library);", "}"]
    return "\n".join(lines) + "\n"


def translation_unit(library: Library, namespace: str) -> str:
    """C++ of a .metal file and its table. In a namespace: the files have functions of the same names, with constants of their own."""
    spaces = "".join(f"#undef {word}\n" for word in ("kernel", "device", "thread", "threadgroup", "constant"))
    return (
        f'#include <metal_stdlib>\n#include "kernels.h"\nnamespace {namespace} {{\n'
        f'#include "{library.file}"\n{spaces}{registration(library)}}}\n'
    )
