"""Task accuracy: reading items, tokens and batches by hand, pairing, and log-likelihoods against transformers."""

import json
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from rq_gguf import cli
from rq_gguf.errors import UserError
from rq_gguf.evaluation import evaluate as room
from rq_gguf.evaluation import libllama, scorer, tasks
from rq_gguf.evaluation.evaluate import evaluate
from rq_gguf.evaluation.items import Item, Task, read_task
from rq_gguf.evaluation.libllama import Llama
from rq_gguf.evaluation.scorer import Encoder, Group, ItemError, Score, Wanted, assemble, pack
from rq_gguf.evaluation.tasks import Scores, TaskResult, correct, describe, pair, score_tasks, to_json
from rq_gguf.runtime.tools import library_path, run_tool

CHOICES = [
    {"context": "Question: What do bees make?\nAnswer:", "choices": ["honey", "a great deal of iron", "glass"], "label": 0},
    {"context": "Question: Where do fish live?\nAnswer:", "choices": ["in the water", "on top of the highest mountains"], "label": 0},
    {
        "context": "Question: How is bread baked?\nAnswer:",
        "choices": ["In a cold cellar, slowly.", "In a hot oven.", "By hand."],
        "label": 1,
    },
    {"context": "", "choices": ["Once upon a time there was a king.", "time king Once was there a upon."], "label": 0},
    {"context": "The old man opened the door and ", "choices": ["went into the house", "quickly the house"], "label": 0},
    {"context": "Question: Wer wäre müde?\nAnswer:", "choices": ["der König — natürlich", "the sleepy one"], "label": 1},
    {"context": "The king said to his daughter that she", "choices": ["must", "should"], "label": 0},
]
WORDS = [
    "Once upon a time",
    "He took her by the hand and led her to the king's palace, and there was great joy",
    "There was once a poor woodcutter who lived with his wife and his two children",
    "The sun rose over the hills and the birds began to sing",
    "As soon as he had said these words the door flew open",
]


@pytest.fixture
def file(tmp_path):
    """Writes a task file of the given lines: strings as they are, others as JSON."""

    def write(name: str, *lines: object) -> Path:
        path = tmp_path / name
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines), encoding="utf-8")
        return path

    return write


# items


def test_reads_choices(file):
    task = read_task(file("a.b.jsonl", CHOICES[0], "", CHOICES[2]))
    assert task.name == "a.b" and task.n_in_file == 2
    assert task.items[1] == Item(
        3, "Question: How is bread baked?\nAnswer:", ("In a cold cellar, slowly.", "In a hot oven.", "By hand."), 1
    )
    assert not task.asks_for_a_word


def test_reads_words(file):
    lines = [{"text": "a b  c"}, {"text": "a b c", "context": "x", "target": "y"}, {"context": "x", "target": "y z"}]
    task = read_task(file("words.jsonl", *lines))
    assert [(x.context, x.choices, x.label) for x in task.items] == [("a b ", ("c",), 0), ("x", ("y",), 0), ("x", ("y z",), 0)]
    assert task.asks_for_a_word


@given(st.integers(2, 300), st.integers(2, 300))
def test_a_limit_is_spaced_evenly(tmp_path_factory, n, limit):
    path = tmp_path_factory.getbasetemp() / "many.jsonl"
    path.write_text("\n".join('{"text": "a b"}' for _ in range(n)))
    task = read_task(path, limit)
    lines = [x.line for x in task.items]
    assert len(lines) == min(n, limit) and lines[0] == 1 and task.n_in_file == n
    steps = np.diff(lines)
    assert steps.min() >= 1 and steps.max() - steps.min() <= 1
    assert n - lines[-1] < steps.max() + 1


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{'text': 'a b'}", "Expecting property name"),
        ("[1]", "list instead of an object"),
        ({"question": "x"}, "no 'choices', 'target' or 'text' (there: 'question')"),
        ({"choices": ["a", "b"], "label": 0}, "no 'context'"),
        ({"context": 3, "choices": ["a", "b"], "label": 0}, "'context' must be a string"),
        ({"context": "x", "choices": ["a"], "label": 0}, "two or more"),
        ({"context": "x", "choices": ["a", 1], "label": 0}, "list of two or more strings"),
        ({"context": "x", "choices": "ab", "label": 0}, "list of two or more strings"),
        ({"context": "x", "choices": ["a", "b"], "label": 2}, "0 to 1, not 2"),
        ({"context": "x", "choices": ["a", "b"], "label": "A"}, "0 to 1, not 'A'"),
        ({"context": "x", "choices": ["a", "b"], "label": True}, "0 to 1, not True"),
        ({"context": "x", "choices": ["a", "b"]}, "0 to 1, not None"),
        ({"context": "x", "choices": ["a", " "], "label": 0}, "an empty choice"),
        ({"text": "word"}, "no space before a last word"),
        ({"text": "word "}, "an empty choice"),
        ('{"text": "a \\ud800"}', "surrogates not allowed"),
        ("[" * 100000, "recursion"),
    ],
)
def test_malformed_lines_are_named(file, line, reason):
    path = file("bad.jsonl", {"text": "a b"}, "", line)
    with pytest.raises(UserError) as e:
        read_task(path)
    assert str(e.value).startswith(f"{path} line 3: ")
    assert reason in str(e.value)


def test_unsuitable_files(file, tmp_path):
    with pytest.raises(UserError, match=r"mixed.jsonl line 2 asks for a choice, line 1 for a word: split the file"):
        read_task(file("mixed.jsonl", {"text": "a b"}, CHOICES[0]))
    with pytest.raises(UserError, match=r"one.jsonl has 1 items; a standard error needs 2"):
        read_task(file("one.jsonl", {"text": "a b"}))
    with pytest.raises(UserError, match=r"none.jsonl cannot be read: no such file"):
        read_task(tmp_path / "none.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "a b"}\n{"text": "a \xe9"}\n')
    with pytest.raises(UserError, match=r"latin.jsonl line 2: .*utf-8"):
        read_task(tmp_path / "latin.jsonl")


# tokens, truncation and batches


def letters(text: str) -> list[int]:
    """A tokenizer of characters, except that "th" is one token."""
    return [ord(c) for c in text.replace("th", "\xfe")]


def encoder(max_length: int = 100, bos: int | None = 1, share: bool = True) -> Encoder:
    return Encoder(letters, bos, 1, max_length, share)


def test_pairs_are_split_as_lm_eval_splits_them():
    assert encoder().pair("ab", " c") == ([1, 97, 98], [32, 99])
    assert encoder(bos=None).pair("ab", " c") == ([97, 98], [32, 99])
    # Spaces at the end of the context belong to the continuation.
    assert encoder().pair("ab \n", " c") == ([1, 97, 98], [32, 10, 32, 99])
    # Nothing before it: BOS, also where texts of the model do not begin with it.
    assert encoder(bos=None).pair("", " c") == ([1], [32, 99])
    # Merging across the border: what the whole has behind as many tokens as the context has.
    assert encoder().pair("at", "h") == ([1, 97, 116], [])
    assert encoder().pair("at", "he") == ([1, 97, 116], [101])


def test_groups():
    e = encoder()
    assert e.groups(4, "ab", [" c", " de"]) == [Group(4, (0, 1), [1, 97, 98], ([32, 99], [32, 100, 101]))]
    assert e.truncated == []
    apart = encoder(share=False).groups(4, "ab", [" c", " de"])
    assert apart == [Group(4, (0,), [1, 97, 98], ([32, 99],)), Group(4, (1,), [1, 97, 98], ([32, 100, 101],))]
    with pytest.raises(ItemError, match="'h' adds no token to its context") as caught:
        e.groups(4, "at", ["h"])
    assert caught.value.item == 4
    with pytest.raises(ItemError, match="no token that begins a text"):
        Encoder(letters, None, None, 9, True).groups(0, "", [" a"])
    with pytest.raises(ItemError, match="takes 5 tokens; the model sees 4"):
        encoder(4).groups(0, "ab", [" cdef"])


def test_truncation_from_the_left():
    """The last token is only predicted, so a model of 4 tokens sees the first 4 of the last 5; BOS is what goes first."""
    e = encoder(4)
    assert e.groups(0, "ab", [" c"]) == [Group(0, (0,), [1, 97, 98], ([32, 99],))]
    assert e.groups(1, "ab", [" cd"]) == [Group(1, (0,), [97, 98], ([32, 99, 100],))]
    # One that is too long takes the shared prefix from all, but only its own tokens are cut.
    assert e.groups(2, "ab", [" c", " cde"]) == [Group(2, (0,), [1, 97, 98], ([32, 99],)), Group(2, (1,), [98], ([32, 99, 100, 101],))]
    assert e.truncated == [1, 2]


GROUPS = [
    Group(0, (0, 1, 2), [1, 11], ([21, 22], [23], [24, 25, 26])),
    Group(1, (0,), [1], ([31],)),
]


def test_a_batch_by_hand():
    batch, wanted = assemble(GROUPS)
    assert [g.n_tokens for g in GROUPS] == [5, 1] and [g.n_sequences for g in GROUPS] == [2, 1]
    assert batch.tokens.tolist() == [1, 11, 21, 24, 25, 1]
    assert batch.positions.tolist() == [0, 1, 2, 2, 3, 0]
    assert batch.sequences == [(0, 1), (0, 1), (0,), (1,), (1,), (2,)]
    assert batch.outputs.tolist() == [0, 1, 1, 1, 1, 1]
    assert wanted == [
        Wanted(0, 0, [0, 1], [21, 22]),
        Wanted(0, 1, [0], [23]),
        Wanted(0, 2, [0, 2, 3], [24, 25, 26]),
        Wanted(1, 0, [4], [31]),
    ]


def test_reading_logits_by_hand():
    logits = np.log(np.array([[0.5, 0.25, 0.25], [0.2, 0.7, 0.1]], dtype=np.float32)) + np.float32([[300], [-300]])
    scores = {0: Score([0, 0], [False, False])}
    scorer.read(logits, [Wanted(0, 0, [0, 1], [0, 1]), Wanted(0, 1, [0, 1], [0, 2])], scores)
    assert scores[0].logprobs == pytest.approx([math.log(0.5 * 0.7), math.log(0.5 * 0.1)], abs=1e-4)
    assert scores[0].greedy == [True, False]
    logits[1, 0] = np.nan
    with pytest.raises(ItemError, match="not finite"):
        scorer.read(logits, [Wanted(0, 0, [1], [1])], scores)


_SIZES = st.lists(st.tuples(st.integers(1, 20), st.lists(st.integers(1, 6), min_size=1, max_size=5)), min_size=1, max_size=30)


@given(_SIZES, st.integers(1, 40), st.integers(1, 8))
def test_batches_hold_what_fits(sizes, n_tokens, n_sequences):
    groups = [Group(i, tuple(range(len(c))), [1] * p, tuple([2] * n for n in c)) for i, (p, c) in enumerate(sizes)]
    batches = list(pack(groups, n_tokens, n_sequences))
    assert [g for b in batches for g in b] == groups
    for groups_of_one in batches:
        batch, wanted = assemble(groups_of_one)
        used = {s for of_token in batch.sequences for s in of_token}
        assert len(batch.tokens) == sum(g.n_tokens for g in groups_of_one) and used == set(range(sum(g.n_sequences for g in groups_of_one)))
        assert len(groups_of_one) == 1 or (len(batch.tokens) <= n_tokens and len(used) <= n_sequences)
        assert {r for w in wanted for r in w.rows} == set(range(batch.outputs.sum()))


# accuracy


def test_right_and_wrong_by_hand():
    items = [Item(1, "", ("aaaa", "b"), 0), Item(2, "", ("aaaa", "b"), 0), Item(3, "", ("éé", "bbb"), 0)]
    # Per character: -1 and -3; -1 and -0.5; -1.5 and -1 (by bytes the last would be -0.75 and -1).
    scores = Scores(((-4, -3), (-4, -0.5), (-3, -3)), ((False, False),) * 3, 0)
    assert {k: v.tolist() for k, v in correct(items, scores).items()} == {"acc": [False, False, True], "acc_norm": [True, False, False]}
    words = [Item(1, "", ("a",), 0), Item(2, "", ("b",), 0)]
    assert correct(words, Scores(((-1,), (-2,)), ((True,), (False,)), 0))["acc"].tolist() == [True, False]


def test_pairs_by_hand():
    base, out = np.array([1, 1, 1, 0, 0], dtype=bool), np.array([1, 1, 0, 0, 1], dtype=bool)
    found = pair("acc", base, out)
    assert (found.base.value, found.out.value, found.difference.value) == pytest.approx((60, 60, 0))
    # Of differences 0 0 -1 0 1: variance 2 / 4. Of 1 1 1 0 0: 5 * 0.6 * 0.4 / 4.
    assert found.difference.error == pytest.approx(100 * math.sqrt(0.5 / 5))
    assert found.base.error == pytest.approx(100 * math.sqrt(1.2 / 4 / 5))
    assert (found.lost, found.gained) == (1, 1)


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=2, max_size=60))
def test_pairs_are_consistent(both):
    base, out = (np.array(x) for x in zip(*both, strict=True))
    a, n = pair("acc", base, out), len(both)
    assert a.difference.value == pytest.approx(a.out.value - a.base.value) == pytest.approx(100 * (a.gained - a.lost) / n)
    # McNemar: flips alone make the error.
    flips = (a.gained + a.lost - (a.gained - a.lost) ** 2 / n) / (n - 1)
    assert a.difference.error == pytest.approx(100 * math.sqrt(max(0, flips) / n))
    assert pair("acc", out, base).difference.value == pytest.approx(-a.difference.value)


@pytest.fixture
def results() -> list[TaskResult]:
    items = tuple(Item(i + 1, "x", ("a", "b"), 0) for i in range(1000))
    scores, cut = Scores((), (), 0), Scores((), (), 3)
    base, out = np.arange(1000) < 600, np.arange(1000) < 590
    return [
        TaskResult(Task(Path("d/piqa.jsonl"), items, 1000), scores, scores, (pair("acc", base, out), pair("acc_norm", out, base))),
        TaskResult(Task(Path("d/lambada.jsonl"), items, 5153), cut, cut, (pair("acc", base, base),)),
    ]


def test_table(results):
    assert describe(results) == [
        "tasks     accuracy in points, difference paired over items, ± standard error; flipped: right in one file only",
        "  task     metric    items          base          file    difference      flipped",
        "  piqa     acc       1,000  60.00 ± 1.55  59.00 ± 1.56  -1.00 ± 0.31  10 (-10 +0)",
        "           acc_norm         59.00 ± 1.56  60.00 ± 1.55  +1.00 ± 0.31  10 (-0 +10)",
        "  lambada  acc       1,000  60.00 ± 1.55  60.00 ± 1.55  +0.00 ± 0.00    0 (-0 +0)",
        "  lambada: only 1,000 of 5,153 items, evenly spaced over the file",
        "  lambada: 3 items are longer than the model's context and were cut from the left",
    ]


def test_json(results):
    data = json.loads(json.dumps(to_json(results)))
    assert [(t["task"], t["items"], t["items_in_file"], t["truncated"]) for t in data] == [
        ("piqa", 1000, 1000, 0),
        ("lambada", 1000, 5153, 3),
    ]
    acc = data[0]["metrics"]["acc"]
    assert (acc["out"]["value"], acc["difference"]["value"], acc["lost"], acc["gained"]) == pytest.approx((59, -1, 10, 0))
    assert list(data[0]["metrics"]) == ["acc", "acc_norm"] and list(data[1]["metrics"]) == ["acc"]


def test_command_line_sorts_further_files(file, monkeypatch):
    out, base, text = file("out.gguf"), file("base.gguf"), file("a.txt")
    more_text, first, second = file("b.txt"), file("c.jsonl"), file("d.jsonl")
    seen = []

    def stop(out, base, texts, tasks, **options):
        seen.append((list(texts), list(tasks), options["items"]))
        raise UserError("seen")

    monkeypatch.setattr(room, "evaluate", stop)

    def run(*args: object) -> tuple[list[Path], list[Path], int | None]:
        result = CliRunner().invoke(cli.main, ["eval", str(out), "--base", str(base), *map(str, args)])
        assert "Error: seen" in result.stderr, result.stderr
        return seen.pop()

    assert run("--text", text, more_text, "--tasks", first, second, "--items", 9) == ([text, more_text], [first, second], 9)
    assert run("--tasks", first, second) == ([], [first, second], None)
    assert run("--tasks", text, second) == ([], [text, second], None)
    assert run("--text", text, second) == ([text, second], [], None)


def test_nothing_to_evaluate(tmp_path):
    with pytest.raises(UserError, match="give at least one --text FILE or --tasks FILE"):
        evaluate(tmp_path / "a", tmp_path / "b", [])


# llama.cpp


@pytest.fixture(scope="module")
def demo_f32(demo_base, tmp_path_factory) -> Path:
    """In float32, so that llama.cpp rounds no activations."""
    path = tmp_path_factory.mktemp("tasks") / "demo-f32.gguf"
    run_tool(["llama-quantize", demo_base, path, "F32", "2"])
    return path


@pytest.fixture(scope="module")
def demo_tasks(tmp_path_factory) -> list[Task]:
    folder = tmp_path_factory.mktemp("task-files")
    (folder / "choices.jsonl").write_text("\n".join(map(json.dumps, CHOICES)))
    (folder / "words.jsonl").write_text("\n".join(json.dumps({"text": t}) for t in WORDS))
    return [read_task(folder / "choices.jsonl"), read_task(folder / "words.jsonl")]


@pytest.fixture(scope="module")
def reference(demo_model):
    """Log-likelihood and greediness of a continuation by transformers, its tokens split as lm_eval's _encode_pair splits them."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    bos = [tokenizer.bos_token_id]

    def encode(text: str) -> list[int]:
        return bos + tokenizer(text, add_special_tokens=False).input_ids

    @torch.no_grad()
    def score(context: str, continuation: str, max_length: int = 2048) -> tuple[float, bool]:
        head = encode(context.rstrip()) if context else bos
        tail = encode(context + continuation)[len(head) :]
        ids = torch.tensor((head + tail)[-(max_length + 1) :])
        logits = model(ids[None, :-1]).logits[0, -len(tail) :].double()
        target = ids[-len(tail) :]
        return float(logits.log_softmax(-1).gather(1, target[:, None]).sum()), bool((logits.argmax(-1) == target).all())

    return score


def expected(reference, task: Task, **options: int) -> Scores:
    found = [[reference(item.context, " " + c, **options) for c in item.choices] for item in task.items]
    return Scores(tuple(tuple(x for x, _ in f) for f in found), tuple(tuple(g for _, g in f) for f in found), 0)


def flat(scores: Scores) -> np.ndarray:
    return np.array([x for item in scores.logprobs for x in item])


@pytest.mark.runtime
@pytest.mark.golden
def test_log_likelihoods_are_those_of_transformers(runtime, demo_f32, demo_tasks, reference):
    for task, scores in zip(demo_tasks, score_tasks(demo_f32, demo_tasks, threads=2, progress=False), strict=True):
        wanted = expected(reference, task)
        np.testing.assert_allclose(flat(scores), flat(wanted), atol=0.02)
        assert scores.greedy == wanted.greedy and scores.truncated == 0
        for metric, right in correct(task.items, wanted).items():
            np.testing.assert_array_equal(correct(task.items, scores)[metric], right)
    assert any(g for item in wanted.greedy for g in item) and not all(g for item in wanted.greedy for g in item)


@pytest.mark.runtime
@pytest.mark.golden
def test_real_items(runtime, shared, demo_f32, reference):
    found = [read_task(shared / "data" / "tasks" / f"{name}.jsonl", 8) for name in ("piqa", "arc_easy", "lambada")]
    for task, scores in zip(found, score_tasks(demo_f32, found, threads=2, progress=False), strict=True):
        wanted = expected(reference, task)
        np.testing.assert_allclose(flat(scores), flat(wanted), atol=0.05)
        assert scores.greedy == wanted.greedy


@pytest.mark.runtime
@pytest.mark.golden
@pytest.mark.parametrize("recurrent", [False, True])
def test_long_items_and_models_that_keep_a_state(runtime, demo_f32, demo_tasks, reference, monkeypatch, recurrent):
    """A model that sees 16 tokens; and nothing shared between sequences, as a recurrent model needs it."""

    class Short(Llama):
        def __init__(self, library: Path, model: Path) -> None:
            super().__init__(library, model)
            self.n_ctx_train, self.recurrent = 16, recurrent

    monkeypatch.setattr(scorer, "Llama", Short)
    task = demo_tasks[0]
    requests = [(item.context, [" " + c for c in item.choices]) for item in task.items]
    scores, truncated = scorer.score(library_path("llama"), demo_f32, requests, 2, lambda n: None)
    wanted = flat(expected(reference, task, max_length=16))
    np.testing.assert_allclose([x for s in scores for x in s.logprobs], wanted, atol=0.02)
    assert 0 < len(truncated) < len(task.items)
    assert np.abs(wanted - flat(expected(reference, task))).max() > 1


@pytest.mark.runtime
@pytest.mark.e2e
def test_evaluation_of_tasks_alone(runtime, demo_base, demo_tasks, tmp_path):
    out = tmp_path / "q2.gguf"
    run_tool(["llama-quantize", demo_base, out, "Q2_K", "2"])
    found = evaluate(out, demo_base, [], [t.path for t in demo_tasks], items=4, threads=2, progress=False)
    assert found.quality is None and [t.task.name for t in found.tasks] == ["choices", "words"]
    assert [len(t.task.items) for t in found.tasks] == [4, 4]
    for t in found.tasks:
        assert np.abs(flat(t.base) - flat(t.out)).max() > 0.1
    lines = room.describe(found).splitlines()
    assert lines[2].startswith("tasks ") and "  choices: only 4 of 7 items, evenly spaced over the file" in lines
    assert "quality" not in room.to_json(found) and len(room.to_json(found)["tasks"]) == 2


@pytest.mark.runtime
def test_what_cannot_be_scored(runtime, demo_base, demo_tasks, file, tmp_path):
    long = {"context": "Once", "choices": ["and then " * 1500, "a"], "label": 1}
    path = file("long.jsonl", CHOICES[0], "", long)
    with pytest.raises(UserError, match=r"long.jsonl line 3 cannot be scored: ' and then .*'\.{3} takes \d+ tokens; the model sees 2048"):
        score_tasks(demo_base, [*demo_tasks, read_task(path)], threads=2, progress=False)
    crowd = {"context": "Once", "choices": [f"the number {i}" for i in range(300)], "label": 1}
    with pytest.raises(UserError, match=r"crowd.jsonl line 2 cannot be scored: it has 300 choices; llama.cpp runs 256 sequences"):
        score_tasks(demo_base, [read_task(file("crowd.jsonl", CHOICES[0], crowd))], threads=2, progress=False)
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(demo_base.read_bytes()[:-100000])
    with pytest.raises(UserError, match=r"llama.cpp cannot load .*broken.gguf: .*not within the file bounds") as e:
        score_tasks(broken, demo_tasks, threads=2, progress=False)
    assert "\n" not in str(e.value)


@pytest.mark.runtime
def test_other_libraries_are_refused(runtime, demo_base, monkeypatch):
    with pytest.raises(UserError, match=r"cannot use .*ggml-base.* as libllama .*llama_log_set.*runtime install"):
        Llama(library_path("ggml-base"), demo_base)
    monkeypatch.setitem(libllama._CONTEXT_DEFAULTS, "type_k", 30)
    with pytest.raises(UserError, match=r"libllama.* is not of the llama.cpp that this rq-gguf knows \(type_k is not where it was\)"):
        Llama(library_path("llama"), demo_base)


def test_threads():
    assert 1 <= tasks.default_threads() <= (os.cpu_count() or 1)
