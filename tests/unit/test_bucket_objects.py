"""Objects in buckets: found, read, written, and what is said where that fails; on the stand-ins for three services."""

import glob
import importlib.util
import itertools
import os
import re
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flax_mlm.errors import UserError
from flax_mlm.storage import bucket_sources, buckets, files, objects, s3
from flax_mlm.storage.bucket_sources import find, open_object
from flax_mlm.storage.gcs import Unreachable
from tests.helpers.bucket_servers import SCHEMES, forget_clients, serving

TREE = ("a/1.txt", "a/2.txt", "a/.hidden.txt", "a/b/3.txt", "a/b/c/4.txt", "a/.git/5.txt", "b.txt", "t[1]/x.txt",
        "t1/y.txt", "odd/it's 100% a;b+c.txt", "odd/ü.txt", "odd/[ab].txt", "odd/a.txt", 
        "a.txt/inside.txt")  # fmt: skip
PATTERNS = ("a/*.txt", "**", "a/**", "a/**/*.txt", "**/*.txt", "*/*.txt", "*/*/*", "a/.h*", "a/?.txt", "a/[12].txt",
            "a/[!1].txt", "b.txt", "b.tx", "odd/*", "*", "a/*/c/*", "**/c/*.txt", "a", "b.txt/**")  # fmt: skip


@pytest.fixture(scope="module", params=SCHEMES)
def server(request):
    with serving(request.param) as running:
        buckets.parse("test", running.url)
        yield running


@pytest.fixture
def bucket(server):
    yield server
    server.mend()
    for path in find("test", f"{server.url}/**"):
        buckets.delete(path.url)


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(buckets, "_PATIENCE", 0.0)
    monkeypatch.setattr(s3, "_ATTEMPTS", 1)
    forget_clients()
    yield
    forget_clients()


def test_a_glob_finds_in_a_bucket_what_it_finds_in_a_folder(bucket, tmp_path):
    for name in TREE:
        bucket.put(name, name.encode())
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(name.encode())
    for pattern in PATTERNS:
        there = glob.glob(str(tmp_path / pattern), recursive=True)
        files_there = sorted(Path(p) for p in there if os.path.isfile(p))
        expected = [str(path.relative_to(tmp_path)) for path in files_there]
        found = find("test", f"{bucket.url}/{pattern}")
        assert [f.url.removeprefix(f"{bucket.url}/") for f in found] == expected, pattern
        assert [f.size for f in found] == [len(name.encode()) for name in expected]


def test_what_exists_as_it_is_written_stands_for_itself(bucket):
    for name in TREE:
        bucket.put(name, b"x")
    for pattern, names in {
        "t[1]/*": ["t[1]/x.txt"],
        "t[1]/x.txt": ["t[1]/x.txt"],
        "odd/[ab].txt": ["odd/[ab].txt"],
        "t[12]/*": ["t1/y.txt"],
    }.items():
        assert [f.url for f in find("test", f"{bucket.url}/{pattern}")] == [f"{bucket.url}/{n}" for n in names]


NAMES = st.text("ab.", min_size=1, max_size=3).filter(lambda name: name not in (".", ".."))
PARTS = st.one_of(st.just("**"), st.text("ab.*?", min_size=1, max_size=3).filter(lambda part: "**" not in part))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(NAMES, min_size=1, max_size=4), max_size=6), st.lists(PARTS, min_size=1, max_size=4))
def test_names_match_as_those_of_files(tmp_path_factory, trees, parts):
    if any(part in (".", "..") for part in parts):
        return
    folder = tmp_path_factory.mktemp("tree")
    for names in trees:
        path = folder.joinpath(*names)
        if not path.exists() and not any(p.is_file() for p in path.parents):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    found = glob.glob("/".join(parts), root_dir=folder, recursive=True)
    expected = {os.path.normpath(name) for name in found if os.path.isfile(f"{folder}/{name}")}
    names = [str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()]
    assert {name for name in names if bucket_sources._matches(name.split("/"), parts)} == expected


def test_a_version_changes_with_the_content_alone(bucket):
    url = bucket.put("x", b"1")
    (first,) = find("test", url)
    assert find("test", f"{bucket.url}/*") == [first] == [buckets.stat(url)]
    bucket.put("x", b"2")
    assert find("test", url)[0].version != first.version
    with pytest.raises(UserError, match=r"'.*/x' was changed or deleted while it was read"):
        open_object(url, first.version)


def test_an_object_is_read_as_a_file(bucket, monkeypatch):
    monkeypatch.setattr(bucket_sources, "_FIRST_BLOCK", 1000)
    monkeypatch.setattr(bucket_sources, "_LARGEST_BLOCK", 64_000)
    content = bytes(i * i % 251 for i in range(300_000))
    url = bucket.put("f", content)
    with open_object(url) as file:
        assert file.peek(4)[:4] == content[:4]
        assert file.read() == content
        assert file.tell() == len(content)
        assert file.read(1) == b""
        for start, size in ((0, 10), (299_990, 100), (5, 200_000), (123_456, 1), (123_457, 9999)):
            file.seek(start)
            assert file.read(size) == content[start : start + size]
        assert file.seek(-3, os.SEEK_END) == len(content) - 3
        assert list(file) == [content[-3:]]
    assert open_object(bucket.put("empty", b"")).read() == b""


def test_columns_of_parquet_are_read(bucket):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    table = pyarrow.table({"text": [f"text {i}" * 20 for i in range(20_000)], "other": [os.urandom(500)] * 20_000})
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(table, sink, row_group_size=1000, compression="none", use_dictionary=False)
    with open_object(bucket.put("t.parquet", sink.getvalue().to_pybytes())) as file:
        read = parquet.ParquetFile(file).read_row_group(11, columns=["text"])
    assert read.column("text").to_pylist() == [f"text {i}" * 20 for i in range(11_000, 12_000)]


def test_few_requests_read_a_large_object_in_order(monkeypatch):
    asked = []

    def get(path, found, start, end):
        asked.append(end - start)
        return bytes(end - start)

    monkeypatch.setattr(buckets, "get", get)
    reader = bucket_sources._Reader(buckets.Found("s3://b/x", 100 << 20, "1"))
    while reader.read(1 << 16):
        pass
    assert sum(asked) == 100 << 20
    assert len(asked) < 20
    assert max(asked) == bucket_sources._LARGEST_BLOCK
    reader.seek(50 << 20)
    reader.read(10)
    assert asked[-1] == bucket_sources._FIRST_BLOCK


@pytest.mark.parametrize("change", [lambda url: buckets.delete(url), lambda url: buckets.put(url, b"y" * 50_000)])
def test_an_object_that_changes_while_it_is_read_is_an_error(bucket, monkeypatch, change):
    monkeypatch.setattr(bucket_sources, "_FIRST_BLOCK", 1000)
    url = bucket.put("x", b"x" * 50_000)
    with open_object(url) as file:
        file.read(10)
        change(url)
        with pytest.raises(UserError, match=f"'{url}' was changed or deleted while it was read") as error:
            file.read()
    assert "\n" not in str(error.value)


def test_an_object_that_is_gone(bucket):
    with pytest.raises(UserError, match=r"'.*/no such' is not there"):
        open_object(f"{bucket.url}/no such")
    with pytest.raises(FileNotFoundError):
        buckets.read(f"{bucket.url}/no such")


def test_files_are_the_same_in_folders_and_buckets(bucket, tmp_path):
    for folder in (tmp_path / "work", buckets.parse("test", f"{bucket.url}/work")):
        assert files.names(folder) == []
        assert not files.exists(folder)
        if isinstance(folder, Path):
            folder.mkdir()
        for name, content in {"b": b"12345", "a": b"", "c": b"\0" * 3_000_000}.items():
            files.write_bytes(folder / name, content)
            assert files.read_bytes(folder / name) == content
            assert files.size(folder / name) == len(content)
        files.write_text(folder / "b", "ü")
        assert files.read_bytes(folder / "b") == "ü".encode()
        assert files.names(folder) == ["a", "b", "c"]
        assert files.exists(folder)
        assert files.exists(folder / "a")
        assert files.size(folder / "d") is None
        assert files.read_ranges(folder / "c", [0, 2_999_990], [3, 10]) == [b"\0" * 3, b"\0" * 10]
        files.delete(folder / "b")
        files.delete(folder / "b")
        assert files.names(folder) == ["a", "c"]
        files.delete_folder(folder)
        files.delete_folder(folder)
        assert not files.exists(folder)
        with pytest.raises(FileNotFoundError):
            files.read_bytes(folder / "a")


def test_many_pages_of_names(bucket, monkeypatch):
    monkeypatch.setattr(objects, "PAGE", 7)
    buckets.together(lambda i: bucket.put(f"many/{i:02}", b""), range(30), bucket.url)
    assert [int(f.url[-2:]) for f in find("test", f"{bucket.url}/many/*")] == [*range(30)]
    files.delete_folder(f"{bucket.url}/many")
    assert not buckets.is_folder(f"{bucket.url}/many")


def test_a_bucket_that_is_not_there(bucket):
    url = f"{bucket.scheme}://nosuchbucket"
    for action in (lambda: buckets.check("data.corpus", f"{url}/x"), lambda: find("data.corpus", f"{url}/*")):
        with pytest.raises(UserError, match=r"^data.corpus: there is no bucket 'nosuchbucket'; create it, or correct"):
            action()
    with pytest.raises(UserError, match=r"^--output: there is no bucket 'nosuchbucket'"):
        buckets.check_writable("--output", f"{url}/x")
    with pytest.raises(UserError, match="cannot be written: there is no bucket 'nosuchbucket'"):
        buckets.put(f"{url}/x", b"")
    with pytest.raises(UserError, match=r"'.*nosuchbucket/x' is not there"):
        open_object(f"{url}/x")


@pytest.mark.parametrize("status, said", [(401, "credentials"), (403, "these credentials do not allow it")])
def test_credentials_that_do_not_suffice(bucket, status, said):
    url = bucket.put("x", b"12")
    file = open_object(url)
    bucket.fail(status)
    for action in (
        lambda: buckets.check("test", bucket.url),
        lambda: find("test", f"{bucket.url}/*"),
        lambda: buckets.put(url, b""),
        lambda: buckets.stat(url),
        lambda: buckets.read_ranges(url, [0], [2]),
        file.read,
    ):
        with pytest.raises(UserError, match=said) as error:
            action()
        assert f"'{bucket.url}" in str(error.value)
        assert "\n" not in str(error.value)


def test_what_a_server_refuses_for_another_reason(bucket):
    url = f"{bucket.url}/x"
    if bucket.scheme == "az":
        url = "az://a--b/x"
    elif bucket.scheme == "gs":
        pytest.skip("gcsfs tells such answers not apart from temporary ones")
    else:
        bucket.fail(400)
    for action in (lambda: buckets.check("test", url), lambda: buckets.put(url, b""), lambda: buckets.stat(url)):
        with pytest.raises(UserError, match=f"'{url}' cannot be used ") as error:
            action()
        assert "\n" not in str(error.value)


def test_an_endpoint_that_is_none(monkeypatch):
    pytest.importorskip("s3fs")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "not a url")
    forget_clients()
    with pytest.raises(UserError, match=r"'s3://bucket/x' cannot be used .*not a url.*; check AWS_ENDPOINT_URL"):
        buckets.check("test", "s3://bucket/x")
    forget_clients()


def test_a_wrong_key_of_an_account(bucket, monkeypatch):
    if bucket.scheme != "az":
        pytest.skip("the others check no keys")
    right = os.environ["AZURE_STORAGE_CONNECTION_STRING"]
    monkeypatch.setenv("AZURE_STORAGE_CONNECTION_STRING", re.sub("AccountKey=..", "AccountKey=xx", right))
    forget_clients()
    for action in (lambda: find("test", f"{bucket.url}/*"), lambda: buckets.put(f"{bucket.url}/x", b"")):
        with pytest.raises(UserError, match=f"'{bucket.url}.*' cannot be used: .* credentials"):
            action()
    monkeypatch.undo()
    forget_clients()


def test_a_folder_that_cannot_be_written(bucket):
    buckets.check_writable("--output", f"{bucket.url}/corpus")
    assert files.names(f"{bucket.url}/corpus") == []
    bucket.fail(403, lambda method, name: method in ("PUT", "POST"))
    with pytest.raises(UserError, match=r"^--output: '.*/corpus/.*' cannot be used: these credentials do not allow it"):
        buckets.check_writable("--output", f"{bucket.url}/corpus")


def test_a_server_that_fails_now_and_then(bucket):
    url = bucket.put("x", content := os.urandom(10_000))
    asked = itertools.count()
    bucket.fail(503, lambda method, name: next(asked) in (0, 3))
    with open_object(url) as file:
        assert file.read() == content
    assert buckets.read_ranges(url, [0, 9000], [10, 10]) == [content[:10], content[9000:9010]]
    assert next(asked) > 4


def test_an_answer_that_ends_early_is_asked_for_again(bucket):
    if bucket.scheme != "s3":
        pytest.skip("only the stand-in for S3 ends answers early")
    url, asked = bucket.put("x", b"0123456789"), itertools.count()
    bucket._fake.fault = lambda method, _, name: 0.5 if method == "GET" and name == "x" and not next(asked) else None
    with open_object(url) as file:
        assert file.read() == b"0123456789"
    assert next(asked) > 1


def test_a_server_that_goes_on_failing(bucket, impatient):
    url = bucket.put("x", b"12")
    if bucket.scheme == "gs":
        pytest.skip("gcsfs tries for half a minute")
    bucket.fail(503)
    for action in (lambda: buckets.check("test", bucket.url), lambda: open_object(url)):
        with pytest.raises(Unreachable, match=f"'{bucket.url}.*' cannot be reached") as error:
            action()
        assert "\n" not in str(error.value)


NOWHERE = {
    "s3": {"AWS_ENDPOINT_URL": "http://127.0.0.1:9", "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"},
    "az": {"AZURE_STORAGE_CONNECTION_STRING": "AccountName=a;AccountKey=YQ==;BlobEndpoint=http://127.0.0.1:9/a"},
}


@pytest.mark.parametrize("scheme", NOWHERE)
@pytest.mark.full
def test_no_network_is_said_within_a_minute(scheme, monkeypatch):
    pytest.importorskip({"s3": "s3fs", "az": "adlfs"}[scheme])
    for name, value in NOWHERE[scheme].items():
        monkeypatch.setenv(name, value)
    forget_clients()
    buckets.parse("test", f"{scheme}://bucket/x")
    begin = time.monotonic()
    with pytest.raises(Unreachable, match=f"'{scheme}://bucket/x' cannot be reached"):
        buckets.check("test", f"{scheme}://bucket/x")
    assert time.monotonic() - begin < 60
    forget_clients()


def test_no_network(impatient, monkeypatch):
    pytest.importorskip("s3fs")
    for name, value in NOWHERE["s3"].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unreachable, match=r"'s3://bucket/x' cannot be reached \(EndpointConnectionError"):
        buckets.check("test", "s3://bucket/x")


def test_no_credentials(monkeypatch, tmp_path):
    pytest.importorskip("s3fs")
    for name in list(os.environ):
        if name.startswith(("AWS_", "AZURE_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    forget_clients()
    with pytest.raises(
        UserError, match=r"'s3://bucket/x' cannot be used: there are no valid credentials .*AWS_PROFILE"
    ):
        buckets.check("test", "s3://bucket/x")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    forget_clients()
    with pytest.raises(UserError, match=r"'s3://bucket/x' cannot be used: .*nobody"):
        buckets.check("test", "s3://bucket/x")
    forget_clients()
    pytest.importorskip("adlfs")
    with pytest.raises(UserError, match=r"'az://bucket/x' cannot be used .*; set AZURE_STORAGE_CONNECTION_STRING, or"):
        buckets.parse("test", "az://bucket/x")


WRONG = {
    "http://host/x": "has the scheme http://; expected a local path, or gs://, s3:// or az://BUCKET/PATH",
    "hdfs://host/x": "has the scheme hdfs://; expected a local path",
    "s3a://b/x/*": "has the scheme s3a://; write it as s3://b/x/*",
    "abfs://box/x": "has the scheme abfs://; write it as az://box/x",
    "abfss://box@acc.dfs.core.windows.net/x/y": "write it as az://box/x/y, with AZURE_STORAGE_ACCOUNT_NAME set",
    "s3://": "'s3://' is not a path in a bucket; expected s3://BUCKET/FOLDER",
    "az://Box/x": "is not a path in a bucket; expected az://BUCKET/FOLDER",
    "s3://box/../x": "is not a path in a bucket; expected s3://BUCKET/FOLDER",
    "s3://box/x*": "contains '*', which clients of buckets interpret; rename it",
}


@pytest.mark.parametrize("text", WRONG)
def test_urls_that_are_none(text):
    with pytest.raises(UserError, match=re.escape(WRONG[text])) as error:
        buckets.parse("data.corpus", text)
    assert str(error.value).startswith(f"data.corpus: '{text}'")


def test_patterns_that_are_none():
    for text in ("s3://", "s3://box", "s3://box/", "s3://b*x/a"):
        with pytest.raises(UserError, match=f"data.source: '{re.escape(text)}' is not a path in a bucket"):
            find("data.source", text)


def test_local_paths_are_none():
    for text in ("corpora/wiki", "/a:b/c", "~/x", "s3:/b", ""):
        assert buckets.parse("x", text) is None
        assert not buckets.is_url("x", text)


@pytest.mark.parametrize(
    "scheme, package, extra", [("gs", "gcsfs", "gcs"), ("s3", "s3fs", "s3"), ("az", "adlfs", "az")]
)
def test_a_package_that_is_missing_is_named(monkeypatch, scheme, package, extra):
    spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == package else spec(name))
    said = f"x: '{scheme}://box/a' needs {package}; pip install -r launch/{extra}-requirements.txt"
    with pytest.raises(UserError, match=re.escape(said)):
        buckets.parse("x", f"{scheme}://box/a")
    with pytest.raises(UserError, match=re.escape(said)):
        find("x", f"{scheme}://box/a")
