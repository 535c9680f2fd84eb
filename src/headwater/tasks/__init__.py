"""What a user provides: per-example loss and measure, and the batches they act on."""

from headwater.tasks.batches import Examples, fingerprint
from headwater.tasks.draws import Draws
from headwater.tasks.task import Classification, Language, Measure, Regression, Task, log_odds, mean_tokens

__all__ = ["Classification", "Draws", "Examples", "Language", "Measure", "Regression", "Task", "fingerprint", "log_odds", "mean_tokens"]
