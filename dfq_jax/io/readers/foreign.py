"""Models of other frameworks that people pass as they are, and how each becomes a file for dfq."""

import os
from pathlib import Path

from dfq_jax.io.readers.pickle_policy import show

KERAS_WEIGHTS = "model.weights.h5"
"""What every `.keras` archive has in it."""
SAVED_MODEL = "saved_model.pb"
JAX_FOLDERS = ("_CHECKPOINT_METADATA", "_METADATA", "manifest.ocdbt")
"""Files in folders that Orbax writes."""

FOLDED = (
    "Converters fold batch norms into the layers before them, and images are made from their "
    "statistics: pass `no_bn_fallback=True` for such a file, and expect lower accuracy."
)
AS_JAX = """\
  import keras, dfq_jax as dfq  # with KERAS_BACKEND=jax in the environment
  model = keras.models.load_model({model})
  parts = model.trainable_variables, model.non_trainable_variables
  values = [[v.value for v in part] for part in parts]
  run = lambda values, images: model.stateless_call(*values, images)[0]
  dfq.export(dfq.load(run, values, model.input_shape[1:]), "net.onnx")"""
IN_PYTHON = """\
  import dfq_jax as dfq
  net = dfq.load(module, variables, example=(224, 224, 3))
  dfq.export(net, "net.onnx")"""
FROM_LITE = "  python -m tf2onnx.convert --tflite {} --output net.onnx"
FROM_SAVED_MODEL = "  python -m tf2onnx.convert --saved-model {} --output net.onnx"
FROM_GRAPH = (
    "  python -m tf2onnx.convert --graphdef {} --output net.onnx "
    "--inputs INPUT:0 --outputs OUTPUT:0"
)
AS_ONNX = '  model.export("net.onnx", format="onnx")'


def from_keras(model: str) -> str:
    """How a model of Keras keeps the statistics of its batch norms.

    Args:
      model: its file, as Python has it.
    """
    return (
        "To keep the statistics of its batch norms, send it through JAX, and give dfq the file "
        f"that this writes, where Keras is installed:\n{AS_JAX.format(model=model)}\nor, if that "
        f"stops at an operator, convert it:\n{AS_ONNX}\n{FOLDED}"
    )


def told_by_content(data: bytes, path: Path) -> str | None:
    """What to say of a file by its first bytes; None for what is of no known framework."""
    where = show(path.name)
    if data.startswith(b"\x89HDF"):
        return f"{where} is an HDF5 file, as Keras writes it. {from_keras(repr(where))}"
    if data[4:8] == b"TFL3":
        return (
            f"{where} is a network of TensorFlow Lite. Best give the network that it was made of. "
            f"Without that, where TensorFlow is installed,\n{FROM_LITE.format(where)}\n"
            f"{FOLDED} Networks of integers are refused even so."
        )
    if path.name == SAVED_MODEL:
        return of_saved_model(f"{where} belongs to", show(path.parent.name) or ".")
    if path.suffix.lower() == ".pb":
        return (
            f"{where} is a graph of TensorFlow. Where that is installed, with the names of its "
            f"ends,\n{FROM_GRAPH.format(where)}\n{FOLDED}"
        )
    if path.suffix.lower() == ".msgpack":
        return of_jax(where, "a file of Flax")
    return None


def told_by_folder(folder: str) -> str | None:
    """What to say of a folder by the files in it; None for what is of no known framework."""
    if holds(folder, SAVED_MODEL):
        return of_saved_model(f"{show(folder, 300)!r} is", show(folder, 300))
    if any(holds(folder, name) for name in JAX_FOLDERS):
        return of_jax(repr(show(folder, 300)), "a checkpoint of Orbax")
    return None


def holds(folder: str, name: str) -> bool:
    """Whether a file is in a folder."""
    return os.path.isfile(os.path.join(folder, name))


def of_saved_model(start: str, folder: str) -> str:
    """What to say of a SavedModel."""
    return (
        f"{start} a SavedModel of TensorFlow. Where that is installed,\n"
        f"{FROM_SAVED_MODEL.format(folder)}\n{FOLDED} "
        "A model of Keras that is at hand as such keeps them: save it as net.keras and give dfq "
        "that, which says how."
    )


def of_jax(where: str, what: str) -> str:
    """What to say of weights of JAX without their network."""
    return (
        f"{where} is {what}, the weights of a network of JAX without the network. In Python, with "
        f"the module that they belong to and the shape of an image,\n{IN_PYTHON}\n"
        "writes a file that dfq reads."
    )
