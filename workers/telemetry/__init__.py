"""Telemetry: the shared status table, the records on the control pipe, and the span recorders."""
