"""What is used where nobody says otherwise."""

from __future__ import annotations

NOWCASTER = "spectral"
"""The one that the benchmark (docs/benchmark) found best on AdamW, in every protocol and on every task."""
