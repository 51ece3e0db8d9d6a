"""What sagecompile raises for a caller's mistake; everything else it meets becomes a kept attention call with a reason.

SageCompileError
├── OptionError        an unknown option or environment variable, or a value it cannot have
└── UnsupportedError   something that a format, a provider, this machine or this version of vLLM cannot do
"""


class SageCompileError(Exception):
    """Base of every error that sagecompile raises itself."""


class OptionError(SageCompileError, ValueError):
    """An option is unknown or has a value it cannot have; the message lists what is possible."""


class UnsupportedError(SageCompileError, ValueError):
    """A format, provider, machine or version of vLLM cannot do what was asked; the message says what it can."""
