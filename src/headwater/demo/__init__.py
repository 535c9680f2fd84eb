"""``headwater demo``: what Headwater does, on two cores in a few minutes, ending in one page.

study = measure(FULL, Path("runs/demo"), teller)     # record, trace, retrain, compare: numbers
report.write(page(study), "demo.html")               # the same numbers as a page
"""

from headwater.demo.experiment import FULL, QUICK, Size, experiment
from headwater.demo.page import headline, page
from headwater.demo.study import Study, measure

__all__ = ["FULL", "QUICK", "Size", "Study", "experiment", "headline", "measure", "page"]
