"""Serving pictures to many customers: what each of them forbids, and the audit of what was done for every picture."""
