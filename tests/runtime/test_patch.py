"""Patches apply exactly or not at all; a tree is made again when series or source change, touching only what differs."""

import subprocess
from pathlib import Path

import pytest

from rq_gguf.errors import UserError
from rq_gguf.runtime import cache, patch
from rq_gguf.runtime.fetch import Source

PATCH_1 = """\
From 0000000000000000000000000000000000000000 Mon Sep 17 00:00:00 2001
From: Someone <someone@example.org>
Date: Mon, 1 Jan 2024 00:00:00 +0000
Subject: [PATCH 1/2] change b, add c

---
diff --git a/src/b.c b/src/b.c
--- a/src/b.c
+++ b/src/b.c
@@ -1,3 +1,3 @@
 one
-two
+zwei
 three
diff --git a/src/c.c b/src/c.c
new file mode 100644
--- /dev/null
+++ b/src/c.c
@@ -0,0 +1 @@
+new
"""
PATCH_2 = """\
diff --git a/src/b.c b/src/b.c
--- a/src/b.c
+++ b/src/b.c
@@ -1,3 +1,3 @@
 one
 zwei
-three
+drei
"""


def populate(target: Path) -> None:
    for name, text in (("src/a.c", "kept\n"), ("src/b.c", "one\ntwo\nthree\n"), ("gone/d.c", "d\n")):
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (target / name).write_text(text)


SOURCE = Source("fake:1", "fake llama.cpp", "unknown", None, populate)


@pytest.fixture
def patches(tmp_path):
    folder = tmp_path / "patches"
    folder.mkdir()
    (folder / "0001-b.patch").write_text(PATCH_1)
    (folder / "0002-b.patch").write_text(PATCH_2)
    return folder


@pytest.fixture
def tree(tmp_path):
    """Inside another repository, where `git apply` would skip files silently."""
    subprocess.run(["git", "init", "-q", str(tmp_path)], check=True)
    return cache.Tree(tmp_path / "cache" / "llama.cpp-pinned-patched")


def test_series_applies_in_order(tree, patches):
    patch.prepare(tree, SOURCE, patch.read_series(patches))
    assert (tree.source / "src/b.c").read_text() == "one\nzwei\ndrei\n"
    assert (tree.source / "src/c.c").read_text() == "new\n"
    assert not (tree.root / "src.new").exists()


def test_git_variables_of_a_hook_do_not_redirect_it(tree, patches, monkeypatch, tmp_path):
    monkeypatch.setenv("GIT_DIR", str(tmp_path / ".git"))
    monkeypatch.setenv("GIT_WORK_TREE", str(tmp_path))
    patch.prepare(tree, SOURCE, patch.read_series(patches))
    assert (tree.source / "src/b.c").read_text() == "one\nzwei\ndrei\n"


def test_stock_tree_is_the_source_as_it_is(tree):
    patch.prepare(tree, SOURCE, None)
    assert (tree.source / "src/b.c").read_text() == "one\ntwo\nthree\n"


def test_series_hash_sees_names_and_contents(patches):
    first = patch.read_series(patches).sha256
    assert patch.read_series(patches).sha256 == first
    (patches / "0002-b.patch").rename(patches / "0003-b.patch")
    renamed = patch.read_series(patches).sha256
    (patches / "0003-b.patch").write_text(PATCH_2 + "\n")
    assert len({first, renamed, patch.read_series(patches).sha256}) == 3


def test_empty_series(tmp_path):
    with pytest.raises(UserError, match=r"holds no \*\.patch files"):
        patch.read_series(tmp_path)


def test_stale_tree_is_remade_touching_only_what_changed(tree, patches, capsys):
    patch.prepare(tree, SOURCE, patch.read_series(patches))
    before = {f: f.stat().st_mtime_ns for f in tree.source.rglob("*") if f.is_file()}
    (patches / "0002-b.patch").write_text(PATCH_2.replace("drei", "DREI"))
    (patches / "0001-b.patch").write_text(PATCH_1.replace("src/c.c", "src/e.c"))
    series = patch.read_series(patches)
    assert not patch.is_current(tree, SOURCE, series)
    patch.prepare(tree, SOURCE, series)
    assert "the patch series has changed" in capsys.readouterr().err
    assert patch.is_current(tree, SOURCE, series)
    assert (tree.source / "src/b.c").read_text() == "one\nzwei\nDREI\n"
    assert not (tree.source / "src/c.c").exists()
    after = {f: f.stat().st_mtime_ns for f in tree.source.rglob("*") if f.is_file()}
    assert {f.name for f, t in after.items() if before.get(f) != t} == {"b.c", "e.c"}


def test_current_tree_is_left_alone(tree, patches):
    series = patch.read_series(patches)
    patch.prepare(tree, SOURCE, series)

    def refuse(target: Path) -> None:
        raise AssertionError("made again")

    patch.prepare(tree, Source(SOURCE.id, "", "", None, refuse), series)


def test_new_source_drops_vanished_files_and_folders(tree):
    patch.prepare(tree, SOURCE, None)

    def smaller(target: Path) -> None:
        (target / "src").mkdir(parents=True)
        (target / "src" / "a.c").write_text("kept\n")

    patch.prepare(tree, Source("fake:2", "", "", None, smaller), None)
    assert [f.relative_to(tree.source).as_posix() for f in sorted(tree.source.rglob("*"))] == ["src", "src/a.c"]


def test_interrupted_sync_is_noticed(tree, patches, monkeypatch):
    patch.prepare(tree, SOURCE, None)

    def stop(new: Path, old: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(patch, "sync", stop)
        with pytest.raises(KeyboardInterrupt):
            patch.prepare(tree, SOURCE, patch.read_series(patches))
    assert not patch.is_current(tree, SOURCE, None) and not (tree.root / "src.new").exists()
    patch.prepare(tree, SOURCE, None)
    assert patch.is_current(tree, SOURCE, None)


@pytest.mark.parametrize(
    ("old", "new", "where"),
    [(" zwei", " two", "src/b.c"), ("a/src/b.c", "a/src/missing.c", "src/missing.c"), ("@@ -1,3", "@@ -1,9", "corrupt patch")],
)
def test_a_patch_that_does_not_apply_is_named_and_the_old_tree_stays(tree, patches, old, new, where):
    good = patch.read_series(patches)
    patch.prepare(tree, SOURCE, good)
    text = PATCH_2.replace(old, new)
    (patches / "0002-b.patch").write_text(text.replace("b/src/b.c", "b/src/missing.c") if "missing" in new else text)
    with pytest.raises(UserError, match=rf"0002-b\.patch does not apply to fake llama\.cpp: .*{where}"):
        patch.prepare(tree, SOURCE, patch.read_series(patches))
    assert patch.is_current(tree, SOURCE, good)
    assert not (tree.root / "src.new").exists()


def test_no_fuzz(tree, patches):
    """One changed context line is enough to refuse."""
    (patches / "0002-b.patch").write_text(PATCH_2.replace(" one", " ONE"))
    with pytest.raises(UserError, match=r"0002-b\.patch does not apply"):
        patch.prepare(tree, SOURCE, patch.read_series(patches))


def test_the_projects_series_is_found():
    assert patch.series_dir() == Path(__file__).resolve().parents[2] / "patches"
