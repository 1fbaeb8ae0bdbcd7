"""Codes of kernels as a picture."""

import io

import numpy as np
import PIL.Image

import dfq_jax as dfq
from dfq_jax.io.artifacts.quantized_tensors import stored_codes as stored
from dfq_jax.report.histograms import MOST, codes_of_layers, histograms_png


def test_codes_are_those_of_the_file(tiny_net, nets):
    images = dfq.Examples((nets.images(tiny_net, 8),), tiny_net.inputs)
    made = dfq.quantize(tiny_net, images, scheme="w4a8")
    names = [layer.name for layer in made.report.layers]
    found = codes_of_layers(made.quantized, ["images", *names])
    assert [x.layer for x in found] == names[:MOST]
    for x in found:
        theirs = np.asarray(stored(made.quantized)[x.layer]["kernel"])
        values, counts = np.unique(theirs, return_counts=True)
        assert dict(zip(values.tolist(), counts.tolist(), strict=True)) == {
            x.lowest + i: int(n) for i, n in enumerate(x.counts) if n
        }
    png = histograms_png(found)
    assert png == histograms_png(found)
    with PIL.Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
    assert made.histograms.startswith(b"\x89PNG")
