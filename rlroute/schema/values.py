"""The numbers and texts that records hold, with their limits."""

from typing import Annotated

from rlroute.limits import Between, Matches

MOST = 2**63 - 1
Whole = Annotated[int, Between(0, MOST)]
"""A count, a step or a seed."""
Signed = Annotated[int, Between(-MOST, MOST)]
Number = Annotated[float, Between(-1e100, 1e100)]
"""Larger ones cannot be averaged."""
Amount = Annotated[float, Between(0, 1e100)]
Part = Annotated[float, Between(-1e-6, 1 + 1e-6)]
"""A share of a whole, or an entropy over the largest, measured: rounding may take it a little further."""
Vio = Annotated[float, Between(-1, 1e100)]
Name = Annotated[str, Matches(r"\w[\w.+@:,=~-]*", longest=250)]
"""What may be a file's name, and begins no formula, option or path."""
Digest = Annotated[str, Matches("[0-9a-f]{64}")]
"""A SHA-256."""
ConfigHash = Annotated[str, Matches("[0-9a-f]{12}")]
Noted = Annotated[str, Matches("(?s:.*), then (?s:.*)")]
"""What has changed between the processes that trained a run one after the other: "before, then now"."""
Moment = Annotated[str, Matches(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", longest=25)]
"""A time in UTC, to the second (ISO 8601)."""
