"""``headwater doctor``: does it compute correctly on this machine? Every check compares with something that is known otherwise.

for finding in examine():
    print(finding)                # what was checked, the measured figure, what is allowed
"""

from headwater.doctor.checks import CHECKS, Check, Finding, examine, machine

__all__ = ["CHECKS", "Check", "Finding", "examine", "machine"]
