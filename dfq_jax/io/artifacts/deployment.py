"""`run.py` of an output folder: the network on a picture, without this library."""

CHANNELS = (1, 3)
"""Of networks that read pictures as they are."""

TEMPLATE = '''"""The top classes of a picture: python run.py PICTURE [MODEL.onnx]

Needs NumPy, Pillow and ONNX Runtime. The file itself says how it wants its pictures.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image

MODEL = Path(__file__).with_name("{model}")


def prepared(picture, wanted):
    """The picture as the network reads it: resized, cropped, normalised, a batch of one."""
    image = Image.open(picture).convert("RGB" if len(wanted["mean"]) == 3 else "L")
    size, short = (wanted["width"], wanted["height"]), wanted["resize"]
    resized = size if short is None else [int(short * n / min(image.size)) for n in image.size]
    if image.size != tuple(resized):
        image = image.resize(resized, getattr(Image.Resampling, wanted["interpolation"].upper()))
    left, top = (round((have - want) / 2) for have, want in zip(image.size, size))
    image = image.crop((left, top, left + size[0], top + size[1]))
    pixels = np.asarray(image, np.float32).reshape(1, size[1], size[0], -1) / np.float32(255)
    values = (pixels - np.float32(wanted["mean"])) / np.float32(wanted["std"])
    return values if wanted["layout"] == "NHWC" else values.transpose(0, 3, 1, 2).copy()


def main(picture, model=MODEL):
    options = onnxruntime.SessionOptions()
    # exact also on x86 processors without VNNI, where it takes more time
    options.add_session_config_entry("session.x64quantprecision", "1")
    session = onnxruntime.InferenceSession(str(model), options, ["CPUExecutionProvider"])
    wanted = json.loads(session.get_modelmeta().custom_metadata_map["dfq.contract"])
    names = [output.name for output in session.get_outputs()]
    feed = {{session.get_inputs()[0].name: prepared(picture, wanted)}}
    for name, value in zip(names, session.run(names, feed)):
        if value.ndim == 2:
            for index in value[0].argsort()[::-1][:5]:
                print(f"{{name}} {{index}}: {{value[0, index]:.4f}}")
        else:
            print(f"{{name}} {{list(value.shape)}}: {{value.min():.4f}} to {{value.max():.4f}}")


if __name__ == "__main__":
    main(*sys.argv[1:]) if len(sys.argv) > 1 else sys.exit(__doc__)
'''


def run_py(model: str) -> bytes:
    """The script for a model of that name beside it; it reads the input contract from the file.

    `tests/io/test_deployment.py` holds what it does to pictures against `data/preprocess.py`.
    """
    return TEMPLATE.format(model=model).encode()
