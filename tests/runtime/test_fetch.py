"""The source package is trusted only by its hash, and extracted only where it belongs; checkouts are copied, not changed."""

import hashlib
import io
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from rq_gguf.errors import UserError
from rq_gguf.runtime import fetch


def package(path: Path, members: dict[str, bytes], executable: tuple[str, ...] = ()) -> Path:
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            info.mode = 0o755 if name in executable else 0o644
            tar.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo(f"{fetch.PREFIX}/link")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    return path


def test_a_wrong_file_is_refused(tmp_path, monkeypatch):
    wrong = tmp_path / fetch.ARCHIVE
    wrong.write_bytes(b"not the package")
    monkeypatch.setenv("RQ_GGUF_SDIST", str(wrong))
    with pytest.raises(UserError, match="its sha256 is " + hashlib.sha256(b"not the package").hexdigest()):
        fetch.archive()


def test_a_missing_file_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("RQ_GGUF_SDIST", str(tmp_path / "nowhere.tar.gz"))
    with pytest.raises(UserError, match=r"RQ_GGUF_SDIST: .*nowhere\.tar\.gz is not a file"):
        fetch.archive()


def test_a_damaged_cached_file_is_fetched_again(tmp_path, monkeypatch):
    monkeypatch.setenv("RQ_GGUF_CACHE", str(tmp_path))
    monkeypatch.delenv("RQ_GGUF_SDIST", raising=False)
    kept = tmp_path / "downloads" / fetch.ARCHIVE
    kept.parent.mkdir()
    kept.write_bytes(b"half a download")
    asked = []
    monkeypatch.setattr(fetch, "download", asked.append)
    assert fetch.archive() == kept
    assert asked == [kept]
    kept.write_bytes(b"whole")
    monkeypatch.setattr(fetch, "SHA256", hashlib.sha256(b"whole").hexdigest())
    fetch.archive()
    assert asked == [kept], "a good file must not be fetched again"


def test_pip_failing_is_one_error_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(fetch, "VERSION", "0.0.0")  # no such release; the index is switched off all the same
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    target = tmp_path / "downloads" / "x.tar.gz"
    with pytest.raises(UserError, match="pip could not fetch llama-cpp-python 0.0.0"):
        fetch.download(target)
    assert list(target.parent.iterdir()) == []


def test_extract_takes_the_tree_alone(tmp_path):
    p = fetch.PREFIX
    made = package(
        tmp_path / "p.tar.gz",
        {f"{p}/CMakeLists.txt": b"cmake", f"{p}/scripts/run.sh": b"#!", f"{p}/.git": b"gitdir: gone", f"{p}/.gitignore": b"x",
         "llama_cpp_python-0.3.36/setup.py": b"other", "llama_cpp_python-0.3.36/vendor/other/a": b"other"},
        executable=(f"{p}/scripts/run.sh",),
    )  # fmt: skip
    out = tmp_path / "out"
    fetch.extract(made, out)
    assert {f.relative_to(out).as_posix() for f in out.rglob("*") if f.is_file()} == {"CMakeLists.txt", "scripts/run.sh", ".gitignore"}
    assert (out / "CMakeLists.txt").read_bytes() == b"cmake"
    assert os.access(out / "scripts/run.sh", os.X_OK) and not os.access(out / "CMakeLists.txt", os.X_OK)


def test_extract_refuses_a_way_out(tmp_path):
    made = package(tmp_path / "p.tar.gz", {f"{fetch.PREFIX}/../../../evil": b"x"})
    with pytest.raises(UserError, match="leaves its directory"):
        fetch.extract(made, tmp_path / "a" / "b" / "c" / "out")
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize("keep", [0, 40, -30])
def test_extract_names_a_damaged_package(tmp_path, keep):
    made = package(tmp_path / "p.tar.gz", {f"{fetch.PREFIX}/a": os.urandom(5000)})
    made.write_bytes(made.read_bytes()[:keep])
    with pytest.raises(UserError, match=r"p\.tar\.gz is damaged"):
        fetch.extract(made, tmp_path / "out")


def test_extract_refuses_a_package_without_llama_cpp(tmp_path):
    with pytest.raises(UserError, match="holds no"):
        fetch.extract(package(tmp_path / "p.tar.gz", {"else/a": b"x"}), tmp_path / "out")


def fake_checkout(root: Path) -> Path:
    sources = ("src/llama-graph.cpp", "ggml/CMakeLists.txt", "models/ggml-vocab-x.gguf", "tests/build-me/a.c")
    for name in (*sources, "models/big.gguf", "build/old.o"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(name)
    return root


def test_checkout_without_git(tmp_path):
    root = fake_checkout(tmp_path / "llama.cpp")
    (root / ".git").write_text("gitdir: ../gone\n")
    source = fetch.checkout(root)
    source.populate(tmp_path / "copy")
    copied = {f.relative_to(tmp_path / "copy").as_posix() for f in (tmp_path / "copy").rglob("*") if f.is_file()}
    assert copied == {"src/llama-graph.cpp", "ggml/CMakeLists.txt", "models/ggml-vocab-x.gguf", "tests/build-me/a.c"}
    assert source.commit == "unknown"


def test_checkout_with_git_and_its_fingerprint(tmp_path):
    root = fake_checkout(tmp_path / "llama.cpp")
    (root / ".gitignore").write_text("/build/\n/models/big.gguf\n")
    git = ["git", "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for args in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *args], cwd=root, check=True, stdin=subprocess.DEVNULL)
    (root / "src" / "new.cpp").write_text("untracked, but a source file")
    source = fetch.checkout(root)
    assert fetch.checkout_files(root) == [
        ".gitignore", "ggml/CMakeLists.txt", "models/ggml-vocab-x.gguf", "src/llama-graph.cpp", "src/new.cpp", "tests/build-me/a.c",
    ]  # fmt: skip
    assert len(source.commit) == 9
    assert fetch.checkout(root).id == source.id
    (root / "src" / "new.cpp").write_text("changed")
    assert fetch.checkout(root).id != source.id


def test_checkout_of_something_else(tmp_path):
    with pytest.raises(UserError, match="is not a llama.cpp source tree"):
        fetch.checkout(tmp_path)
