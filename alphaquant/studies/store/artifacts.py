"""Where trials' configurations are kept for the dashboard: a directory, or S3-compatible storage.

Both are Optuna's own artifact stores; here are the name of a place, a prefix in a bucket, and
errors in one line. Keys, addresses and regions are those of the environment, as boto3 reads it:
`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, `AWS_ENDPOINT_URL_S3`, profiles, roles.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, BinaryIO

from optuna.artifacts import Boto3ArtifactStore, FileSystemArtifactStore

from alphaquant.errors import StoreError

_S3 = "s3://"
_CONNECT_SECONDS, _READ_SECONDS, _TRIES = 10, 60, 5

ArtifactStore = Any
"""What Optuna takes for one: `open_reader`, `write`, `remove`."""


@dataclass(frozen=True)
class BucketPlace:
    """A prefix in a bucket.

    Attributes:
        bucket: its name.
        prefix: of keys, empty or with a slash at its end.
    """

    bucket: str
    prefix: str

    @property
    def shown(self) -> str:
        """The place as people write it."""
        return f"{_S3}{self.bucket}/{self.prefix}"


class BucketStore:
    """Optuna's store of a bucket, with a prefix before every key."""

    def __init__(self, place: BucketPlace) -> None:
        """Make a client; nothing is asked of the server."""
        import boto3
        from botocore.config import Config

        self._place = place
        retries = {"max_attempts": _TRIES, "mode": "standard"}
        config = Config(
            connect_timeout=_CONNECT_SECONDS, read_timeout=_READ_SECONDS, retries=retries
        )
        with _explained(place):
            self._client = boto3.client("s3", config=config)
        self._store = Boto3ArtifactStore(place.bucket, self._client)

    def check(self) -> None:
        """Ask whether the bucket is there.

        Raises:
            StoreError: it is not, or may not be used.
        """
        with _explained(self._place):
            self._client.head_bucket(Bucket=self._place.bucket)

    def open_reader(self, artifact_id: str) -> BinaryIO:
        """See Optuna."""
        with _explained(self._place):
            return self._store.open_reader(self._place.prefix + artifact_id)

    def write(self, artifact_id: str, content_body: BinaryIO) -> None:
        """See Optuna."""
        with _explained(self._place):
            self._store.write(self._place.prefix + artifact_id, content_body)

    def remove(self, artifact_id: str) -> None:
        """See Optuna."""
        with _explained(self._place):
            self._store.remove(self._place.prefix + artifact_id)


def artifact_store(place: str | Path) -> ArtifactStore:
    """The store of a directory or of `s3://BUCKET/PREFIX`; a missing directory is an empty one.

    Raises:
        StoreError: see `check_artifacts`.
    """
    if is_bucket(place):
        return BucketStore(_bucket(str(place)))
    return FileSystemArtifactStore(Path(place))


def is_bucket(place: str | Path) -> bool:
    """Whether a place is in S3-compatible storage."""
    return isinstance(place, str) and place.startswith(_S3)


def check_artifacts(url: str) -> None:
    """Refuse a place that a search cannot keep artifacts in.

    Raises:
        StoreError: no `s3://BUCKET/PREFIX`, boto3 is not installed, or the bucket is not there.
    """
    BucketStore(_bucket(url)).check()


def _bucket(url: str) -> BucketPlace:
    bucket, _, prefix = url.removeprefix(_S3).partition("/")
    if not url.startswith(_S3) or not bucket or "@" in bucket or "?" in url:
        raise StoreError(
            "--artifacts is no s3://BUCKET/PREFIX; give one, or leave it out for the artifacts "
            "directory in --out; keys and addresses are those of the environment (AWS_...)"
        )
    if find_spec("boto3") is None:
        raise StoreError(f"{url} needs the package boto3, which is absent: {_INSTALL}")
    prefix = prefix.strip("/")
    return BucketPlace(bucket, f"{prefix}/" if prefix else "")


_INSTALL = "pip install 'aq-search[s3]'"


@contextmanager
def _explained(place: BucketPlace) -> Iterator[None]:
    """What a server or boto3 says, in one line; Optuna's own errors pass."""
    from boto3.exceptions import Boto3Error
    from botocore.exceptions import BotoCoreError, ClientError

    try:
        yield
    except (Boto3Error, BotoCoreError, ClientError) as error:
        raise StoreError(
            f"artifacts in {place.shown} cannot be kept or read ({' '.join(str(error).split())}); "
            "check the bucket, the address (AWS_ENDPOINT_URL_S3) and the keys; the same command "
            "goes on"
        ) from error
