"""A user's choices for a plan, from text to checked values."""

from dataclasses import dataclass
from pathlib import Path

from rq_gguf.errors import UserError
from rq_gguf.gguf_file import total_size
from rq_gguf.planning.budget import Budget, parse_budget, parse_size
from rq_gguf.planning.policy import POLICIES, parse_balance_weight, parse_max_tiers, parse_replicas, parse_target_kld
from rq_gguf.types import LADDER, PAPER_TYPES, parse_types, rank
from rq_gguf.writing.source import Source


@dataclass(frozen=True)
class Choices:
    """A user's choices for a plan, checked. Make one with `check_choices`."""

    budget: Budget
    types: tuple[str, ...]
    """Empty where the user named none: `types_for` fills them in."""
    replicas: str | int
    policy: str
    max_tiers: int
    balance_weight: float
    target_kld: float | None
    """Nats; the budget does not count then."""


def check_choices(
    budget: str,
    types: str | None,
    replicas: str,
    policy: str,
    max_tiers: str | None = None,
    balance_weight: str | None = None,
    target_kld: str | None = None,
) -> Choices:
    """types, max_tiers, balance_weight, target_kld: None where the user named none. Raises UserError for a choice that cannot be
    understood."""
    if policy not in POLICIES:
        raise UserError(f"--policy {policy} is unknown; choose {' or '.join(POLICIES)}")
    if target_kld is not None and policy == "paper":
        raise UserError("--policy paper looks at no error; --target-kld needs --policy budget")
    copies = parse_replicas(replicas, policy)
    return Choices(
        parse_budget(measure_like(budget)),
        parse_types(types) if types else (),
        copies,
        policy,
        parse_max_tiers(max_tiers, policy),
        parse_balance_weight(balance_weight, policy, copies),
        None if target_kld is None else parse_target_kld(target_kld),
    )


def parse_memory(text: str | None) -> int | None:
    """Bytes of a user's `--max-memory`, None where there is none. Raises UserError for what is no size."""
    if text is None:
        return None
    size = parse_size(text)
    if size is None:
        raise UserError(f"--max-memory {text} is not understood; give a size such as 4GB or 900MiB")
    return size


def measure_like(budget: str) -> str:
    """A `--budget like:FILE` with the file's bytes, as budget.parse_budget takes it; other budgets as they are.

    Raises UserError where the file is no GGUF.
    """
    kind, separator, name = budget.strip().partition(":")
    if kind.lower() != "like" or not separator:
        return budget
    path = Path(name).expanduser()
    try:
        return f"like:{path.name} ({total_size(path)} bytes)"
    except UserError as e:
        raise UserError(f"--budget {budget}: {e}; give a GGUF whose size is to be met") from e


def types_for(choices: Choices, measured: tuple[str, ...], source: Source | None) -> tuple[str, ...]:
    """The types that experts may take: the user's, or else what fits the policy, the calibration and the base model.

    measured: those of a finished calibration file, empty where there is none.
    """
    if choices.types:
        return choices.types
    if choices.policy == "paper":
        return PAPER_TYPES
    if measured:
        return measured
    if source is not None and {t.type for matrices in source.experts.values() for t in matrices.values()} == {"mxfp4"}:
        # Nothing is more precise than the type that the weights come in.
        return (*(t for t in LADDER if rank(t) < rank("mxfp4")), "mxfp4")
    return LADDER
