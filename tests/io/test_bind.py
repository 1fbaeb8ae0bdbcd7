import jax
import ml_dtypes
import numpy as np
import pytest

from dfq_jax.errors import CheckpointError
from dfq_jax.graph.evaluate import evaluate
from dfq_jax.io.zoo.architecture import Architecture
from dfq_jax.io.zoo.bind import NO_STATISTICS, bind
from dfq_jax.io.zoo.builder import NetworkBuilder
from dfq_jax.io.zoo.catalog import architecture
from dfq_jax.types import InputContract


def tiny(norm: bool = True) -> Architecture:
    b = NetworkBuilder("tiny", InputContract(4, 6))
    x = b.conv("conv", b.images, 4, 3, bias=True)
    x = b.relu("relu", b.bn("bn", x) if norm else x)
    return b.finish(b.linear("fc", b.flatten("flatten", x), 5))


def weights(arch: Architecture) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    table = {p.torch_name: rng.uniform(0.5, 2, p.torch_shape) for p in arch.expected}
    return {name: array.astype(np.float32) for name, array in table.items()}


def test_layouts():
    arch, tensors = tiny(), weights(tiny())
    model, notes = bind(arch, tensors)
    assert notes == ()
    assert model.graph is arch.graph
    assert set(model.params) == {"conv", "bn", "fc"}
    kernel = np.asarray(model.params["conv"]["kernel"])
    assert kernel.shape == (3, 3, 3, 4)
    assert kernel[0, 1, 2, 3] == tensors["conv.weight"][3, 2, 0, 1]
    assert set(model.params["bn"]) == {"scale", "bias", "mean", "var"}
    np.testing.assert_array_equal(model.params["bn"]["mean"], tensors["bn.running_mean"])
    fc = np.asarray(model.params["fc"]["kernel"]).reshape(4, 6, 4, 5)
    assert fc[1, 2, 3, 4] == tensors["fc.weight"].reshape(5, 4, 4, 6)[4, 3, 1, 2]


def test_linear_after_flatten_reads_the_same_features():
    """A kernel that picks PyTorch's feature i picks the same pixel here."""
    arch = tiny(norm=False)
    tensors = {name: np.zeros_like(array) for name, array in weights(arch).items()}
    for channel in range(3):
        tensors["conv.weight"][channel, channel, 1, 1] = 1.0
    for out, feature in enumerate((0, 7, 25, 47, 70)):  # 24 pixels a channel
        tensors["fc.weight"][out, feature] = 1.0
    model, _ = bind(arch, tensors)
    images = np.random.default_rng(1).uniform(0, 1, (2, 4, 6, 3)).astype(np.float32)
    found = jax.jit(lambda m, x: evaluate(m, x)[0][0])(model, images)
    expected = images.transpose(0, 3, 1, 2).reshape(2, -1)[:, [0, 7, 25, 47, 70]]
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16, np.float64, ">f4"])
def test_other_floats_become_float32(dtype):
    tensors = {name: array.astype(dtype) for name, array in weights(tiny()).items()}
    model, _ = bind(tiny(), tensors)
    assert {x.dtype.name for x in jax.tree.leaves(model.params)} == {"float32"}
    expected = tensors["bn.weight"].astype(np.float32)
    np.testing.assert_array_equal(model.params["bn"]["scale"], expected)


def test_parameters_do_not_share_memory_with_the_checkpoint():
    tensors = weights(tiny())
    model, _ = bind(tiny(), tensors)
    before = np.array(model.params["conv"]["bias"])
    tensors["conv.bias"][:] = -1.0
    np.testing.assert_array_equal(model.params["conv"]["bias"], before)


def test_read_only_tensors_and_counters_are_fine():
    tensors = weights(tiny()) | {"bn.num_batches_tracked": np.array(3)}
    for array in tensors.values():
        array.flags.writeable = False
    assert bind(tiny(), tensors).notes == ()


def test_table_of_misfits():
    tensors = weights(tiny())
    tensors["fc.weights"] = tensors.pop("fc.weight")
    tensors["bn.bias"] = tensors["bn.bias"][:3]
    tensors["conv.bias"] = tensors["conv.bias"].astype(np.int8)
    del tensors["bn.running_mean"]
    with pytest.raises(CheckpointError) as caught:
        bind(tiny(), tensors)
    lines = str(caught.value).splitlines()
    assert lines[0] == (
        "the checkpoint does not fit tiny: 2 missing, 1 unexpected, 1 of another shape, "
        "1 not of floating point."
    )
    assert [line.split("  ") for line in map(squeeze, lines[1:-1])] == [
        ["kind", "name", "found", "expected", "nearest name"],
        ["missing", "bn.running_mean", "-", "(4,)", "-"],
        ["missing", "fc.weight", "-", "(5, 96)", "fc.weights"],
        ["unexpected", "fc.weights", "(5, 96)", "-", "fc.weight"],
        ["shape", "bn.bias", "(3,)", "(4,)", "-"],
        ["type", "conv.bias", "int8", "floating point", "-"],
    ]
    assert lines[-1].startswith("Check the name of the architecture")


def squeeze(line: str) -> str:
    """The line with its columns two spaces apart."""
    return "  ".join(part.strip() for part in line.split("  ") if part.strip())


def test_long_table_is_cut():
    tensors = weights(tiny()) | {f"extra.{i}": np.zeros(1, np.float32) for i in range(50)}
    with pytest.raises(CheckpointError, match="50 unexpected") as caught:
        bind(tiny(), tensors)
    lines = str(caught.value).splitlines()
    assert len(lines) == 1 + 1 + 20 + 1 + 1
    assert lines[-2] == "  … and 30 more"


def test_names_from_the_file_are_escaped():
    tensors = weights(tiny()) | {"a\n\x1b[31m" + "x" * 200: np.zeros(1, np.float32)}
    with pytest.raises(CheckpointError, match=r"a\\n\\x1b\[31mx+\.\.\.") as caught:
        bind(tiny(), tensors)
    assert len(str(caught.value).splitlines()) == 4
    assert "\x1b" not in str(caught.value)


def test_nan_and_infinity_are_named():
    tensors = weights(tiny())
    tensors["fc.weight"][0, :3] = np.nan
    tensors["bn.running_var"] = tensors["bn.running_var"].astype(np.float64)
    tensors["bn.running_var"][1] = 1e300  # infinite in float32
    message = r"in 2 tensors: bn\.running_var \(1 of 4\), fc\.weight \(3 of 480\)\. Its training"
    with pytest.raises(CheckpointError, match=message):
        bind(tiny(), tensors)


def test_odd_variances():
    tensors = weights(tiny())
    tensors["bn.running_var"][:] = (-1e-9, 0.0, -0.0, 1.0)
    model, notes = bind(tiny(), tensors)
    assert notes == (
        "negative running variance raised to 0: bn (1 channel)",
        "running variance is 0: bn (2 channels)",
    )
    np.testing.assert_array_equal(model.params["bn"]["var"], [0.0, 0.0, 0.0, 1.0])


def test_batch_norm_never_updated():
    tensors = weights(tiny())
    tensors["bn.running_mean"][:], tensors["bn.running_var"][:] = 0.0, 1.0
    never = "batch norm never updated (mean 0, variance 1), its statistics say nothing: bn"
    assert bind(tiny(), tensors).notes == (never, NO_STATISTICS)


def test_many_layers_are_listed_briefly():
    arch = architecture("resnet20_cifar")
    tensors = weights(arch)
    for name, array in tensors.items():
        if name.endswith("running_var") and name != "bn1.running_var":
            array[:] = 0.0
    (note,) = bind(arch, tensors).notes
    assert note.startswith("running variance is 0: layer1.0.bn1 (16 channels), layer1.0.bn2 (16")
    assert note.endswith(" and 13 more")


def test_network_without_batch_norm():
    assert bind(tiny(norm=False), weights(tiny(norm=False))).notes == (NO_STATISTICS,)
