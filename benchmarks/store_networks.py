"""Stores the graphs of known networks without their weights, for `dfq --arch NAME`.

They are torchvision's and those of `task_networks.py`.

Run again after a change of `io/zoo/stored.py`; needs PyTorch and torchvision, downloads nothing.
A network is built without memory for its weights. One graph serves images of any size if the
network does.
"""

import argparse
import dataclasses
import io
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import common
import zoo_networks
from task_networks import NETWORKS

from dfq_jax.errors import UnsupportedModelError
from dfq_jax.io.frontends.program import Program, ProgramInput, Ref
from dfq_jax.io.frontends.pt2_aliases import names_in
from dfq_jax.io.frontends.pt2_graph import read_pt2
from dfq_jax.io.importing.aten_table import ATEN
from dfq_jax.io.importing.engine import import_program
from dfq_jax.io.zoo.catalog import ENTRIES
from dfq_jax.io.zoo.stored import FOLDER, SUFFIX, Stored, Weight, calls_to_text, packed
from dfq_jax.types import InputContract

LEFT_OUT = {"maxvit_t", "regnet_y_128gf", "vit_h_14"}
"""Of the first the size of its windows is fixed; the others are too large to export here."""
ALREADY_NORMALISED = {"googlenet", "inception_v3"}
"""Published weights map ImageNet's normalisation to this one inside the network."""
HALVES = (0.5, 0.5, 0.5)
TRANSFORM_INPUT = (
    "weights that come from torchvision's published ones have transform_input=True, which is mean "
    "0.5 and std 0.5 here, whatever numbers their images were normalised with"
)
OTHER_CLASSES = 7
MORE = 64
"""Pixels added to find out whether a network reads images of other sizes."""


def main() -> None:
    """Writes one file a network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--networks", default="all", help="names, comma-separated, or all")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    args = parser.parse_args()
    for name in wanted() if args.networks == "all" else args.networks.split(","):
        data = packed(network(name))
        (args.folder / f"{name}{SUFFIX}").write_bytes(data)
        common.log(f"{name}: {len(data):,} bytes")


def wanted() -> Iterator[str]:
    """Networks that nobody wrote down by hand."""
    known = {*ENTRIES, *LEFT_OUT}
    yield from NETWORKS
    yield from (n for n in zoo_networks.TORCHVISION.split() if n not in known and "swin" not in n)


def network(name: str) -> Stored:
    """One network as it is stored."""
    module = without_memory(name)
    contract = published(name)
    program = exported(module, contract)
    state = {key: tuple(value.shape) for key, value in module.state_dict().items()}
    read = set(names_in(*(v for c in program.calls for v in (*c.args, *c.kwargs.values()))))
    expected = tuple(Weight(key, shape) for key, shape in state.items() if key in read)
    remarks = (TRANSFORM_INPUT,) if name in ALREADY_NORMALISED else ()
    return Stored(
        name=name,
        contract=contract,
        image=program.inputs[0],
        calls=calls_to_text(program.calls),
        output=program.outputs[0],
        expected=expected,
        stem=next(key for key, shape in expected if len(shape) == 4),
        heads=heads(name, expected),
        unread=unread(key for key in state if key not in read),
        remarks=NETWORKS[name].remarks if name in NETWORKS else remarks,
    )


def without_memory(name: str, **options: Any) -> Any:
    """The network, its weights without values."""
    import torch

    if name in NETWORKS:
        with torch.device("meta"):
            return NETWORKS[name].build()
    if name in ALREADY_NORMALISED:
        options |= {"init_weights": False, "transform_input": False}
    models = zoo_networks.torchvision_models()
    with torch.device("cpu" if name.startswith("regnet") else "meta"):  # it computes its widths
        return models.get_model(name, weights=None, **options).eval().to("meta")


def heads(name: str, expected: Iterable[Weight]) -> tuple[str, ...]:
    """Weights that have another shape with another number of classes."""
    if name in NETWORKS:
        return NETWORKS[name].heads
    state = without_memory(name, num_classes=OTHER_CLASSES).state_dict()
    return tuple(key for key, shape in expected if tuple(state[key].shape) != shape)


def published(name: str) -> InputContract:
    """What its published weights expect of an image."""
    if name in NETWORKS:
        return NETWORKS[name].contract
    weights = zoo_networks.torchvision_models().get_model_weights(name)
    told = weights["IMAGENET1K_V1"].transforms.keywords
    side = told["crop_size"]
    mode = told.get("interpolation")
    looks = {"resize": told.get("resize_size", 256)}
    looks |= {"interpolation": mode.value} if mode is not None else {}
    looks |= {key: tuple(told[key]) for key in ("mean", "std") if key in told}
    looks |= {"mean": HALVES, "std": HALVES} if name in ALREADY_NORMALISED else {}
    return InputContract(side, side, **looks)


def exported(module: Any, contract: InputContract) -> Program:
    """Its program, weights left out and called as in the `state_dict`.

    Sizes of images are free unless it cannot read others, however it is traced.
    """
    free = ProgramInput("x", (1, 3, None, None))
    for dynamic in (False, True):  # the former is quicker, and mostly enough
        program = dataclasses.replace(traced(module, contract, dynamic), inputs=(free,))
        if reads_others(program, contract):
            return without_arrays(program, free)
    return without_arrays(program, ProgramInput("x", (1, 3, contract.height, contract.width)))


def traced(module: Any, contract: InputContract, dynamic: bool) -> Program:
    """Its program as an archive has it; `dynamic` leaves sizes open where PyTorch can."""
    import torch

    image = torch.zeros(2, 3, contract.height, contract.width, device="meta")
    sizes = ({axis: torch.export.Dim.AUTO for axis in (0, 2, 3)},) if dynamic else None
    with zoo_networks.quiet():
        found = torch.export.export(module, (image,), dynamic_shapes=sizes)
        fill(found)
        buffer = io.BytesIO()
        torch.export.save(found, buffer)
    return read_pt2(buffer.getvalue(), type(module).__name__)


def reads_others(program: Program, contract: InputContract) -> bool:
    """Whether it is a network for images of another size as well."""
    try:
        import_program(program, ATEN, size=(contract.height + MORE, contract.width + MORE))
    except UnsupportedModelError:
        return False
    return True


def without_arrays(program: Program, image: ProgramInput) -> Program:
    """A program without the values of its weights, each called by its key.

    Args:
      program: as an archive has it; all its arrays are weights.
      image: what it is fed.
    """
    keys = {name: program.paths[name] for name in program.arrays}
    outputs = {image.name, *(name for call in program.calls for name in call.outputs)}
    if clash := outputs & {*keys.values()}:
        raise ValueError(f"weights are called as other tensors are: {sorted(map(str, clash))}")
    calls = tuple(
        dataclasses.replace(
            call,
            args=renamed(call.args, keys),
            kwargs={k: renamed(v, keys) for k, v in call.kwargs.items()},
            label="",
        )
        for call in program.calls
    )
    return Program((image,), {}, {}, calls, program.outputs)


def renamed(value: Any, names: Mapping[str, str]) -> Any:
    """An argument with tensors under other names."""
    if isinstance(value, Ref):
        return Ref(names.get(value.name, value.name))
    return tuple(renamed(v, names) for v in value) if isinstance(value, tuple) else value


def fill(program: Any) -> None:
    """Zeros in place of weights without values, which cannot be saved."""
    import torch

    for key, value in list(program.state_dict.items()):
        kind = torch.bfloat16 if value.is_floating_point() else value.dtype
        zeros = torch.zeros(value.shape, dtype=kind)
        is_weight = isinstance(value, torch.nn.Parameter)
        program.state_dict[key] = torch.nn.Parameter(zeros) if is_weight else zeros


def unread(keys: Iterable[str]) -> tuple[str, ...]:
    """First parts of the names of weights that only training reads."""
    parts = (key.partition(".")[0] for key in keys if not key.endswith("num_batches_tracked"))
    return tuple(dict.fromkeys(f"{part}." for part in parts))


if __name__ == "__main__":
    main()
