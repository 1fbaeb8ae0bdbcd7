"""ONNX files whose exporter folded the batch norms away, and how they are exported with them."""

from dfq_jax.io.frontends.program import Program
from dfq_jax.io.readers.foreign import AS_JAX, IN_PYTHON

NORMALIZATIONS = frozenset(
    f"onnx.{kind}Normalization" for kind in ("Batch", "Instance", "Layer", "Group")
)
OF_KERAS, OF_JAX = ("keras", "tf2onnx"), ("jax",)
"""How the names of exporters begin."""
MODEL = '"net.keras"'


def folded_batch_norm_message(program: Program, where: str) -> str | None:
    """What to tell about a network whose exporter folded the batch norms away.

    Args:
      program: of an ONNX file.
      where: the file.

    Returns:
      What was found, why it matters and what to do; None for any other network.
    """
    targets = {call.target for call in program.calls}
    convs = [call for call in program.calls if call.target == "onnx.Conv"]
    biased = sum(len(call.args) > 2 and call.args[2] is not None for call in convs)
    if not convs or targets & NORMALIZATIONS or 5 * biased < 4 * len(convs):
        return None
    return (
        f"{where} has {len(convs)} convolutions, {biased} of them with a bias, and no batch norm: "
        "most likely the exporter folded the batch norms into the convolutions. Data-free image "
        f"synthesis and range estimation need their statistics. {way_out(program)}\n"
        "Without its source, or if it never had batch norms, pass `no_bn_fallback=True`: "
        "ranges then come from noise images; expect lower accuracy."
    )


def way_out(program: Program) -> str:
    """How the network is exported with its batch norms, from where it was exported before."""
    if program.producer.lower().startswith(OF_KERAS):
        return f"Where it is a model of Keras, export it through JAX:\n{AS_JAX.format(model=MODEL)}"
    if program.producer.lower().startswith(OF_JAX):
        return f"Load the network of JAX itself, in Python:\n{IN_PYTHON}"
    zeros = ", ".join(zeros_of(x.shape) for x in program.inputs) or zeros_of((1, 3, 224, 224))
    return (
        "Export the network again, best as\n"
        f'  torch.export.save(torch.export.export(model.eval(), ({zeros},)), "net.pt2")\n'
        "or, as ONNX,\n"
        f'  torch.onnx.export(model.eval(), ({zeros},), "net.onnx", '
        "training=torch.onnx.TrainingMode.PRESERVE, do_constant_folding=False, dynamo=False)"
    )


def zeros_of(shape: tuple[int | None, ...]) -> str:
    """The input of PyTorch that has this shape, in its words."""
    sizes = [str(224 if n is None else n) for n in shape]
    return f"torch.zeros({', '.join(sizes)})"
