"""Attention whose scores are scaled by a function of the widths."""

from __future__ import annotations





