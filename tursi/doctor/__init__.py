"""``tursi doctor``: what commonly goes wrong on a machine, with advice.

``facts`` looks at the machine and judges nothing; ``checks`` judges and looks at nothing.
"""

from tursi.doctor.checks import Finding, Level, examine
from tursi.doctor.facts import Facts, collect

__all__ = ["Facts", "Finding", "Level", "collect", "examine"]
