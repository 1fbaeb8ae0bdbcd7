"""The methods of papers, and ours, as factories of values and as functions.

Recipes make images: `dfq.synthesize(model, methods.zeroq())`. Reconstructions learn or solve how
kernels are rounded: `parts.reconstruct`, or `methods=` of a `Pipeline`. Trainings teach a student:
`dfq.train(model, method=methods.gdfq())`. The others treat a whole network.
"""

from dfq_jax.quantization.kernel_shifts import correct_kernel_shifts
from dfq_jax.quantization.reestimate import reestimate_norms
from dfq_jax.quantization.side_by_side import correct_biases
from dfq_jax.recipes.aac import aac
from dfq_jax.recipes.aac_abn import aac_abn
from dfq_jax.recipes.adadfq import adadfq
from dfq_jax.recipes.adaround import adaround
from dfq_jax.recipes.ait import ait
from dfq_jax.recipes.aquant import aquant
from dfq_jax.recipes.best import best, best_unlabelled
from dfq_jax.recipes.best_rounding import best_rounding
from dfq_jax.recipes.best_training import best_training
from dfq_jax.recipes.brecq import brecq
from dfq_jax.recipes.choi import choi
from dfq_jax.recipes.clusterq import clusterq
from dfq_jax.recipes.clusterq_qat import clusterq_qat
from dfq_jax.recipes.daq import daq
from dfq_jax.recipes.deepinversion import deepinversion, deepinversion_cifar
from dfq_jax.recipes.dfkd import dfkd
from dfq_jax.recipes.dfq import dfq
from dfq_jax.recipes.dir_net import dir_net
from dfq_jax.recipes.dsg import dsg, dsg_journal
from dfq_jax.recipes.dsg_qat import dsg_qat
from dfq_jax.recipes.end_to_end import end_to_end
from dfq_jax.recipes.fdda import fdda
from dfq_jax.recipes.fdda_qat import fdda_qat
from dfq_jax.recipes.flexround import flexround
from dfq_jax.recipes.gdfq import gdfq
from dfq_jax.recipes.genie import genie
from dfq_jax.recipes.genie_m import genie_m
from dfq_jax.recipes.gzsq import gzsq
from dfq_jax.recipes.hard_samples import hard_samples
from dfq_jax.recipes.hast import hast
from dfq_jax.recipes.intraq import intraq
from dfq_jax.recipes.intraq_qat import intraq_qat
from dfq_jax.recipes.ir_net import ir_net
from dfq_jax.recipes.knowledge_within import knowledge_within
from dfq_jax.recipes.lq_nets import lq_nets
from dfq_jax.recipes.lq_nets_qat import lq_nets_qat
from dfq_jax.recipes.mct import mct
from dfq_jax.recipes.mixed import mixed
from dfq_jax.recipes.noise import noise
from dfq_jax.recipes.pd_quant import pd_quant
from dfq_jax.recipes.psaq_vit import psaq_vit
from dfq_jax.recipes.qdrop import qdrop
from dfq_jax.recipes.qimera import qimera
from dfq_jax.recipes.quantface import quantface
from dfq_jax.recipes.quantized import Quantized
from dfq_jax.recipes.sardfq import sardfq
from dfq_jax.recipes.shot import shot
from dfq_jax.recipes.squant import squant
from dfq_jax.recipes.stages import stages
from dfq_jax.recipes.stochastic import stochastic
from dfq_jax.recipes.synq import synq
from dfq_jax.recipes.udfc import udfc_rounding
from dfq_jax.recipes.vertical_layered import vertical_layered
from dfq_jax.recipes.zaq import zaq
from dfq_jax.recipes.zeroq import zeroq
from dfq_jax.recipes.zhu import zhu, zhu_pruning
from dfq_jax.recipes.zsaq import zsaq
from dfq_jax.reconstruction.closed_form import ClosedForm as closed_form
from dfq_jax.synthesis.terms.estimates import estimated
from dfq_jax.synthesis.terms.one_class import centres_for

__all__ = [
    "Quantized",
    "aac",
    "aac_abn",
    "adadfq",
    "adaround",
    "ait",
    "aquant",
    "best",
    "best_rounding",
    "best_training",
    "best_unlabelled",
    "brecq",
    "centres_for",
    "choi",
    "closed_form",
    "clusterq",
    "clusterq_qat",
    "correct_biases",
    "correct_kernel_shifts",
    "daq",
    "deepinversion",
    "deepinversion_cifar",
    "dfkd",
    "dfq",
    "dir_net",
    "dsg",
    "dsg_journal",
    "dsg_qat",
    "end_to_end",
    "estimated",
    "fdda",
    "fdda_qat",
    "flexround",
    "gdfq",
    "genie",
    "genie_m",
    "gzsq",
    "hard_samples",
    "hast",
    "intraq",
    "intraq_qat",
    "ir_net",
    "knowledge_within",
    "lq_nets",
    "lq_nets_qat",
    "mct",
    "mixed",
    "noise",
    "pd_quant",
    "psaq_vit",
    "qdrop",
    "qimera",
    "quantface",
    "reestimate_norms",
    "sardfq",
    "shot",
    "squant",
    "stages",
    "stochastic",
    "synq",
    "udfc_rounding",
    "vertical_layered",
    "zaq",
    "zeroq",
    "zhu",
    "zhu_pruning",
    "zsaq",
]
