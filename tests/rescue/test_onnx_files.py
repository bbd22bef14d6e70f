"""ONNX files as torch's exporter, onnxruntime and SparseML write them."""

import onnx
import pytest
import tiny
import torch
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import QuantType, quantize_static
from onnxruntime.quantization.calibrate import CalibrationDataReader
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM

from secateurs.base.errors import CheckpointError
from secateurs.rescue import onnx_files
from secateurs.rescue.folder import rescue


class Ids(torch.nn.Module):
    """input_ids -> logits."""

    def __init__(self, model):
        super().__init__()
        self.bert, self.cls = model.bert, model.cls

    def forward(self, input_ids):
        hidden = self.bert(input_ids, attention_mask=torch.ones_like(input_ids))[0]
        return self.cls(hidden)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(a BERT with zeros, its folder with config.json and model.onnx)."""
    place = tmp_path_factory.mktemp("bert")
    model = tiny.pruned(tiny.make("bert"))
    for parameter in model.parameters():
        # the exporter stores equal vectors once, and trained ones are not equal
        if parameter.dim() == 1:
            parameter.data.normal_()
    model.set_attn_implementation("eager")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(place)
    # as SparseML did: torch's older exporter, whose nodes are named by modules
    torch.onnx.export(
        Ids(model).eval(), (tiny.tokens(),), place / "model.onnx", input_names=["input_ids"], output_names=["logits"],
        dynamo=False, opset_version=17, dynamic_axes={"input_ids": {0: "batch"}},
    )  # fmt: skip
    return model, place


def logits(model):
    with torch.no_grad():
        return model(tiny.tokens()).logits


def test_torch_s_own_export_is_read_bit_for_bit(exported, tmp_path):
    model, place = exported
    result = rescue(place, tmp_path / "out")
    assert result["formats"] == ["ONNX"]
    loaded, info = AutoModelForMaskedLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    loaded.set_attn_implementation("eager")
    want = model.state_dict()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, want[name]), name
    assert torch.equal(logits(loaded), logits(model))


class Random(CalibrationDataReader):
    def __init__(self):
        self.left = iter([{"input_ids": (tiny.tokens() + i).numpy()} for i in range(4)])

    def get_next(self):
        return next(self.left, None)


@pytest.mark.parametrize("by_row", [False, True])
def test_integers_of_qdq_are_multiplied(exported, tmp_path, by_row):
    model, place = exported
    quantize_static(
        place / "model.onnx", tmp_path / "model.onnx", Random(), per_channel=by_row, weight_type=QuantType.QInt8,
        op_types_to_quantize=["MatMul"],
    )  # fmt: skip
    (tmp_path / "config.json").write_text((place / "config.json").read_text())
    found = onnx_files.read(tmp_path / "model.onnx")
    for name, tensor in model.state_dict().items():
        if ".layer." in name and name.endswith("weight") and "LayerNorm" not in name:
            got = found[name]()
            step = tensor.abs().amax(1 if by_row else None) / 127
            assert ((got - tensor).abs() <= 0.51 * step.reshape(-1, 1)).all(), name
            assert (got[tensor == 0] == 0).all()
            # a multiple of its step
            levels = got / step.reshape(-1, 1)
            assert (levels - levels.round()).abs().max() < 1e-3, name
    assert rescue(tmp_path / "model.onnx", tmp_path / "out")["formats"] == ["ONNX"]


# -------------------------------------------------------------------------------------------- integers, by hand


def initializer(name, value, kind):
    tensor = torch.as_tensor(value)
    return helper.make_tensor(name, kind, list(tensor.shape), tensor.flatten().tolist())


def saved(tmp_path, nodes, constants):
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, 2]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "made", ends[:1], ends[1:], constants)
    onnx.save(helper.make_model(graph), tmp_path / "a.onnx")
    return tmp_path / "a.onnx"


# [I, O]: what is 3 is zero
INTEGERS = [[5, 3], [3, 1]]
WEIGHT = [[1.0, 0.0], [0.0, -1.0]]


def sparseml(tmp_path, node="/enc/fc/MatMul", dynamic=False):
    """MatMulInteger, Add, Cast, Mul, with the names that SparseML gives them; scales 0.25 of the input and 0.5 of the weight."""
    constants = [
        initializer(f"{node}.weight_quantized", INTEGERS, TensorProto.UINT8),
        initializer("wz", 3, TensorProto.UINT8),
        initializer("xs", 0.25, TensorProto.FLOAT),
        initializer("xz", 128, TensorProto.UINT8),
        initializer("b.bias_quantized", [8, -16], TensorProto.INT32),
        initializer("b.bias_quantized.scale", 0.125, TensorProto.FLOAT),
    ]
    into = (
        [helper.make_node("DynamicQuantizeLinear", ["x"], ["xq", "ds", "xz"], "q")]
        if dynamic
        else [
            helper.make_node("QuantizeLinear", ["x", "xs", "xz"], ["xf"], "q"),
            helper.make_node("Reshape", ["xf", "s"], ["xq"]),
        ]
    )
    nodes = [
        *into,
        helper.make_node("MatMulInteger", ["xq", f"{node}.weight_quantized", "xz", "wz"], ["m"], f"{node}_quant"),
        helper.make_node("Add", ["m", "b.bias_quantized"], ["a"], "add"),
        helper.make_node("Cast", ["a"], ["c"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["c", "ds" if dynamic else "b.bias_quantized.scale"], ["y"], "mul"),
    ]
    return saved(tmp_path, nodes, constants)


def test_sparseml_s_integers_by_hand(tmp_path):
    found = {name: load() for name, load in onnx_files.read(sparseml(tmp_path)).items()}
    # 0.5 (integer - 3), as outputs x inputs; the bias in steps of 0.125
    assert found["enc.fc.weight"].tolist() == WEIGHT
    assert found["enc.fc.bias"].tolist() == [1.0, -2.0]
    result = rescue(tmp_path / "a.onnx", tmp_path / "out")
    assert load_file(tmp_path / "out" / "model.safetensors")["enc.fc.weight"].tolist() == WEIGHT
    assert "no config.json" in result["warnings"][0]


def test_the_scale_of_qlinear_is_stored_beside_its_integers(tmp_path):
    constants = [
        initializer("fc.module.weight", INTEGERS, TensorProto.UINT8),
        initializer("ws", [0.5, 0.25], TensorProto.FLOAT),
        initializer("wz", [3, 3], TensorProto.UINT8),
        *(initializer(name, 1.0, TensorProto.FLOAT) for name in ("xs", "ys")),
        *(initializer(name, 0, TensorProto.UINT8) for name in ("xz", "yz")),
    ]
    node = helper.make_node(
        "QLinearMatMul", ["x", "xs", "xz", "fc.module.weight", "ws", "wz", "ys", "yz"], ["y"], "MatMul_7"
    )
    found = onnx_files.read(saved(tmp_path, [node], constants))
    assert found["fc.weight"]().tolist() == [[1.0, 0.0], [0.0, -0.5]]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"node": "MatMul_12"}, "nothing names the layer of MatMul_12.weight_quantized.*torch 1.13"),
        ({"dynamic": True}, "/enc/fc/MatMul_quant is scaled by its inputs while it runs"),
    ],
)
def test_what_no_layer_or_scale_can_be_found_for_is_refused(options, said, tmp_path):
    with pytest.raises(CheckpointError, match=said):
        onnx_files.read(sparseml(tmp_path, **options))


def test_files_that_hold_nothing_are_refused(tmp_path):
    file = sparseml(tmp_path)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(CheckpointError, match="truncated or corrupt"):
        rescue(file, tmp_path / "out")
    empty = saved(
        tmp_path, [helper.make_node("Relu", ["x"], ["y"])], [numpy_helper.from_array(torch.ones(2).numpy(), "c")]
    )
    with pytest.raises(CheckpointError, match="holds no parameters under the names of a PyTorch model"):
        rescue(empty, tmp_path / "out")
