"""What a user provides: per-example loss and measure, and the batches they act on."""

from headwater.tasks.batches import Examples, fingerprint
from headwater.tasks.diffusion import Diffusion, cosine, flow, linear
from headwater.tasks.draws import Draws
from headwater.tasks.task import Classification, Language, Measure, Regression, Task, log_odds, mean_tokens

__all__ = [
    "Classification", "Diffusion", "Draws", "Examples", "Language", "Measure", "Regression", "Task",
    "cosine", "fingerprint", "flow", "linear", "log_odds", "mean_tokens",
]  # fmt: skip
