"""What people use explanations for: short functions, each judged on planted truth and each with its controls beside it.

Of tables: ``select`` (which columns are worth keeping?), ``gap``, ``equal_treatment`` and ``disparity`` (which columns carry the difference
between groups?), ``reasons`` (why was this alert raised?).
"""

from headwater.audit.fairness import Disparity, EqualTreatment, Gap, disparity, equal_treatment, gap
from headwater.audit.reasons import Reasons, reasons
from headwater.audit.selection import Selection, select

__all__ = ["Disparity", "EqualTreatment", "Gap", "Reasons", "Selection", "disparity", "equal_treatment", "gap", "reasons", "select"]
