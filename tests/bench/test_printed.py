"""What llama.cpp's benchmark programs print, read: as they printed it, shortened."""

import json

import pytest

from rq_gguf.bench.printed import batched_speeds, bench_records, bench_speeds, prompt_speeds

BENCH = [
    {"cpu_info": "Xeon", "n_prompt": 64, "n_gen": 0, "avg_ts": 2005.4, "samples_ts": [1000.0, 3000.0, 2100.0]},
    {"cpu_info": "Xeon", "n_prompt": 0, "n_gen": 16, "avg_ts": 453.6, "samples_ts": [453.0, 455.0]},
]
BATCHED = """
main: n_kv_max = 2048
{"n_kv_max": 2048, "pp": 16, "tg": 48, "pl": 1, "n_kv": 64, "t_pp": 0.06, "speed_pp": 991.4, "t_tg": 0.05, "speed_tg": 285.8}
{"n_kv_max": 2048, "pp": 16, "tg": 48, "pl": 4, "n_kv": 256, "t_pp": 0.06, "speed_pp": 991.4, "t_tg": 0.05, "speed_tg": 912.5}
{"n_kv_max": 2048, "pp": 16, "tg": 1, "pl": 1, "n_kv": 17, "t_pp": 0.06, "speed_pp": 991.4, "t_tg": 0.05, "speed_tg": 99.0}
{"n_kv_max": 2048, "pp": 16, "tg": 1, "pl": 4, "n_kv": 6
"""
COMPLETION = """
0.00.298.042 I common_perf_print:    sampling time =       3.54 ms
0.00.298.101 I common_perf_print:        load time =      30.78 ms
0.00.298.127 I common_perf_print: prompt eval time =     120.00 ms /   552 tokens (    0.22 ms per token,  4552.20 tokens per second)
0.00.298.151 I common_perf_print:        eval time =      50.00 ms /    31 runs   (    1.53 ms per token,   654.92 tokens per second)
0.00.298.173 I common_perf_print:       total time =     184.32 ms /   583 tokens
"""


def test_bench():
    assert bench_speeds(json.dumps(BENCH)) == {"pp64": 2100.0, "tg16": 454.0}
    assert bench_records(json.dumps(BENCH))[0]["cpu_info"] == "Xeon"


@pytest.mark.parametrize("printed", ["", "{}", "[1]", '[{"n_gen": 1}]', "[{]"])
def test_bench_of_something_else(printed):
    with pytest.raises(ValueError):
        bench_speeds(printed)


def test_batched():
    """Only the long runs count, and a line that was cut is none."""
    assert batched_speeds(BATCHED) == {1: 285.8, 4: 912.5}
    assert batched_speeds("error: unable to load model") == {}


def test_completion():
    (prompt, prompt_speed), (reply, reply_speed) = prompt_speeds(COMPLETION)
    assert (prompt, reply) == (552, 31)
    assert (prompt_speed, reply_speed) == pytest.approx((4600.0, 620.0))


def test_completion_that_lost_its_last_lines():
    for lines in (COMPLETION.splitlines()[:4], COMPLETION.splitlines()[:3], []):
        with pytest.raises(ValueError, match="no times"):
            prompt_speeds("\n".join(lines))
