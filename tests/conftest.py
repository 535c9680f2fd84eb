"""What all tests share: property tests that draw the same examples in every run, so that a failure is one's own doing.

To look for new ones: ``HYPOTHESIS_PROFILE=explore .venv/bin/python -m pytest tests/report``.
"""

import os

from hypothesis import settings

settings.register_profile("house", derandomize=True, deadline=None)  # a time limit would fail on a busy machine
settings.register_profile("explore", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "house"))
