"""Metrics: the spans that workers record, and the arithmetic that turns them into figures."""
