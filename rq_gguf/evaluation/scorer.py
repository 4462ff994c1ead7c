"""The program that scores continuations with libllama: `python -m rq_gguf.evaluation.scorer REQUEST.json ANSWER.json`.

A process of its own, since libllama ends its process where an assertion fails. It prints how many items are done, line by line.
Tokens, lengths and truncation are as in lm-evaluation-harness (lm_eval/api/model.py and lm_eval/models/huggingface.py, version 0.4).
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rq_gguf.errors import UserError
from rq_gguf.evaluation.libllama import Batch, Llama

BATCH_TOKENS = 512
"""Tokens decoded together, of several items: llama.cpp's physical batch. More would only attend to more of other items' tokens."""
BATCH_SEQUENCES = 128
STATES = 4
"""Sequences at a time where each has a state of its own, which may take 100 MB and more."""


class ItemError(UserError):
    """An item that cannot be scored; `item` is its number in the request."""

    def __init__(self, item: int, message: str) -> None:
        super().__init__(message)
        self.item = item


@dataclass(frozen=True)
class Group:
    """Continuations of one item behind one prefix, which is decoded once for all of them."""

    item: int
    choices: tuple[int, ...]
    """[n] their numbers in the item."""
    prefix: Sequence[int]
    """Tokens, one at least."""
    continuations: tuple[Sequence[int], ...]
    """[n] tokens, one at least in each."""

    @property
    def n_tokens(self) -> int:
        """Tokens to be decoded: the last of a continuation is only predicted."""
        return len(self.prefix) + sum(len(c) - 1 for c in self.continuations)

    @property
    def n_sequences(self) -> int:
        return max(1, sum(len(c) > 1 for c in self.continuations))


@dataclass
class Score:
    """What the model makes of one item's continuations."""

    logprobs: list[float]
    """[n_choices] sums over tokens, in nats."""
    greedy: list[bool]
    """[n_choices] whether each token was the most likely."""


@dataclass
class Encoder:
    """Turns texts into groups of tokens that fit a model."""

    tokenize: Callable[[str], list[int]]
    bos: int | None
    """Begins every text where there is one."""
    start_token: int | None
    """Stands for an empty context."""
    max_length: int
    """Tokens that the model was trained to see: longer items are cut from the left, BOS included, as lm-evaluation-harness does."""
    share: bool
    """Whether sequences may share a prefix."""
    truncated: list[int] = field(default_factory=list)
    """Items that were cut so far."""

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Tokens of the context, and those of both together behind as many: spaces at the context's end go to the continuation."""
        if not context:
            return ([] if self.start_token is None else [self.start_token]), self.tokenize(continuation)
        begin = [] if self.bos is None else [self.bos]
        head = begin + self.tokenize(context.rstrip())
        return head, (begin + self.tokenize(context + continuation))[len(head) :]

    def groups(self, item: int, context: str, continuations: Sequence[str]) -> list[Group]:
        """An item's groups: one, or one per continuation where the prefix cannot be shared.

        Raises ItemError for a continuation that has no token of its own, or more than the model can see.
        """
        pairs = [self.pair(context, c) for c in continuations]
        for text, (head, tail) in zip(continuations, pairs, strict=True):
            if not head:
                raise ItemError(item, "the context is empty and the model has no token that begins a text")
            if not tail:
                raise ItemError(item, f"{text!r} adds no token to its context")
            if len(tail) > self.max_length:
                raise ItemError(item, f"{text[:40]!r}... takes {len(tail)} tokens; the model sees {self.max_length}")
        longest = max(len(head) + len(tail) for head, tail in pairs)
        if longest <= self.max_length + 1 and self.share:
            return [Group(item, tuple(range(len(pairs))), pairs[0][0], tuple(tail for _, tail in pairs))]
        if longest > self.max_length + 1:
            self.truncated.append(item)
        return [Group(item, (i,), head[-(self.max_length + 1 - len(tail)) :], (tail,)) for i, (head, tail) in enumerate(pairs)]


def pack(groups: Iterable[Group], n_tokens: int, n_sequences: int) -> Iterator[list[Group]]:
    """Batches of consecutive groups that fit; a group that is larger by itself gets its own."""
    batch: list[Group] = []
    tokens = sequences = 0
    for group in groups:
        if batch and (tokens + group.n_tokens > n_tokens or sequences + group.n_sequences > n_sequences):
            yield batch
            batch, tokens, sequences = [], 0, 0
        batch.append(group)
        tokens, sequences = tokens + group.n_tokens, sequences + group.n_sequences
    if batch:
        yield batch


@dataclass(frozen=True)
class Wanted:
    """Where in a batch's logits a continuation's probabilities are."""

    item: int
    choice: int
    rows: list[int]
    """[n] rows of the logits that predict its tokens."""
    tokens: Sequence[int]
    """[n]"""


def assemble(groups: Sequence[Group]) -> tuple[Batch, list[Wanted]]:
    """The batch that decodes groups, and what to read from it: the prefix's last token predicts the first of each continuation."""
    tokens: list[int] = []
    positions: list[int] = []
    sequences: list[tuple[int, ...]] = []
    outputs: list[int] = []
    wanted: list[Wanted] = []
    n_rows = n_sequences = 0
    for group in groups:
        n, length = group.n_sequences, len(group.prefix)
        tokens += group.prefix
        positions += range(length)
        sequences += [tuple(range(n_sequences, n_sequences + n))] * length
        outputs += [0] * (length - 1) + [1]
        first_row, n_rows = n_rows, n_rows + 1
        sequence = n_sequences
        for choice, continuation in zip(group.choices, group.continuations, strict=True):
            fed = continuation[:-1]
            tokens += fed
            positions += range(length, length + len(fed))
            sequences += [(sequence,)] * len(fed)
            outputs += [1] * len(fed)
            wanted.append(Wanted(group.item, choice, [first_row, *range(n_rows, n_rows + len(fed))], continuation))
            n_rows += len(fed)
            sequence += bool(fed)
        n_sequences += n
    return Batch(np.array(tokens, np.int32), np.array(positions, np.int32), sequences, np.array(outputs, np.int8)), wanted


def read(logits: NDArray[np.float32], wanted: Sequence[Wanted], scores: dict[int, Score]) -> None:
    """Put log-probabilities from logits [rows, n_vocab] into the items' scores. Raises ItemError where they are not finite."""
    highest = logits.max(axis=1)
    best = logits.argmax(axis=1)
    # Row by row: vocabularies are large.
    normalizer = [float(m) + float(np.log(np.exp(row - m).sum(dtype=np.float64))) for row, m in zip(logits, highest, strict=True)]
    for w in wanted:
        logprob = sum(float(logits[r, t]) - normalizer[r] for r, t in zip(w.rows, w.tokens, strict=True))
        if not np.isfinite(logprob):
            raise ItemError(w.item, "the model gives probabilities that are not finite")
        scores[w.item].logprobs[w.choice] = logprob
        scores[w.item].greedy[w.choice] = all(best[r] == t for r, t in zip(w.rows, w.tokens, strict=True))


def score(
    library: Path, model: Path, items: Sequence[tuple[str, Sequence[str]]], threads: int, done: Callable[[int], None]
) -> tuple[list[Score], list[int]]:
    """Score items, each a context and the continuations behind it: their scores, and the numbers of those that were truncated.

    done: gets the number of items that are done, now and then.
    Raises UserError, as ItemError where an item is to blame.
    """
    with Llama(library, model) as llama:
        encoder = Encoder(llama.tokenize, llama.bos, llama.start_token, llama.n_ctx_train, share=not llama.recurrent)
        groups = [g for i, (context, continuations) in enumerate(items) for g in encoder.groups(i, context, continuations)]
        n_tokens = max(BATCH_TOKENS, *(g.n_tokens for g in groups))
        n_sequences = min(llama.max_sequences, max(BATCH_SEQUENCES, *(g.n_sequences for g in groups))) if encoder.share else STATES
        crowded = next((g for g in groups if g.n_sequences > n_sequences), None)
        if crowded:
            raise ItemError(crowded.item, f"it has {len(crowded.continuations)} choices; llama.cpp runs {n_sequences} sequences at a time")
        llama.start(n_tokens, n_sequences, threads)
        scores = {i: Score([0.0] * len(c), [False] * len(c)) for i, (_, c) in enumerate(items)}
        for batch in pack(groups, BATCH_TOKENS, n_sequences):
            tokens, wanted = assemble(batch)
            read(llama.decode(tokens), wanted, scores)
            done(batch[-1].item + 1)
    return [scores[i] for i in range(len(items))], encoder.truncated


def main(request: Path, answer: Path) -> None:
    data = json.loads(request.read_text(encoding="utf-8"))
    try:
        scores, truncated = score(
            Path(data["library"]), Path(data["model"]), data["items"], data["threads"], lambda n: print(n, flush=True)
        )
        result = {"logprobs": [s.logprobs for s in scores], "greedy": [s.greedy for s in scores], "truncated": truncated}
    except ItemError as e:
        result = {"error": str(e), "item": e.item}
    except UserError as e:
        result = {"error": str(e)}
    answer.write_text(json.dumps(result), encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
