"""Which release of this package runs."""

from importlib.metadata import PackageNotFoundError, version


def product_version() -> str:
    """The installed version, or "unknown" where the package runs without being installed."""
    try:
        return version("nanovllm-grpc")
    except PackageNotFoundError:
        return "unknown"
