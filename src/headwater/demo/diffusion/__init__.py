"""``headwater demo diffusion``: a small diffusion model, its generations traced by TracIn and ReTrac, and one page.

study = measure(FULL, Path("runs/demo-diffusion"), teller)     # train, generate, trace, count: numbers
report.write(page(study), "demo.html")                         # the same numbers as a page
"""

from headwater.demo.diffusion.experiment import FULL, QUICK, Size, experiment
from headwater.demo.diffusion.page import headline, page
from headwater.demo.diffusion.study import Study, measure, plan

__all__ = ["FULL", "QUICK", "Size", "Study", "experiment", "headline", "measure", "page", "plan"]
