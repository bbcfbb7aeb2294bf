"""Models by their hub names: out of a prepared cache without a network, and from a hub of this test's own."""

import functools
import http.server
import json
import os
import subprocess
import sys
import threading

import huggingface_hub.constants
import jax
import numpy as np
import pytest
import tiny

from lora_jax.interop import hf, hub

FIRST, SECOND = "a" * 40, "b" * 40


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two revisions of org/tiny: `main` is the second."""
    repo = tmp_path / "cache" / "models--org--tiny"
    for seed, commit in enumerate((FIRST, SECOND)):
        tiny.write(repo / "snapshots" / commit, seed=seed)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(SECOND)
    (repo / "refs" / "v1").write_text(FIRST)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    return repo


@pytest.mark.parametrize(
    ("name", "commit"),
    [("org/tiny", SECOND), ("org/tiny@main", SECOND), ("org/tiny@v1", FIRST), (f"org/tiny@{FIRST}", FIRST)],
)
def test_from_the_cache(cache, name, commit):
    loaded = hf.load(name)
    assert loaded.source == f"org/tiny@{commit}"
    here, other = (hf.load(cache / "snapshots" / c) for c in (commit, {FIRST: SECOND, SECOND: FIRST}[commit]))
    jax.tree.map(np.testing.assert_array_equal, loaded.params, here.params)
    assert not np.array_equal(loaded.params["embed"]["embedding"], other.params["embed"]["embedding"])
    assert hf.load(loaded.source).source == loaded.source
    assert here.source == str(cache / "snapshots" / commit)


def test_a_folder_of_that_name_comes_first(cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny.write(tmp_path / "org" / "tiny", seed=5)
    assert hf.load("org/tiny").source == "org/tiny"


@pytest.mark.parametrize("name", ["org/none", "org/tiny@none", f"org/tiny@{'c' * 40}", "org/.."])
def test_neither_here_nor_there(cache, name):
    with pytest.raises(FileNotFoundError, match="no such folder") as caught:
        hf.load(name)
    assert name in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["model", "org/model.gguf", "/org/model", "../model", "a/b/c", "org/"])
def test_paths_are_not_names(path):
    assert hub.is_name("org/model-1.5") and not hub.is_name(path)


class Hub(http.server.BaseHTTPRequestHandler):
    """As much of the hub as a download asks for."""

    def __init__(self, folder, asked, *args):
        self.folder, self.asked = folder, asked
        super().__init__(*args)

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        self.asked.append(self.path)
        parts = self.path.split("?")[0].strip("/").split("/")
        if parts[:4] == ["api", "models", "org", "tiny"] and parts[4] == "revision":
            body = json.dumps({"id": "org/tiny", "sha": SECOND}).encode()
        elif parts[:4] == ["api", "models", "org", "tiny"] and parts[4] == "tree":
            files = [
                {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": p.name} for p in self.folder.iterdir()
            ]
            body = json.dumps(files).encode()
        elif parts[:3] == ["org", "tiny", "resolve"]:
            body = (self.folder / parts[4]).read_bytes()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{parts[-1]}"')
        self.send_header("X-Repo-Commit", SECOND)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *args):
        pass


LOAD = "import sys; from lora_jax.interop import hf; print(hf.load('org/tiny', weights=sys.argv[1] == 'all').source)"


@pytest.fixture
def served(tmp_path):
    """A hub with one model and files that are not wanted; what it was asked for; and a process that loads from it."""
    folder, asked = tiny.write(tmp_path / "model"), []
    for name in ("pytorch_model.bin", "consolidated.safetensors", "README.md", "modeling_tiny.py"):
        (folder / name).write_text("not wanted")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Hub, folder, asked))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    env = {"HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HOME": str(tmp_path / "home")}

    def load(what, **more):
        return subprocess.run(
            [sys.executable, "-c", LOAD, what],
            env={**os.environ, "HF_HUB_OFFLINE": "0", **env, **more},
            capture_output=True,
            text=True,
        )

    yield load, asked
    server.shutdown()


@pytest.mark.slow
def test_downloads_what_is_needed_and_no_more(served):
    load, asked = served
    text = load("text")
    assert text.stdout.strip() == f"org/tiny@{SECOND}", text.stderr
    fetched = {path.split("/")[-1] for path in asked if "/resolve/" in path}
    assert fetched == {"config.json", "tokenizer.json", "tokenizer_config.json"}
    asked.clear()
    assert load("all").stdout.strip() == f"org/tiny@{SECOND}"
    assert {path.split("/")[-1] for path in asked if "/resolve/" in path} == {"model.safetensors"}
    asked.clear()
    assert load("all", HF_HUB_OFFLINE="1").stdout.strip() == f"org/tiny@{SECOND}"
    assert not asked
