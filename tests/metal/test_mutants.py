"""The cases find faults: each of these, put into what the series adds, makes the case named with it fail.

All faults are compiled into one program, which turns on the one that a case asks for.
"""

import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from metal import build
from metal.cases import run_cases
from metal.test_multiply import MOST_CPU, most_exact

KERNELS, HOST = build.TIERS_KERNELS, build.TIERS_HOST

MV = "op=tiers types=q8_0:3+q4_0:3+q6_K:2 used=3 tokens=8 m=33 k=512 schedules=0,1,2,3"
MV_SKIP = f"{MV} skip=1"
MM = "op=tiers types=q8_0:3+q4_K:4+q6_K:2 used=2 tokens=70 m=33 k=256 schedules=0,1,2,3"
MM_SKIP = f"{MM} skip=1"
MM_SCALE = f"{MM} prec=1 scale=200000"
MM_ONE = "op=tiers types=q8_0:1+q4_K:2 used=1 tokens=70 m=33 k=256 only=0 schedules=0,1,2,3"
MM_MANY = "op=tiers types=q8_0:200+q4_K:100 used=8 tokens=150 m=5 k=256 schedules=1,2"
PAIR_SKIP = "op=pair types=q8_0:3+q4_K:3 used=2 tokens=33 m=33 k=256 skip=1 schedules=0,1,2,3"
PAIR_OTHER = "op=pair types=q8_0:3+q4_K:3 used=2 tokens=33 m=33 k=256 other_ids=1 schedules=0,1,2,3"
REMAP = "op=remap experts=40 used=4 tokens=100 slots=3 block=2 schedules=0,1,2,3"
REMAP_LONG = "op=remap experts=100 used=8 tokens=400 slots=3 block=2 schedules=0,1,2,3"
REMAP_LOCAL = "op=remap experts=40 used=4 tokens=10 slots=3 block=16 schedules=0,1,2,3"
REMAP_LIMIT = "op=remap experts=4 used=4 tokens=17 slots=3 block=16 schedules=0,1,2,3"


@dataclass(frozen=True)
class Mutant:
    """A fault: in `place`, a pattern that the file has once, the expression `old` becomes `new`."""

    name: str
    file: str
    place: str
    old: str
    new: str
    case: str


BARRIER = r"threadgroup_barrier(mem_flags::mem_threadgroup)"


SAME_IDS = "a->src[GGML_TIERS_SRC_IDS] != b->src[GGML_TIERS_SRC_IDS]"


def barrier(kernel: str, number: int) -> str:
    """The text of a kernel up to its barrier of this number."""
    return rf"kernel void {kernel}\(" + r".*?threadgroup_barrier\(mem_flags::mem_threadgroup\)" * (number + 1)


def text(place: str) -> str:
    return re.escape(place)


MUTANTS = (
    Mutant("rank off by one", KERNELS, text("const int turn = rank++/"), "rank++", "++rank", REMAP),
    Mutant("instances begin at their number", KERNELS, text("row[1 + turn%row[0]]"), "1 + turn%row[0]", "turn%row[0]", REMAP),
    Mutant("maps overwrite each other", KERNELS, text("dst[im*args.nrows + ir0 + i]"), "im*args.nrows", "0", REMAP),
    Mutant("ids of the remap unguarded", KERNELS, barrier("kernel_expert_remap_i32", 0), BARRIER, "void()", REMAP),
    Mutant("ids of the remap replaced early", KERNELS, barrier("kernel_expert_remap_i32", 1), BARRIER, "void()", REMAP_LONG),
    Mutant("first instance off by one", KERNELS, text("+ ide)*args.ne10 + 1]"), "1", "0", REMAP_LOCAL),
    Mutant("ids of the sort unguarded", KERNELS, barrier("kernel_mul_mm_tiers_map0", 0), BARRIER, "void()", MM_MANY),
    Mutant("ids of the sort replaced early", KERNELS, barrier("kernel_mul_mm_tiers_map0", 1), BARRIER, "void()", MM_MANY),
    Mutant("sorted row off by one", KERNELS, text("ids_i32[n_all++] = ir0 + i;"), "ir0 + i", "ir0 + i + 1", MM),
    Mutant("count of rows off by one", KERNELS, text("((device uint32_t *) htpe)[ide] = n_all;"), "n_all", "n_all - 1", MM),
    Mutant("stride of the sorted rows", KERNELS, text("(uint64_t) ide*args.ne21;"), "args.ne21", "args.ne20", MM),
    Mutant("rows of no expert stay in prefill", KERNELS, text("[ir%args.ne20] >= 0"), "0", "-1", MM_SKIP),
    Mutant("only the first result is zeroed", KERNELS, text("if (args.n_dst > 1)"), "args.n_dst > 1", "false", PAIR_SKIP),
    Mutant("no early return for rows of no expert", KERNELS, text("if (id < 0) {"), "id < 0", "false", MV_SKIP),
    Mutant("last row of no expert stays", KERNELS, text("i < args.nr0 && (int) tgpig.x"), "args.nr0", "args.nr0 - 1", MV_SKIP),
    Mutant("expert not counted from its tier", KERNELS, text("(id - args.first[it])*args.nb02[it]"), "id - args.first[it]", "id", MV),
    Mutant(
        "first expert taken for the tier before", KERNELS, text("if (id >= args.first[1])"), "id >= args.first[1]", "id > args.first[1]", MV
    ),
    Mutant("third tier missed", KERNELS, text("if (id >= args.first[2])"), "id >= args.first[2]", "false", MV),
    Mutant("stride of another tier", KERNELS, text("/*.nb01 =*/ args.nb01[it]"), "args.nb01[it]", "args.nb01[0]", MV),
    Mutant("activations of slot 0 for all", KERNELS, text("(idx%args.ne11)*args.nb11"), "idx%args.ne11", "0", MV),
    Mutant("strides of tokens and slots swapped", KERNELS, text("+ iid1*args.nb12;"), "args.nb12", "args.nb11", MV),
    Mutant("last row lost", KERNELS, text("if (ic*nr0_call >= args.ne01)"), "args.ne01", "args.ne01 - 1", MV),
    Mutant("rows of a threadgroup", KERNELS, text("const int ic = tgpig.x*n_calls + i;"), "tgpig.x*n_calls", "tgpig.x", MV),
    Mutant("stride of the result", KERNELS, text("(uint64_t) tgpig.z*args.ne01*sizeof(float)"), "args.ne01", "args.nr0", MV),
    Mutant("no barrier after the sort", HOST, text("tiers_barrier(ctx);\n\n    if (use_amax)"), "tiers_barrier(ctx)", "void()", MM),
    Mutant("no barrier after the factors", HOST, text("tiers_barrier(ctx);\n    }"), "tiers_barrier(ctx)", "void()", MM_SCALE),
    Mutant(
        "counts of the wrong experts", HOST, text("bid_tpe_cur.offs += sizeof(int32_t)*tier->ne[2];"), "tier->ne[2]", "tier->ne[2] - 1", MM
    ),
    Mutant("rows of the wrong experts", HOST, text("bid_ids_cur.offs += sizeof(int32_t)*tier->ne[2]*ids->ne[1];"), "ids->ne[1]", "1", MM),
    Mutant("no room for the sorted rows", HOST, text("tiers_extra_tpe(op) + tiers_extra_ids(op) +"), "tiers_extra_ids(op)", "0", MM_MANY),
    Mutant("no room for the factors", HOST, text("+ tiers_extra_amax();"), "tiers_extra_amax()", "0", MM_SCALE),
    Mutant("second result is the first", HOST, text("tiers_get_buffer_id(nodes[n_nodes - 1]), 5"), "n_nodes - 1", "0", PAIR_SKIP),
    Mutant("last expert of a tier left out", HOST, text("(args.ne0 + 63)/64, args.ne02, 128"), "args.ne02", "args.ne02 - 1", MM),
    Mutant("last tile of tokens left out", HOST, text("(args.ne21 + 31)/32"), "args.ne21 + 31", "args.ne21", MM_ONE),
    Mutant(
        "last threadgroup of the sort left out",
        HOST,
        text("const int n_map = (n_phys + nth - 1)/nth;"),
        "n_phys + nth - 1",
        "n_phys",
        MM_MANY,
    ),
    Mutant(
        "factors not computed", HOST, r"const bool use_amax = [^;]*;", "ggml_get_op_params_i32(op, 3) == GGML_PREC_F32", "false", MM_SCALE
    ),
    Mutant("remap taken for local", HOST, text("ids->ne[1] <= block;"), "ids->ne[1] <= block", "ids->ne[1] <= block + 1", REMAP_LIMIT),
    Mutant("tiers one expert apart", HOST, text("first += tier->ne[2];"), "tier->ne[2]", "1", MV),
    Mutant(
        "rows per threadgroup of the last tier", HOST, text("std::max(nr0,  params.nr0)"), "std::max(nr0,  params.nr0)", "params.nr0", MV
    ),
    Mutant(
        "threadgroup memory of the last tier", HOST, text("std::max(smem, params.smem)"), "std::max(smem, params.smem)", "params.smem", MV
    ),
    Mutant("pairs of other rows sorted once", HOST, text(SAME_IDS), SAME_IDS, "false", PAIR_OTHER),
)
LEAST = 20


def edit(file: str, source: str) -> str:
    """The file with all its faults, each a choice that `mtl_mutant` makes."""
    for number, mutant in enumerate(MUTANTS, 1):
        if mutant.file != file:
            continue
        places = list(re.finditer(mutant.place, source, re.DOTALL))
        assert len(places) == 1, f"{mutant.name}: its place occurs {len(places)} times in {file}"
        at = source.rindex(mutant.old, *places[0].span())
        choice = f"(::mtl_mutant == {number} ? ({mutant.new}) : ({mutant.old}))"
        source = source[:at] + choice + source[at + len(mutant.old) :]
    return ("extern int mtl_mutant;\n" if file == HOST else "") + source


@pytest.fixture(scope="session")
def mutants(tree: build.Tree, home: Path) -> Path:
    """The harness with all faults in it, none turned on."""
    return build.build(tree, home, edit)


def failure(program: Path, case: str, number: int) -> str:
    (outcome,) = run_cases(program, [f"{case} mutant={number}"], workers=1)
    return outcome.failure(MOST_CPU, most_exact(outcome))


def test_without_a_fault_the_cases_pass(mutants: Path) -> None:
    cases = sorted({m.case for m in MUTANTS})
    assert [f for case in cases if (f := failure(mutants, case, 0))] == []


@pytest.mark.parametrize("number", range(1, len(MUTANTS) + 1), ids=[m.name for m in MUTANTS])
def test_fault_is_caught(mutants: Path, number: int) -> None:
    assert failure(mutants, MUTANTS[number - 1].case, number)


def test_there_are_enough_faults() -> None:
    assert len(MUTANTS) >= LEAST
