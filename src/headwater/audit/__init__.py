"""What people use explanations for: short functions, each judged on planted truth and each with its controls beside it.

Of tables: ``select`` (which columns are worth keeping?), ``gap``, ``equal_treatment`` and ``disparity`` (which columns carry the difference
between groups?), ``reasons`` (why was this alert raised?).
Of images and series: ``adversarial`` (does an input look attacked?), ``hotspots`` and ``shortcuts`` (does a class hang on a part?), ``clusters``
(which kinds of mistakes are there?), ``drift`` (does the model use its inputs as it did?), ``switched_off``, ``unusual`` and ``flicker`` (of sensors).
Of generated images: ``owners`` (how much of their influence does an owner hold?), ``memorised`` (is one a copy?).
"""

from headwater.audit import adversarial
from headwater.audit.clusters import Clusters, clusters
from headwater.audit.drift import Drift, drift
from headwater.audit.fairness import Disparity, EqualTreatment, Gap, disparity, equal_treatment, gap
from headwater.audit.generations import Memorised, Owners, memorised, owners
from headwater.audit.reasons import Reasons, reasons
from headwater.audit.selection import Selection, select
from headwater.audit.sensors import SwitchedOff, Unusual, flicker, switched_off, unusual
from headwater.audit.shortcuts import Hotspots, Shortcut, hotspots, shortcuts

__all__ = [
    "Clusters",
    "Disparity",
    "Drift",
    "EqualTreatment",
    "Gap",
    "Hotspots",
    "Memorised",
    "Owners",
    "Reasons",
    "Selection",
    "Shortcut",
    "SwitchedOff",
    "Unusual",
    "adversarial",
    "clusters",
    "disparity",
    "drift",
    "equal_treatment",
    "flicker",
    "gap",
    "hotspots",
    "memorised",
    "owners",
    "reasons",
    "select",
    "shortcuts",
    "switched_off",
    "unusual",
]
