"""How far can it be trusted? Retraining on subsets, and what scores are worth against it.

>>> from headwater import evaluate
>>> subsets = evaluate.halves(1000, 50, seed=0)

``retrain`` makes the truth (a :class:`Bank`), of which :class:`Datamodel` makes scores; ``lds``, ``paired`` and ``slope`` hold scores
against it, ``tuned`` chooses a setting on some queries and judges it on others, ``against`` holds them against better scores; ``replayed``
leaves examples out along a run's own batches, and ``metasmoothness`` says whether derivatives foretell anything there;
``detection_curve`` asks whether suspicious examples are indeed mislabelled.

Of explanations of inputs: ``completeness`` (do they sum?), ``deletion``, ``insertion``, ``removal``, ``comprehensiveness``, ``sufficiency`` (what happens
without the top parts?), ``infidelity``, ``sensitivity_n`` (do they predict changes?), ``max_sensitivity`` (are they stable?), ``roar`` (does a
retrained model miss the parts?), ``randomisation`` (do they depend on what was learned?), ``agreement``, ``mass_in``.
"""

from headwater.evaluate.accord import Agreement, MassIn, agreement, mass_in
from headwater.evaluate.against import Against, Judged, against
from headwater.evaluate.bank import Bank
from headwater.evaluate.completeness import Completeness, completeness
from headwater.evaluate.datamodels import LDS, Paired, SlopeResult, lds, paired, slope
from headwater.evaluate.infidelity import Infidelity, SensitivityN, gaussian, infidelity, masks, sensitivity_n
from headwater.evaluate.means import Mean
from headwater.evaluate.mislabels import Detection, auroc, detection_curve
from headwater.evaluate.randomisation import Randomisation, randomisation
from headwater.evaluate.regression import Datamodel
from headwater.evaluate.removal import Compared, Removal, Removals, comprehensiveness, deletion, insertion, removal, sufficiency
from headwater.evaluate.replayed import Metasmoothness, metasmoothness, replayed
from headwater.evaluate.retrain import retrain
from headwater.evaluate.roar import Roar, roar
from headwater.evaluate.sensitivity import MaxSensitivity, max_sensitivity
from headwater.evaluate.subsets import Subsets, halves, leave_out, removing
from headwater.evaluate.tuning import Tuned, tuned

__all__ = [
    "LDS",
    "Against",
    "Agreement",
    "Bank",
    "Compared",
    "Completeness",
    "Datamodel",
    "Detection",
    "Infidelity",
    "Judged",
    "MassIn",
    "MaxSensitivity",
    "Mean",
    "Metasmoothness",
    "Paired",
    "Randomisation",
    "Removal",
    "Removals",
    "Roar",
    "SensitivityN",
    "SlopeResult",
    "Subsets",
    "Tuned",
    "against",
    "agreement",
    "auroc",
    "completeness",
    "comprehensiveness",
    "deletion",
    "detection_curve",
    "gaussian",
    "halves",
    "infidelity",
    "insertion",
    "lds",
    "leave_out",
    "masks",
    "mass_in",
    "max_sensitivity",
    "metasmoothness",
    "paired",
    "randomisation",
    "removal",
    "removing",
    "replayed",
    "retrain",
    "roar",
    "sensitivity_n",
    "slope",
    "sufficiency",
    "tuned",
]
