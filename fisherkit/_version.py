"""The version, read by the package and recorded in Fisher files."""

__version__ = "0.1.0"
