# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     name: python3
# ---

# %% [markdown]
# # A synthesis method of your own
#
# A method is a value, a `Recipe`: what is optimised, in which stages, against which terms. A term
# is a pure function of one forward pass. Here one is added to `best`, and images with and without
# it calibrate an 8-bit network.
#
# `pip install .[demo,notebooks]`, then `jupytext --to ipynb` this file, or run it as it is: two
# minutes on two cores. For real use make more images in more steps (`IMAGES=64 STEPS=200`).

# %%
import itertools
import os

import jax.numpy as jnp
import matplotlib.pyplot as plt

import dfq_jax as dfq

N = int(os.environ.get("IMAGES", "4"))
STEPS = int(os.environ.get("STEPS", "40"))
model = dfq.load("efficientnet_lite0")
print("\n".join(dfq.describe(model).splitlines()[:8]))

# %% [markdown]
# ## What the network remembers of its data
#
# Every batch norm keeps the mean and variance of what it saw, per channel. `recorded_statistics`
# gives them by name, and those that no image could match.

# %%
targets, unusable = dfq.parts.recorded_statistics(model)
name, moments = next(iter(targets.items()))
print(f"{len(targets)} batch norms, {len(unusable)} with something to leave out")
print(f"{name}: {moments.mean.size} channels, first means {moments.mean[:3].round(2)}")

# %% [markdown]
# ## A term
#
# `Observed` is all a term may look at: images, logits, statistics of every batch norm's input. This
# one asks for smoothness: neighbouring pixels of photographs hardly differ. It is in natural units,
# where photographs have mean 0 and deviation 1. Its weight has to hold against the other terms.


# %%
def roughness(observed):
    """Mean squared difference of neighbouring pixels."""
    x = observed.natural
    rows, columns = x[:, 1:] - x[:, :-1], x[:, :, 1:] - x[:, :, :-1]
    return jnp.mean(rows**2) + jnp.mean(columns**2)


plain = dfq.methods.best(steps=STEPS)
smooth = plain._replace(
    name="best, smooth",
    settings={**plain.settings, "roughness": 10.0},
    terms=(*plain.terms, dfq.parts.Term("roughness", 10.0, roughness)),
)

# %% [markdown]
# ## Images
#
# The same call for every method: compiled once, the same images for the same seed on any number of
# devices, resumable with a `state_folder`.

# %%
sets = {}
for recipe in (plain, smooth):
    images = sets[recipe.name] = dfq.synthesize(model, recipe, N)
    print(f"{recipe.name}: loss {images.provenance['final_losses'][0]:.2f}")

figure, rows = plt.subplots(len(sets), 4, figsize=(8, 4))
for axes, (name, images) in zip(rows, sets.items(), strict=True):
    for axis, picture in zip(
        axes, dfq.parts.to_pixels(images.images, images.contract), strict=False
    ):
        axis.imshow(picture)
        axis.axis("off")
    axes[0].set_title(name, loc="left")
figure.savefig("images.png", dpi=100)

# %% [markdown]
# ## What they are worth
#
# Ranges of activations come from the images; each network is judged on the images of the other, so
# that neither is judged on its own. Agreement and signal-to-noise are no accuracy: `dfq.evaluate`
# tells that, where there are labels.

# %%
results = []
for images, judge in itertools.permutations(sets.values()):
    result = dfq.quantize(model, images, scheme="w8a8")
    results.append(result)
    float_scores = dfq.predict(model, judge.images)
    scores = dfq.simulate(result.quantized, judge.images)
    noise = jnp.mean((scores - float_scores) ** 2) / jnp.mean(float_scores**2)
    print(f"{images.provenance['method']}: {-10 * jnp.log10(noise):.1f} dB on the other's images")

weakest = min(results[0].report.layers, key=lambda layer: layer.sqnr)
print(f"weakest layer: {weakest.name}, {weakest.sqnr:.1f} dB")

# %% [markdown]
# ## Where it goes from here
#
# Worth keeping? Then it is one file in `dfq_jax/recipes/`, one line in `recipes/presets.py`, and
# `dfq synthesize --method` knows it. `docs/ARCHITECTURE.md` shows the other kinds of parts: sources
# (generators and their latents), augmentations, memories that pass from batch to batch.

# %%
verification = results[0].verify()
print(
    f"verified: at most {verification.most_steps} step apart in {len(verification.layers)} tensors"
)
