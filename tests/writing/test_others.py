"""All tensors but the routed experts: llama-quantize's types and bytes, and what is refused."""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from writing.samples import STORED, base_model, calibration_of, uniform_plan

from rq_gguf import format as fmt
from rq_gguf.calibration.data import Calibration
from rq_gguf.calibration.file import write_calibration
from rq_gguf.errors import UserError
from rq_gguf.ggml import Ggml
from rq_gguf.gguf_file import Tensor, read_header
from rq_gguf.runtime import tools
from rq_gguf.writing.inspect import inspect
from rq_gguf.writing.others import Others, file_type_of, fixed_bytes, importance_rows, parse_dry_run, parse_others, stored_types
from rq_gguf.writing.source import Source
from rq_gguf.writing.write import write_model


def test_parse_dry_run():
    text = """
llama_model_loader: - type bf16:   29 tensors
[   1/  42] output_norm.weight                   - [   256,      1,      1,      1], type =    f32, size =    0.001 MiB
[   2/  42] token_embd.weight                    - [   256,  16384,      1,      1], type =   bf16, size =  8.00 MiB ->  4.25 MiB (q8_0)
[   3/  42] blk.10.a_name_that_is_wider_than_its_column.weight - [48,  1,  1,  1], type = bf16, size = 8.00 MiB -> 4.25 MiB (q4_K)
llama_model_quantize_impl: model size  =    33.57 MiB (16.02 BPW)
"""
    assert parse_dry_run(text) == {
        "output_norm.weight": "f32",
        "token_embd.weight": "q8_0",
        "blk.10.a_name_that_is_wider_than_its_column.weight": "q4_k",
    }


@pytest.mark.runtime
@pytest.mark.parametrize(("stored", "embedding"), [("bf16", "q8_0"), ("q8_0", "q8_0")])
def test_stored_types(tmp_path, runtime, stored, embedding):
    """llama-quantize's choice: matrices to Q8_0, norms and routers as they are, experts not listed."""
    with Source(base_model(tmp_path / "base.gguf", stored=stored, layers=(0,), bias=True)) as source:
        assert stored_types(source) == {
            "token_embd.weight": embedding,
            "output_norm.weight": "f32",
            "blk.0.attn_norm.weight": "f32",
            "blk.0.attn_q.weight": "q8_0",
            "blk.0.ffn_gate_inp.weight": "f32",
            "blk.0.ffn_down_exps.bias": "f32",
        }


@pytest.mark.runtime
def test_quantized_tensors_stay(tmp_path, runtime):
    """A Q6_K embedding beside Q8_0 experts is not quantized a second time."""
    path = base_model(tmp_path / "base.gguf", stored="q8_0", layers=(0,))
    reader = GGUFReader(path)
    writer = gguf.GGUFWriter(tmp_path / "mixed.gguf", "llama")
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(key, field.contents(), field.types[0], sub)
    for t in reader.tensors:
        if t.name == "token_embd.weight":
            writer.add_tensor(t.name, np.zeros((64, 210), dtype=np.uint8), raw_dtype=STORED["q6_k"])
        else:
            writer.add_tensor(t.name, t.data, raw_dtype=t.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with Source(tmp_path / "mixed.gguf") as source:
        assert stored_types(source)["token_embd.weight"] == "q6_k"


def test_parse_others():
    assert parse_others() == Others("Q8_0", ())
    assert parse_others("q4_k", ["Attn_V=Q6_K", "output=f16"]) == Others("Q4_K_M", (("attn_v", "q6_k"), ("output", "f16")))
    assert parse_others("q8_0", ["b=q6_k"]).texts == ("b=q6_k",)
    for other, tensor_types, words in (
        ("Q9", [], "--other Q9 is unknown; it can be F32, F16, Q4_0"),
        ("COPY", [], "--other COPY is unknown"),
        ("Q8_0", ["attn_v"], "--tensor-type attn_v is not understood; give REGEX=TYPE"),
        ("Q8_0", ["=q8_0"], "is not understood"),
        ("Q8_0", ["attn_v="], "unknown type ''"),
        ("Q8_0", ["attn_v=q4_k_m"], "unknown type 'q4_k_m'"),
        ("Q8_0", ["attn_(v=q6_k"], "'attn_\\(v' is no regular expression"),
    ):
        with pytest.raises(UserError, match=words):
            parse_others(other, tensor_types)


@pytest.fixture(scope="module")
def base(runtime, tmp_path_factory) -> Path:
    """A model with tensors that llama-quantize treats apart, one of them three-dimensional."""
    rng = np.random.default_rng(5)
    shapes = {
        "output.weight": (64, 256),
        "blk.0.attn_v.weight": (128, 256),
        "blk.1.attn_v.weight": (128, 256),
        "blk.0.attn_k_b.weight": (3, 32, 256),
        "blk.1.attn_output.weight": (256, 256),
        "blk.1.attn_k.weight": (64, 320),  # rows that no K-quant fits
    }
    extra = {name: (0.1 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return base_model(tmp_path_factory.mktemp("others") / "base.gguf", extra=extra)


def observed(source: Source) -> Calibration:
    """A calibration that knows every matrix but the embedding."""
    rng = np.random.default_rng(6)
    c = calibration_of(source)
    dense = {
        name: (rng.uniform(0.1, 9, t.n_rows // t.ne[1] * t.cols) * c.n_tokens).astype(np.float32)
        for name, t in source.tensors.items()
        if len(t.ne) > 1 and fmt.parse_expert_name(name) is None and name != "token_embd.weight" and name.endswith(".weight")
    }
    return replace(c, dense_in_sum2=dense)


@pytest.mark.runtime
@pytest.mark.golden
@pytest.mark.parametrize(
    ("other", "tensor_types"),
    [
        ("Q4_K_M", []),
        ("Q3_K_M", ["attn_k_b=q6_k", "blk.0.ATTN_V=iq3_xxs", "attn_v=q2_k"]),
        ("IQ3_XXS", []),  # depends on an imatrix being there
        ("Q4_0", ["output.weight=q8_0"]),
        ("BF16", []),
    ],
)
def test_same_bytes_as_llama_quantize(tmp_path, base, other, tensor_types):
    """Types and bytes of every other tensor, importance rows included."""
    others = parse_others(other, tensor_types)
    with Source(base) as source:
        calibration, plan = observed(source), uniform_plan(source, "q8_0")
        types = stored_types(source, others)
        most = fixed_bytes(source, types, 1, others)
    write_calibration(tmp_path / "imatrix.gguf", calibration)
    report = write_model(base, plan, calibration, tmp_path / "ours.gguf", ggml=Ggml(tools.library_path()), others=others)
    options = [word for text in tensor_types for word in ("--tensor-type", text)]
    tools.run_tool(["llama-quantize", "--imatrix", tmp_path / "imatrix.gguf", *options, base, tmp_path / "theirs.gguf", other])
    ours, theirs = read_header(tmp_path / "ours.gguf"), read_header(tmp_path / "theirs.gguf")
    compared = 0
    for name, t in theirs.tensors.items():
        if fmt.parse_expert_name(name) is None:
            mine = ours.tensors[name]
            assert mine.type == t.type == types[name], name
            a, b = (h.path.read_bytes()[x.offset : x.offset + x.n_bytes] for h, x in ((ours, mine), (theirs, t)))
            assert a == b, name
            compared += 1
    assert compared == len(types)
    assert ours.get("quantize.imatrix.entries_count") == theirs.get("quantize.imatrix.entries_count")
    assert report.other_bytes <= most <= report.other_bytes + (1 << 15)
    provenance = inspect(tmp_path / "ours.gguf").provenance
    assert provenance["rq.other"] == other
    assert provenance.get("rq.tensor_types", []) == [t.lower() for t in tensor_types]


@pytest.mark.runtime
def test_what_importance_rows_do(base):
    """A q4_k matrix is another with its inputs than without; of three-dimensional tensors each matrix has its own."""
    with Source(base) as source:
        calibration = observed(source)
        types = stored_types(source, parse_others("Q4_K_S"))
        rows = importance_rows(source, types, calibration)
        assert rows["blk.0.attn_k_b.weight"].shape == (3, 256) and rows["blk.0.attn_q.weight"].shape == (1, 256)
        assert rows.keys() == {n for n, t in types.items() if t not in ("f32", "bf16")} - {"token_embd.weight"}
        sums = calibration.dense_in_sum2["blk.0.attn_k_b.weight"]
        np.testing.assert_array_equal(rows["blk.0.attn_k_b.weight"][1], sums[256:512] / np.float32(calibration.n_tokens))
        assert importance_rows(source, types, replace(calibration, dense_in_sum2={})) == {}
        wrong = replace(calibration, dense_in_sum2={"blk.0.attn_q.weight": np.ones(7, np.float32)})
        with pytest.raises(UserError, match=r"the calibration has 7 inputs of blk.0.attn_q.weight, .* needs 256"):
            importance_rows(source, types, wrong)
        low = stored_types(source, parse_others("Q8_0", ["attn_q=iq2_s"]))
        with pytest.raises(UserError, match=r"blk.0.attn_q.weight cannot be iq2_s, which needs an importance row"):
            importance_rows(source, low, replace(calibration, dense_in_sum2={}))
        assert importance_rows(source, stored_types(source), calibration)["output.weight"].shape == (1, 256)


@pytest.mark.runtime
@pytest.mark.parametrize(
    ("other", "tensor_types", "words"),
    [
        ("Q8_0", ["attn_z=q6_k"], "--tensor-type attn_z=q6_k matches no tensor of .*base.gguf"),
        ("Q8_0", ["ffn_down=q6_k"], "matches blk.0.ffn_down_exps.weight: the plan decides the types of routed experts"),
        ("Q8_0", ["gate_inp=q8_0"], "changes nothing: it matches blk.0.ffn_gate_inp.weight, but llama-quantize keeps it in f32"),
        ("F16", ["attn_q=q8_0"], "changes nothing: it matches blk.0.attn_q.weight, but llama-quantize keeps it in f16 in a file of F16"),
        ("Q8_0", ["attn=q6_k", "attn_q=q4_k"], "--tensor-type attn_q=q4_k changes nothing: .* an earlier one matches it too"),
    ],
)
def test_tensor_types_in_vain(base, other, tensor_types, words):
    with Source(base) as source, pytest.raises(UserError, match=words):
        stored_types(source, parse_others(other, tensor_types))


@pytest.mark.runtime
def test_a_quantized_base_is_not_quantized_again(tmp_path, runtime):
    with Source(base_model(tmp_path / "base.gguf", stored="q8_0")) as source:
        assert stored_types(source, parse_others("Q8_0", ["attn_q=q8_0"]))["blk.0.attn_q.weight"] == "q8_0"
        for other, tensor_types in (("Q4_K_M", []), ("F16", []), ("Q8_0", ["attn_q=q6_k"])):
            with pytest.raises(UserError, match=r"is q8_0 already and would be quantized a second time, to (q4_k|q6_k|f16); give an F16"):
                stored_types(source, parse_others(other, tensor_types))


def test_file_type():
    """Of the type that most weights have, however many tensors they are in."""
    small = [Tensor(f"blk.{i}.attn_q.weight", "q8_0", (256, 4)) for i in range(9)]
    assert file_type_of([*small, Tensor("blk.0.ffn_up_exps.0.weight", "q4_k", (256, 64, 8))]) == gguf.LlamaFileType.MOSTLY_Q4_K_M
    assert file_type_of([*small, Tensor("blk.0.ffn_up_exps.0.weight", "iq3_s", (256, 4, 8))]) == gguf.LlamaFileType.MOSTLY_Q8_0
    for kind, number in (("mxfp4", "MXFP4_MOE"), ("bf16", "BF16"), ("iq4_xs", "IQ4_XS"), ("q3_k", "Q3_K_M")):
        assert file_type_of([Tensor("x", kind, (256, 1))]) == gguf.LlamaFileType[f"MOSTLY_{number}"]
    assert file_type_of([Tensor("x", "f32", (256, 1))]) == gguf.LlamaFileType.ALL_F32
    assert file_type_of([Tensor("x", "i32", (256, 1))]) is None
