"""Decisions from numbers: step times, expected gains. No tensors here."""
