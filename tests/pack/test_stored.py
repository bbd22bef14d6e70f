"""What a server puts into one layer is found in a packed folder, taken part by part, and checked."""

import pytest
import torch

from secateurs.base.errors import CheckpointError
from secateurs.kernels.formats import pack, unpack
from secateurs.matrix.grids import parse
from secateurs.matrix.quantize import fit
from secateurs.model.unpacked import packed_tensors
from secateurs.pack.stored import PARTS, Stored, check_version, matrices_of

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
BITMASK = {"format": "bitmask", "survivors": 1, "transposed": False}
INTEGERS = {**BITMASK, "grid": "int4/64", "dtype": "bfloat16", "length": 1}


def test_a_fused_layer_is_made_of_what_the_folder_stores():
    layers = {"m.0.q_proj": BITMASK, "m.0.v_proj": INTEGERS, "m.0.o_proj": BITMASK}
    assert matrices_of("m.0.qkv_proj", layers, FUSED) == {
        "m.0.q_proj": BITMASK,
        "m.0.k_proj": None,
        "m.0.v_proj": INTEGERS,
    }
    assert matrices_of("m.0.o_proj", layers, FUSED) == {"m.0.o_proj": BITMASK}
    assert matrices_of("m.0.gate_up_proj", layers, FUSED) == {"m.0.gate_proj": None, "m.0.up_proj": None}
    # Phi-3 stores q, k and v as one
    assert matrices_of("m.0.qkv_proj", {"m.0.qkv_proj": BITMASK}, FUSED) == {"m.0.qkv_proj": BITMASK}
    assert matrices_of("qkv_proj", {}, FUSED) == {"q_proj": None, "k_proj": None, "v_proj": None}


def weights(*rows):
    return [torch.randn(n, 128).masked_fill(torch.rand(n, 128) < 0.5, 0).bfloat16() for n in rows]


def give(stored, packed, which):
    for name, tensor in packed_tensors("weight", packed).items():
        assert name in PARTS
        stored.take(name, tensor, which)


def test_floats_integers_and_plain_matrices_come_back_in_order():
    q, k, v = weights(12, 8, 8)
    scales = fit(v.float(), parse("int4/64"))
    v = scales.rounded(v).bfloat16()
    stored = Stored({"q": BITMASK, "k": None, "v": INTEGERS}, [12, 8, 8], 128, torch.bfloat16)
    # loaders read in any order
    give(stored, pack(v, "bitmask", scales), 2)
    stored.take("weight", k, 1)
    give(stored, pack(q), 0)
    found = stored.matrices()
    assert [m.format for m in found] == ["bitmask", "dense", "bitmask"]
    assert [m.stored for m in found] == ["bf16", "bf16", "int4"]
    for matrix, wanted in zip(found, (q, k, v), strict=True):
        assert torch.equal(unpack(matrix), wanted)


def test_one_stored_matrix_is_cut_into_those_of_the_layer():
    (whole,) = weights(28)
    stored = Stored({"qkv_proj": BITMASK}, [12, 8, 8], 128, torch.bfloat16)
    give(stored, pack(whole), 0)
    found = stored.matrices()
    assert [m.shape for m in found] == [(12, 128), (8, 128), (8, 128)]
    assert torch.equal(torch.cat([unpack(m) for m in found]), whole)


def test_floats_take_the_dtype_that_is_served():
    (w,) = weights(8)
    stored = Stored({"w": BITMASK}, [8], 128, torch.float32)
    give(stored, pack(w), 0)
    (found,) = stored.matrices()
    assert found.dtype == torch.float32
    assert torch.equal(unpack(found), w.float())


def test_what_is_missing_or_damaged_is_named():
    (w,) = weights(8)
    stored = Stored({"m.up_proj": BITMASK}, [8], 128, torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"m\.up_proj: its weight is missing"):
        stored.matrices()
    stored.take("weight", pack(w).values)
    with pytest.raises(CheckpointError, match=r"m\.up_proj: it is packed as bitmask and has no mask"):
        stored.matrices()
    give(stored, pack(w[:, :64].contiguous()), 0)
    with pytest.raises(CheckpointError, match=r"m\.up_proj: the mask of a 8x128 matrix"):
        stored.matrices()
    with pytest.raises(CheckpointError, match="came for matrix 1 of 1"):
        stored.take("weight", w, 1)
    plain = Stored({"m.k": None}, [8], 128, torch.bfloat16)
    plain.take("weight", w[:4])
    with pytest.raises(CheckpointError, match=r"m\.k: its weight has the shape \[4, 128\], wanted is \[8, 128\]"):
        plain.matrices()
    with pytest.raises(CheckpointError, match="the server makes 3 matrices of 2"):
        Stored({"a": None, "b": BITMASK}, [4, 4, 4], 128, torch.bfloat16)


def test_other_versions_are_refused():
    check_version(3)
    for version in (4, None):
        with pytest.raises(CheckpointError, match=f"packed in format version {version}, this secateurs reads"):
            check_version(version)
