"""Serves functions of (images, prompts) as rewards over HTTP."""

__version__ = "0.1.0"
