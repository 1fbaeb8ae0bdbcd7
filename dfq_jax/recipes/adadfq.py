"""AdaDFQ: images that neither bore the student nor are beyond it, by where the networks differ.

Qian et al. 2023, "Adaptive Data-Free Quantization", as released: from the scores `D = t - s` that
the networks disagree by and `A = t + s` that they agree on,

    generator:  0.2 CE(D, y) + 0.1 CE(A, y) + [lo - H]+ + [H - hi]+ + L_bal + BNS,
                H the mean entropy of softmax(D) over log K,  lo = 0.1, hi = 0.8
    student:    -400 mean H(softmax((t - s) / 20)),   no labels

`L_bal` is `sum_k q_k log q_k` of the teacher's mean probabilities; its weight is not in the cards
and 1 here.
"""

from dfq_jax.recipes.gdfq import GDFQ_GENERATOR, gdfq
from dfq_jax.synthesis.terms.base import Term
from dfq_jax.synthesis.terms.match import batch_var_gap, matched, squared_mean
from dfq_jax.training.adaptability import agreed_labels, disagreed_labels, even_gap, kept_between
from dfq_jax.training.adversary import imbalance
from dfq_jax.training.generator import GeneratorKind
from dfq_jax.training.method import Training, generating


def adadfq(
    *,
    steps: int = 79_200,
    batch: int = 16,
    learning_rate: float = 1e-4,
    warmup: int = 800,
    disagreement: float = 0.2,
    agreement: float = 0.1,
    between: tuple[float, float] = (0.1, 0.8),
    weight: float = 400.0,
    temperature: float = 20.0,
    kind: GeneratorKind = GDFQ_GENERATOR,
) -> Training:
    """AdaDFQ on GDFQ's schedule; AdaSG takes `disagreement=0.1, between=(0.3, 0.8)`.

    Args:
      steps: of the student.
      batch: images of a step.
      learning_rate: of the student's SGD.
      warmup: steps of the generator alone.
      disagreement: weight of labels in what the networks disagree by.
      agreement: weight of labels in what they agree on.
      between: least and most entropy of the disagreement.
      weight: of the student's entropy.
      temperature: of that.
      kind: of generator.
    """
    terms = (
        Term("disagreement", disagreement, disagreed_labels, True),
        Term("agreement", agreement, agreed_labels, True),
        Term("between", 1.0, kept_between(*between), True),
        Term("balance", 1.0, imbalance, True),
        Term("BNS", 1.0, matched(batch_var_gap, squared_mean, mean=True)),
    )
    made = gdfq(steps=steps, batch=batch, learning_rate=learning_rate, warmup=warmup, kind=kind)
    student = made._replace(terms=(Term("gap", weight, even_gap(temperature=temperature), True),))
    return generating(student, "adadfq", terms=terms, against=True)
