"""Findings as one HTML page that a person can read, print and sign. It computes no number."""

from __future__ import annotations

from louver.report.html import render, write_report

__all__ = ["render", "write_report"]
