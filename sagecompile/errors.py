"""What sagecompile raises for a caller's mistake; everything else it meets becomes a kept attention call with a reason.

SageCompileError
├── OptionError        an unknown option or environment variable, or a value it cannot have
└── UnsupportedError   an op called directly with something that its format or provider cannot do; a vLLM of other names
"""


class SageCompileError(Exception):
    """Base of every error that sagecompile raises itself."""


class OptionError(SageCompileError, ValueError):
    """An option is unknown or has a value it cannot have; the message lists what is possible."""


class UnsupportedError(SageCompileError, ValueError):
    """A format, a provider or a version of vLLM cannot do what was asked of it; the message says what can be done."""
