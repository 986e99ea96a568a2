"""A strict double of SGLang 0.5.23's server with prefill and decode apart; see README.md."""

__version__ = "0.5.23"
