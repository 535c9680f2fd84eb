"""What people use explanations for: short functions, each judged on planted truth and each with its controls beside it.

Of tables: ``select`` (which columns are worth keeping?), ``gap`` and ``equal_treatment`` (which columns carry the difference between two
groups?), ``reasons`` (why was this alert raised?).
"""

__all__: list[str] = []
