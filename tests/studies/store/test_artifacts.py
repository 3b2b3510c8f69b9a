"""Artifacts in S3-compatible storage, on a server that moto runs in this process."""

import threading
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import boto3
import optuna
import pytest
from moto.server import ThreadedMotoServer
from optuna.artifacts import download_artifact, get_all_artifact_meta

from alphaquant.commands.dashboard import DashboardSpec, address_of, open_dashboard
from alphaquant.errors import StoreError
from alphaquant.studies.store import artifacts as module
from alphaquant.studies.store.artifacts import artifact_store, check_artifacts, is_bucket
from alphaquant.studies.store.folder import (
    RunFolder,
    artifacts_of,
    claim_folder,
    default_storage,
)
from alphaquant.studies.store.study import open_study

PLACE = "s3://bucket/searches/one"


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A server with an empty bucket, found by the environment as people set it."""
    server = ThreadedMotoServer(port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://{host}:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="bucket")
    yield "bucket"
    server.stop()


def keys() -> list[str]:
    found = boto3.client("s3").list_objects_v2(Bucket="bucket").get("Contents", [])
    return [item["Key"] for item in found]


def test_a_trials_configuration_goes_to_the_bucket_and_comes_back(
    bucket: str, tmp_path: Path
) -> None:
    folder = claim_folder(tmp_path / "out", {"a": 1}, overwrite=False, bucket=PLACE)
    study = optuna.create_study()
    trial = study.ask()
    folder.attach(trial, "{}")
    (meta,) = get_all_artifact_meta(trial)
    assert keys() == [f"searches/one/{meta.artifact_id}"]
    assert not (tmp_path / "out" / "artifacts").exists()
    found = artifacts_of(tmp_path / "out")  # as a dashboard asks
    assert found == PLACE
    file = tmp_path / "config.json"
    download_artifact(
        artifact_store=artifact_store(found), artifact_id=meta.artifact_id, file_path=str(file)
    )
    assert file.read_text() == "{}"
    artifact_store(found).remove(meta.artifact_id)
    assert keys() == []


def test_the_dashboard_gives_configurations_of_the_bucket_away(
    bucket: str, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    folder = claim_folder(out, {"a": 1}, overwrite=False, bucket=PLACE)
    with open_study(default_storage(out), "s", "f") as study:
        trial = study.ask()
        folder.attach(trial, '{"default": "int4-g64"}')
        (meta,) = get_all_artifact_meta(trial)
    with open_dashboard(DashboardSpec(out)) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        address = f"{address_of(server)}artifacts/1/1/{meta.artifact_id}"
        with urllib.request.urlopen(address) as answer:
            assert answer.read() == b'{"default": "int4-g64"}'
        thread.join()


def test_a_bucket_that_is_there_passes_and_one_that_is_not_is_one_line(bucket: str) -> None:
    check_artifacts(PLACE)
    check_artifacts("s3://bucket")
    with pytest.raises(StoreError, match="artifacts in s3://other/ cannot be kept.*404") as caught:
        check_artifacts("s3://other")
    assert "\n" not in str(caught.value)
    assert "hidden" not in str(caught.value)


def test_a_server_that_is_away_is_one_line(monkeypatch: pytest.MonkeyPatch, bucket: str) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", "http://127.0.0.1:1")
    monkeypatch.setattr(module, "_TRIES", 1)
    with pytest.raises(StoreError, match="127.0.0.1:1.*check the bucket, the address") as caught:
        check_artifacts(PLACE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("url", ["s3://", "s3:///x", "gs://bucket", "s3://user:secret@bucket/x"])
def test_what_is_no_bucket_is_refused_without_showing_it(url: str) -> None:
    with pytest.raises(StoreError, match="no s3://BUCKET/PREFIX; give one, or leave it") as caught:
        check_artifacts(url)
    assert "secret" not in str(caught.value)


def test_a_missing_package_names_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    with pytest.raises(StoreError, match=r"package boto3, .*pip install 'aq-search\[s3\]'"):
        check_artifacts(PLACE)


def test_a_directory_is_a_directory(tmp_path: Path) -> None:
    assert not is_bucket(tmp_path)
    assert not is_bucket("s3")
    assert RunFolder(tmp_path).artifacts == tmp_path / "artifacts"
    assert artifacts_of(tmp_path) == tmp_path / "artifacts"
