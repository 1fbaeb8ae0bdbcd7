"""What every test runs under: 8 host devices, strict dtype promotion, 32-bit numbers."""

import contextlib
import gc
import importlib
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import pytest
import type_checks
import zoo_networks

type_checks.install()  # before the first import of dfq_jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_enable_x64", False)

STARTED = time.monotonic()
SHARED = Path(__file__).resolve().parents[2] / "shared"
WORTH_KEEPING = 0.0
"""Seconds that compiling a program takes, from which on it is kept: most take hundredths, but they
are tens of thousands."""
FEW_COLLECTIONS = 20_000
"""Objects made between two collections of garbage; tracing makes many, and few are garbage."""
MOST_PIECES = 10_000
"""Linux gives a process 65,530."""


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--time-limit SECONDS`, for runs that must end in time."""
    text = "leave out tests that would begin later than so many seconds after the start"
    parser.addoption("--time-limit", type=float, default=float("inf"), help=text)


def pytest_configure(config: pytest.Config) -> None:
    """Programs that one test compiles are there for the others, and for the next run.

    Most of the time goes into compiling. They lie in the user's cache, for all clones; `make clean`
    removes them.
    """
    # `machine.cache_folder` is not asked: jaxtyping has to see the first import of dfq_jax
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    jax.config.update("jax_compilation_cache_dir", str(cache / "dfq_jax" / "tests"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", WORTH_KEEPING)
    jax.config.update("jax_disable_most_optimizations", not is_long(config))
    gc.set_threshold(FEW_COLLECTIONS)


def is_long(config: pytest.Config) -> bool:
    """Whether the long tests run, of real networks: they run what users run.

    For the others programs are left unoptimized: compiling many tiny ones is what takes time. All
    fixtures see the same setting, since bits depend on it.
    """
    return config.option.markexpr.startswith("slow")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Leaves out what does not fit."""
    limit = item.config.option.time_limit
    if time.monotonic() - STARTED > limit:
        pytest.skip(f"left out: the time limit of {limit:.0f} s is over")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of development data and checkpoints beside the repository."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the development data in {SHARED.name}/ beside the repository")
    return SHARED


@pytest.fixture(scope="session")
def resnet20(shared: Path) -> Any:
    """`io.load.Loaded`: a CIFAR ResNet-20 that classifies JPEG CIFAR-10."""
    from dfq_jax.io.load import load

    return load(shared / "checkpoints" / "resnet20-cifar10-jpeg.pth", arch="resnet20_cifar")


@pytest.fixture(scope="session")
def torchvision() -> Any:
    """The package, after what keeps it from loading is declared; see `zoo_networks`."""
    pytest.importorskip("torch")
    try:
        zoo_networks.torchvision_models()
    except ImportError:
        pytest.skip("needs torchvision")
    return importlib.import_module("torchvision")


@contextlib.contextmanager
def optimizations(wanted: bool) -> Iterator[None]:
    """XLA's optimizations on or off for a while."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", not wanted)
    try:
        yield
    finally:
        jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def optimized() -> Iterator[None]:
    """XLA as users have it, also where programs are left unoptimized."""
    with optimizations(True):
        yield


@pytest.fixture(scope="module")
def unoptimized() -> Iterator[None]:
    """Programs left unoptimized, also among long tests: compiling many takes the time."""
    with optimizations(False):
        yield


@pytest.fixture(scope="module", autouse=True)
def dropped_programs() -> Iterator[None]:
    """Compiled programs are dropped when many have gathered.

    A process may map only so many pieces of memory, and every program takes some.
    """
    yield
    if pieces_of_memory() > MOST_PIECES:
        jax.clear_caches()


@pytest.fixture(scope="session", autouse=True)
def few_probes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Probes of small networks from few images and steps: every `quantize` makes them."""
    with pytest.MonkeyPatch.context() as patch:
        if not is_long(request.config):
            patch.setattr("dfq_jax.recipes.probes.SMALL_BASE", (8, 10))
        yield


def pieces_of_memory() -> float:
    """How many this process has mapped; infinitely many where nobody counts them."""
    try:
        with Path("/proc/self/maps").open("rb") as maps:
            return sum(1 for _ in maps)
    except OSError:
        return float("inf")


@pytest.fixture(scope="session")
def nets() -> Any:
    """The module `tests/nets.py`: hand-built networks and a NumPy evaluator."""
    return importlib.import_module("nets")


@pytest.fixture(scope="session")
def scenes() -> Any:
    """The module `tests/scenes.py`: what terms of image synthesis see, made by hand."""
    return importlib.import_module("scenes")


@pytest.fixture(scope="session")
def checkpoints() -> Any:
    """The module `tests/checkpoints.py`: files of small networks to give to `dfq`."""
    return importlib.import_module("checkpoints")


class Ran(NamedTuple):
    """How a run of `dfq` ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def data(self) -> Any:
        """The one JSON object of stdout."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        return json.loads(self.out)


@pytest.fixture
def dfq(checkpoints: Any, capsys: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `dfq` in this process, with the architecture `small` added."""

    def run(*arguments: object) -> Ran:
        from dfq_jax.cli.app import main

        capsys.readouterr()
        with checkpoints.registered(), pytest.raises(SystemExit) as caught:
            main([str(a) for a in arguments])
        assert isinstance(caught.value.code, int)
        wrote = capsys.readouterr()
        return Ran(caught.value.code, wrote.out, wrote.err)

    return run


@pytest.fixture(scope="session")
def made(checkpoints: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `net.safetensors` (of `small`), `images.npz` and the output folder `out`."""
    from dfq_jax.cli.app import main

    folder = tmp_path_factory.mktemp("made")
    net = checkpoints.write(folder / "net.safetensors")
    images, out = folder / "images.npz", folder / "out"
    common = (str(net), "--arch", checkpoints.SMALL)
    short = ("-n", "8", "--steps", "5", "--method", "zeroq")
    with checkpoints.registered():
        for line in (
            ("synthesize", *common, "-o", str(images), *short),
            ("quantize", *common, "-o", str(out), "--images", str(images)),
        ):
            with pytest.raises(SystemExit) as caught:
                main(list(line))
            assert caught.value.code == 0
    return folder


@pytest.fixture
def weights(checkpoints: Any) -> Any:
    """A `state_dict` of `small`, for a test to change."""
    return checkpoints.tensors()


@pytest.fixture
def run(
    dfq: Callable[..., Ran], checkpoints: Any, made: Path, tmp_path: Path
) -> Callable[..., Ran]:
    """Runs a verb on a network with other weights; `quantize` writes to `tmp_path / "out"`."""

    def on(verb: str, values: Any, *more: object) -> Ran:
        net = checkpoints.write(tmp_path / "net.safetensors", values)
        line = [verb, net, "--arch", "small", *more]
        if verb == "quantize":
            line += ["-o", tmp_path / "out", "--images", made / "images.npz"]
        return dfq(*line)

    return on


@pytest.fixture(scope="session")
def tiny_net(nets: Any) -> Any:
    """`Model`: a small residual network with its batch norms in place; see `nets.tiny`."""
    return nets.tiny()


@pytest.fixture(scope="session")
def mixed_net(nets: Any) -> Any:
    """`Model`: the operators that `tiny_net` lacks; see `nets.mixed`."""
    return nets.mixed()


@pytest.fixture(scope="session")
def calibrated(nets: Any) -> Callable[..., Any]:
    """Folds and calibrates `nets.tiny` or another; `floats` names a layer to leave alone."""
    from dfq_jax.passes.fold import fold_batch_norm
    from dfq_jax.quantization.calibrate import calibrate
    from dfq_jax.quantization.plan import Rule, parse_scheme, resolve

    made: dict[tuple[str, ...], Any] = {}

    def find(
        scheme: str, layers: Any = "qdrop_8bit_ends", floats: str = "", net: str = "tiny"
    ) -> Any:
        wanted = (scheme, layers, floats, net)
        if wanted not in made:
            model = fold_batch_norm(getattr(nets, net)())
            rules = [Rule(floats, keep_float=True)] if floats else []
            plan = resolve(model.graph, parse_scheme(scheme), layers, rules)
            made[wanted] = calibrate(model, plan, nets.images(model, 4))
        return made[wanted]

    return find
