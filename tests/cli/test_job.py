"""Which steps of a build are done again."""

import os
from pathlib import Path

import pytest

import rq_gguf
from rq_gguf.errors import UserError
from rq_gguf.job import Job, input_key, job_directory, key
from rq_gguf.writing.split import existing_parts, part_names


class Recorder:
    """A job in a directory, and what its steps did."""

    def __init__(self, directory: Path) -> None:
        self.out = directory / "out.gguf"
        self.lines: list[str] = []
        self.made: list[str] = []

    def job(self, force: bool = False) -> Job:
        return Job(self.out, force=force, parts=existing_parts(self.out), say=self.lines.append)

    def step(self, job: Job, name: str, path: Path, step_key: str, **kwargs: bool) -> bool:
        """True if it was done."""

        def make() -> None:
            self.made.append(name)
            path.write_text(f"{name} {len(self.made)}")

        before = len(self.made)
        assert job.step(name, path, step_key, make, **kwargs) == (path,)
        return len(self.made) > before

    def write(self, n: int, step_key: str) -> list[str]:
        """The write step with n files; what lies there then."""

        def make() -> tuple[Path, ...]:
            self.made.append("write")
            paths = part_names(self.out, n)
            for path in paths:
                path.write_text(f"{len(self.made)} {path.name}")
            return paths

        assert self.job().step("write", self.out, step_key, make) == part_names(self.out, n)
        return sorted(p.name for p in self.out.parent.glob("*.gguf"))


@pytest.fixture
def recorder(tmp_path: Path) -> Recorder:
    return Recorder(tmp_path)


def test_a_finished_step_is_skipped_with_a_line(recorder: Recorder) -> None:
    file = recorder.job().directory / "base.gguf"
    assert recorder.step(recorder.job(), "convert", file, "a")
    assert not recorder.step(recorder.job(), "convert", file, "a")
    assert recorder.made == ["convert"]
    assert recorder.lines == [f"convert: done before, {file}"]


def test_changed_inputs_force_or_a_lost_file_do_it_again(recorder: Recorder) -> None:
    file = recorder.job().directory / "base.gguf"
    recorder.step(recorder.job(), "convert", file, "a")
    assert recorder.step(recorder.job(), "convert", file, "b")
    assert recorder.step(recorder.job(force=True), "convert", file, "b")
    file.unlink()
    assert recorder.step(recorder.job(), "convert", file, "b")
    file.write_text("something else")
    assert recorder.step(recorder.job(), "convert", file, "b")
    assert not recorder.step(recorder.job(), "convert", file, "b")


def test_a_step_that_fails_is_not_remembered(recorder: Recorder) -> None:
    job = recorder.job()

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        job.step("convert", job.directory / "base.gguf", "a", fail)
    assert recorder.step(recorder.job(), "convert", job.directory / "base.gguf", "a")


def test_an_interrupted_change_keeps_the_old_result(recorder: Recorder) -> None:
    file = recorder.job().directory / "base.gguf"
    recorder.step(recorder.job(), "convert", file, "a")
    with pytest.raises(KeyboardInterrupt):
        recorder.job().step("convert", file, "b", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not recorder.step(recorder.job(), "convert", file, "a")


def test_an_edited_plan_is_not_overwritten(recorder: Recorder) -> None:
    plan = recorder.job().directory / "plan.json"
    recorder.step(recorder.job(), "plan", plan, "a", editable=True)
    plan.write_text("edited by hand")
    for step_key in ("a", "b"):
        with pytest.raises(UserError, match=r"plan.json was edited; use it with --plan, or --force"):
            recorder.step(recorder.job(), "plan", plan, step_key, editable=True)
    assert plan.read_text() == "edited by hand"
    assert recorder.step(recorder.job(force=True), "plan", plan, "a", editable=True)


def test_a_foreign_output_needs_force(recorder: Recorder) -> None:
    recorder.out.write_text("precious")
    with pytest.raises(UserError, match="exists and is not the file that this job wrote; use --force"):
        recorder.job()
    assert not (recorder.out.parent / "out.gguf.rq").exists()
    assert recorder.step(recorder.job(force=True), "write", recorder.out, "a")
    assert recorder.step(recorder.job(), "write", recorder.out, "b")  # now it is ours
    recorder.out.write_text("replaced by something else")
    with pytest.raises(UserError, match="use --force"):
        recorder.job()


def test_an_output_interrupted_before_its_record_is_ours(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    job = recorder.job()
    recorder.step(job, "write", recorder.out, "a")

    def interrupted(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Job, "_remember", interrupted)
    with pytest.raises(KeyboardInterrupt):
        recorder.step(recorder.job(), "write", recorder.out, "b")
    monkeypatch.undo()
    assert recorder.step(recorder.job(), "write", recorder.out, "b")


def test_a_damaged_record_does_the_work_again(recorder: Recorder) -> None:
    job = recorder.job()
    file = job.directory / "base.gguf"
    recorder.step(job, "convert", file, "a")
    for content in ("", "{", "[]", '{"steps": 1}'):
        (job.directory / "job.json").write_text(content)
        assert recorder.step(recorder.job(), "convert", file, "a")


def test_bad_places(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a directory; name the file to write"):
        Job(tmp_path, force=True, say=print)
    with pytest.raises(UserError, match=r"the output directory .*none does not exist"):
        Job(tmp_path / "none" / "out.gguf", force=False, say=print)
    (tmp_path / "out.gguf.rq").write_text("a file where the job's directory should be")
    with pytest.raises(UserError, match="cannot be written"):
        Job(tmp_path / "out.gguf", force=False, say=print)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write everywhere")
def test_a_directory_without_write_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(UserError, match="cannot be written: Permission denied"):
            Job(tmp_path / "out.gguf", force=False, say=print)
    finally:
        tmp_path.chmod(0o700)


def test_one_build_at_a_time(recorder: Recorder) -> None:
    with recorder.job().locked(), pytest.raises(UserError, match="another build of .*out.gguf is running"), recorder.job().locked():
        pass
    with recorder.job().locked():
        pass


def test_keys_follow_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    before = input_key(model)
    (model / "README.md").write_text("not part of the model")
    assert input_key(model) == before
    (model / "model.safetensors").write_bytes(b"weights")
    with_weights = input_key(model)
    assert with_weights != before
    (model / "model.safetensors").write_bytes(b"Weights")
    assert input_key(model) != with_weights

    monkeypatch.setattr("rq_gguf.job._WHOLE", 1 << 20)
    large = tmp_path / "large.gguf"
    large.write_bytes(bytes(3 << 20))
    before = input_key(large)
    assert input_key(large) == before
    with large.open("r+b") as f:
        f.seek(-1, os.SEEK_END)
        f.write(b"x")
    assert input_key(large) != before

    old = key(["settings"])
    monkeypatch.setattr(rq_gguf, "__version__", "99")
    assert key(["settings"]) != old


def test_an_output_in_several_files(recorder: Recorder) -> None:
    out = recorder.out
    assert recorder.write(2, "a") == ["out-00001-of-00002.gguf", "out-00002-of-00002.gguf"]
    recorder.write(2, "a")
    assert recorder.made == ["write"]
    assert job_directory(part_names(out, 2)[0]) == job_directory(out) == out.with_name("out.gguf.rq")
    part_names(out, 2)[1].unlink()
    recorder.write(2, "a")
    assert recorder.made == ["write"] * 2

    assert len(recorder.write(3, "b")) == 3  # and not the two of before
    assert recorder.write(1, "c") == ["out.gguf"]
    recorder.write(3, "d")
    part_names(out, 3)[2].write_text("something else")
    with pytest.raises(UserError, match="out-00003-of-00003.gguf exists and is not the file that this job wrote"):
        recorder.job()
    assert recorder.job(force=True)
