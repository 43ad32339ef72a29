"""StoredWeight, Linear and Embedding as modules: what survives moves, casts, copies, files and the compiler."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from parco.nn import Embedding, Linear, StoredWeight, pack_, packed, set_product_
from parco.products import Activations, Native
from parco.weights import Dense, LowRank, Quantized, Sum

NESTED = Sum(Quantized("int4:32", (40, 72)), LowRank(Dense((40, 8), "bf16"), Quantized("int8:row", (8, 72))))


def stored(spec, seed=0, dtype=torch.float32):
    def tensors(part, seed):
        parts = part.parts()
        if parts:
            return sum((tensors(child, 7 * seed + i + 1) for i, child in enumerate(parts.values())), ())
        return part.encode(torch.randn(part.shape, generator=torch.Generator().manual_seed(seed)) / 8)

    return StoredWeight(spec, tensors(spec, seed), dtype)


def layer(spec=NESTED, bias=True, dtype=torch.float32):
    made = Linear(stored(spec, dtype=dtype), torch.nn.Parameter(torch.randn(spec.shape[0])) if bias else None)
    return made.to(dtype)


def stored_dtypes(module):
    return {name: p.dtype for name, p in module.named_parameters() if name != "bias"}


def test_parameters_carry_the_names_of_the_spec():
    weight = stored(NESTED)
    assert [name for name, _ in weight.named_parameters()] == list(NESTED.tensors())
    assert [t.data_ptr() for t in weight.tensors()] == [p.data_ptr() for p in weight.parameters()]
    assert not any(p.requires_grad for p in weight.parameters())
    assert weight.nbytes == NESTED.nbytes


def test_looks_like_a_tensor_to_model_code():
    weight = stored(NESTED, dtype=torch.bfloat16)
    assert (weight.dtype, weight.device, weight.requires_grad) == (torch.bfloat16, torch.device("cpu"), False)
    assert weight.shape == torch.Size((40, 72))
    assert weight.shape[0] == 40


@pytest.mark.parametrize("cast", ["to", "half", "bfloat16", "float", "to device and dtype"])
def test_a_cast_changes_what_is_computed_and_not_what_is_stored(cast):
    made = layer()
    before = {name: p.clone() for name, p in made.weight.named_parameters()}
    dtype = {"half": torch.float16, "float": torch.float32}.get(cast, torch.bfloat16)
    if cast.startswith("to"):
        made.to("cpu", dtype) if "device" in cast else made.to(dtype)
    else:
        getattr(made, cast)()
    assert made.bias.dtype == dtype
    assert all(m.dtype == dtype for m in made.modules() if isinstance(m, StoredWeight))
    for name, parameter in made.weight.named_parameters():
        assert parameter.dtype == before[name].dtype
        assert torch.equal(parameter, before[name])
    assert made(torch.randn(3, 72, dtype=dtype)).dtype == dtype


def test_casting_there_and_back_is_lossless():
    made = layer(bias=False)
    x = torch.randn(3, 72)
    before = made(x)
    assert torch.equal(made.half().float()(x), before)


def test_moves_to_another_device():
    made = layer()
    dtypes = stored_dtypes(made)
    made.to("meta")
    assert made.weight.device.type == "meta"
    assert stored_dtypes(made) == dtypes
    made.to_empty(device="cpu")
    assert {p.device.type for p in made.parameters()} == {"cpu"}
    assert stored_dtypes(made) == dtypes


def test_dtype_can_be_set_and_refuses_integers():
    weight = stored(NESTED)
    weight.dtype = torch.float16
    assert weight.get_submodule("1.left").dtype == torch.float16
    with pytest.raises(ValueError, match=r"torch\.uint8"):
        weight.dtype = torch.uint8


def test_replaced_parameters_are_the_ones_used():
    """Loaders assign new Parameters; none that the module had before may live on in a cache."""
    made, other = layer(bias=False), Linear(stored(NESTED, seed=3))
    x = torch.randn(3, 72)
    made(x)
    made.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(made(x), other(x))
    swapped = torch.func.functional_call(made, layer(bias=False).state_dict(), (x,))
    assert torch.equal(swapped, layer(bias=False)(x))
    assert torch.equal(made(x), other(x))


def test_only_dense_leaves_train():
    weight = stored(NESTED)
    leaf, scales = weight.get_submodule("1.left"), weight.get_submodule("0")
    leaf.values = torch.nn.Parameter(leaf.values.detach().clone())
    scales.scale = torch.nn.Parameter(scales.scale.detach().clone())
    assert leaf.values.requires_grad
    assert not scales.scale.requires_grad
    assert weight.requires_grad
    weight(torch.randn(3, 72)).square().sum().backward()
    assert leaf.values.grad.abs().sum() > 0


def test_the_gradient_of_a_dense_leaf_is_the_product_s():
    weight = stored(Dense((5, 7), "fp32"))
    weight.requires_grad_(True)
    x, grad_output = torch.randn(4, 7), torch.randn(4, 5)
    weight(x).backward(grad_output)
    torch.testing.assert_close(weight.values.grad, grad_output.T @ x)


def test_files_copies_and_pickles(tmp_path):
    made = layer()
    save_file(made.state_dict(), tmp_path / "layer.safetensors")
    loaded = Linear(StoredWeight.empty(NESTED), torch.nn.Parameter(torch.zeros(40)))
    loaded.load_state_dict(load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(3, 72)
    for again in (loaded, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        assert again.weight is not made.weight
        assert torch.equal(again(x), made(x))


@pytest.mark.parametrize(
    "spec", [NESTED, Quantized("int4:32", (40, 72)), Dense((40, 72), "bf16"), Quantized("nf4:64", (40, 72))]
)
def test_compiles_without_a_break(spec):
    torch._dynamo.reset()
    made, table = layer(spec), Embedding(stored(spec), scale=3.0)
    x, indices = torch.randn(3, 72), torch.tensor([[1, 39], [0, 7]])
    compiled = torch.compile(lambda x, i: (made(x), table(i)), backend="eager", fullgraph=True)
    for got, expected in zip(compiled(x, indices), (made(x), table(indices)), strict=True):
        assert torch.equal(got, expected)


def test_embedding_looks_up_rows():
    table = Embedding(stored(NESTED), padding_idx=0)
    indices = torch.tensor([[1, 39], [0, 7]])
    torch.testing.assert_close(table(indices), table.weight.dense()[indices])
    assert table.bfloat16()(indices).dtype == torch.bfloat16
    assert (table.num_embeddings, table.embedding_dim, table.padding_idx) == (40, 72, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_embedding_scale_is_rounded_as_gemma_rounds_it(dtype):
    spec, scale = Dense((40, 72), "bf16"), 72**0.5
    table = Embedding(stored(spec), scale=scale).to(dtype)
    indices = torch.arange(40)
    assert torch.equal(table(indices), table.weight.values.to(dtype) * torch.tensor(scale).to(dtype))


def test_refusals_name_what_was_wrong():
    spec = Quantized("int4:32", (40, 72))
    codes, scale = spec.encode(torch.randn(40, 72))
    with pytest.raises(ValueError, match=r"'scale' is torch\.float32"):
        StoredWeight(spec, (codes, scale.float()))
    with pytest.raises(ValueError, match=r"the 2 tensors codes, scale; 1 are given"):
        StoredWeight(spec, (codes,))
    with pytest.raises(ValueError, match=r"\(41,\)"):
        Linear(StoredWeight(spec, (codes, scale)), torch.nn.Parameter(torch.zeros(41)))


def equal_states(a, b):
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


def test_packing_changes_the_layout_and_nothing_else():
    made = layer(dtype=torch.bfloat16)
    x = torch.randn(3, 72).bfloat16()
    before = {name: value.clone() for name, value in made.state_dict().items()}
    y, dense, identities = made(x), made.weight.dense(), [id(p) for p in made.parameters()]
    assert made.weight.pack_() is made.weight
    assert made.weight.is_packed
    assert made.weight.get_parameter("0.codes").shape == (3, 9, 64)
    assert made.weight.get_parameter("1.left.values").shape == (40, 8)
    assert made.weight.get_parameter("1.right.codes").shape == (1, 18, 64)
    assert [id(p) for p in made.parameters()] == identities
    assert torch.equal(made(x), y)
    assert torch.equal(copy.deepcopy(made)(x), y)
    assert torch.equal(made.weight.dense(), dense)
    assert equal_states(made.state_dict(), before)
    assert made.weight.nbytes == NESTED.nbytes
    made.weight.unpack_()
    assert not made.weight.is_packed
    assert equal_states(dict(sorted(made.named_parameters())), dict(sorted(before.items())))


def test_packed_weights_load_what_lies_by_rows():
    made, other = layer(), layer()
    torch.nn.init.zeros_(other.weight.get_parameter("0.scale"))
    state = made.state_dict()
    other.weight.pack_()
    other.load_state_dict(state)
    assert other.weight.is_packed
    x = torch.randn(2, 72)
    assert torch.equal(other(x), made(x))
    part = {name: value for name, value in state.items() if name != "weight.0.codes"}
    assert other.load_state_dict(part, strict=False).missing_keys == ["weight.0.codes"]
    assert torch.equal(other(x), made(x))


def test_a_move_off_the_cpu_unpacks_and_a_cast_does_not():
    made = layer()
    made.weight.pack_()
    made.to(torch.bfloat16)
    assert made.weight.is_packed
    made.to("meta")
    assert not made.weight.is_packed
    assert made.weight.get_parameter("0.codes").shape == (40, 36)
    assert not made.weight.pack_().is_packed


def test_a_model_is_packed_for_a_while():
    a, b = layer(), layer()
    b.weight.pack_()
    with packed(a, b):
        assert a.weight.is_packed
    assert not a.weight.is_packed
    assert b.weight.is_packed
    pack_(a)
    assert a.weight.is_packed


def test_assigning_another_modules_parameters_leaves_it_alone():
    made, other = layer(), layer()
    other.weight.pack_()
    other.load_state_dict(made.state_dict(keep_vars=True), assign=True)
    assert other.weight.is_packed
    assert made.weight.get_parameter("0.codes").shape == (40, 36)
    x = torch.randn(2, 72)
    assert torch.equal(other(x), made(x))
    assert equal_states(other.state_dict(), made.state_dict())


def test_states_of_packed_weights_own_their_storage():
    made = layer()
    made.weight.pack_()
    for name, tensor in made.weight.state_dict().items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name


def test_numbers_on_two_devices_are_refused():
    made = layer(bias=False)
    made.weight.to("meta")
    with pytest.raises(ValueError, match="tensors lie on cpu and meta"):
        made(torch.randn(2, 72))


def test_a_product_changes_what_is_computed_and_not_what_is_stored():
    made = layer()
    x = torch.randn(3, 72)
    plain, before = made(x), made.state_dict()
    assert set_product_(made, "activations(int8)") == ("weight",)
    assert made.weight.product == Activations()
    y = made(x)
    assert not torch.equal(y, plain)
    torch.testing.assert_close(y, plain, atol=0.1, rtol=0.1)
    assert torch.equal(made.weight(x, made.bias), y)
    assert all(torch.equal(before[name], tensor) for name, tensor in made.state_dict().items())
    assert "activations(int8)" in repr(made.weight)
    again = pickle.loads(pickle.dumps(copy.deepcopy(made)))
    assert again.weight.product == Activations()
    assert torch.equal(again(x), y)
    compiled = torch.compile(made, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), y)
    set_product_(made, Native())
    assert torch.equal(made(x), plain)


def test_a_product_that_nothing_takes_is_refused():
    dense = stored(Dense((40, 72), "bf16"))
    with pytest.raises(ValueError, match=r"no part of dense\(bf16, 40x72\) computes by it"):
        dense.product = Activations()
    with pytest.raises(ValueError, match="takes activations"):
        set_product_(Linear(dense), Activations())
    both = torch.nn.ModuleList([Linear(dense), layer()])
    assert set_product_(both, "activations(int8)") == ("1.weight",)
    with pytest.raises(ValueError, match="that is asked for"):
        set_product_(both, "activations(int8)", lambda name: False)
