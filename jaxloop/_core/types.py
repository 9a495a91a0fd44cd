"""Types that the whole package shares."""

from __future__ import annotations

from typing import Any

PyTree = Any
