"""Offline evaluation of generative recommenders, on the engine that serves them. See docs/EVALUATION.md for the protocol."""

__version__ = "0.1.0"
