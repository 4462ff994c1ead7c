"""What the series changes of llama.cpp's log: a program that frees it, as upstream's test-log does, ends."""

import subprocess
from pathlib import Path

import pytest

from rq_gguf.runtime.tools import source_path

PROGRAM = """
#include "log.h"

int main(int argc, char **) {
    for (int i = 0; i < 1000; i++) {
        LOG_INF("line %d\\n", i);
    }
    if (argc > 1) {
        common_log_flush(common_log_main());
        common_log_free(common_log_main());
    }
    return 0;
}
"""


@pytest.fixture(scope="module")
def program(runtime: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("log")
    (folder / "log.cpp").write_text(PROGRAM)
    source, library = source_path("common").parent, runtime / "libllama-common.so"
    include = [f"-I{source / part}" for part in ("common", "ggml/include", "include")]
    link = [library, f"-Wl,-rpath,{runtime}", f"-Wl,-rpath-link,{runtime}"]
    subprocess.run(["c++", "-std=c++17", *include, folder / "log.cpp", *link, "-o", folder / "log"], check=True)
    return folder / "log"


@pytest.mark.runtime
@pytest.mark.parametrize("freed", [False, True])
def test_all_is_printed_and_the_program_ends(freed: bool, program: Path) -> None:
    done = subprocess.run([program, *["free"] * freed], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert (done.stdout + done.stderr).count("line ") == 1000
