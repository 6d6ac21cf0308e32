"""mesh-transformer-jax checkpoints: joined as that project's own model reads its shards."""

from __future__ import annotations

import json
import tarfile
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from torch import Tensor

from gptj_stream.checkpoint.source import Checkpoint
from gptj_stream.config import ModelConfig
from gptj_stream.errors import UserError
from gptj_stream.executor import model_layouts
from gptj_stream.report import Report
from gptj_stream.store import ResidentStore


def weights(source: Checkpoint, tiny: Any) -> dict[str, Tensor]:
    store = ResidentStore(model_layouts(source.config), device=torch.device("cpu"), dtype=torch.float32)
    source.load(store, Report())
    found: dict[str, Tensor] = tiny.weights(store)
    return found


@pytest.mark.parametrize("shards", [1, 2, 4])
@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [("f4", 1e-6), ("f2", 1e-3), ("V2", 8e-3)])
def test_every_weight(
    shards: int, full: bool, dtype: str, error: float, mesh: Any, mesh_config: ModelConfig, tiny: Any, tmp_path: Path
) -> None:
    made = mesh(shards)
    folder = made.write(tmp_path / "step_383500", dtype=dtype, full=full)
    (tmp_path / "6B.json").write_text(json.dumps(made.values()))
    source = Checkpoint(folder)
    assert source.config == mesh_config.model_copy(update={"n_inner": None})
    assert source.step == 383_500
    assert source.dtype == {"f4": torch.float32, "f2": torch.float16, "V2": torch.bfloat16}[dtype]
    found = weights(source, tiny)
    for name, parameter in tiny.oracle(mesh_config).named_parameters():
        # half a unit of the last place of values below 5, of which some are sums
        largest = 5 * shards if name.endswith(("wte.weight", "fc_out.bias")) else float(parameter.detach().abs().max())
        assert float((found[name] - parameter.detach()).abs().max()) <= error * largest, name


def test_sums_over_shards_are_not_rounded_to_bf16(mesh: Any, tiny: Any, tmp_path: Path) -> None:
    made = mesh(4)
    source = Checkpoint(made.write(tmp_path / "a", dtype="V2"), config(made, tmp_path))
    bias = weights(source, tiny)["transformer.h.10.mlp.fc_out.bias"]
    module = "causal_transformer_shard/~/layer_10/~/linear_5"
    parts = [torch.from_numpy(tree[module]["b"]).bfloat16().float() for tree in made.trees]
    assert torch.equal(bias, torch.stack(parts).sum(0))
    assert not torch.equal(bias, bias.bfloat16().float())


def config(made: Any, folder: Path, **changed: object) -> Path:
    path = folder / "mesh.json"
    path.write_text(json.dumps(made.values() | changed))
    return path


def test_logits_of_that_projects_model(mesh: Any, tiny: Any, tmp_path: Path) -> None:
    """Its forward pass once more, in JAX over the shards as they are on disk."""
    import jax  # noqa: PLC0415  (seconds)
    import jax.numpy as jnp  # noqa: PLC0415

    made = mesh(2)
    source = Checkpoint(made.write(tmp_path / "a"), config(made, tmp_path))
    ids = np.random.default_rng(1).integers(made.config.vocab_size, size=23)
    model = tiny.oracle(source.config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights(source, tiny)[name])
        ours = model(torch.from_numpy(ids)[None]).logits[0].numpy()

    values, shards = made.values(), made.trees
    heads, width = values["n_heads"] // 2, values["d_model"] // values["n_heads"]
    turned, length = values["pe_rotary_dims"], len(ids)

    def part(shard: int, module: str) -> dict[str, Any]:
        return {name: jnp.asarray(x) for name, x in shards[shard][f"causal_transformer_shard/~/{module}"].items()}

    def linear(x: Any, p: dict[str, Any]) -> Any:
        return x @ p["w"] + p.get("b", 0.0)

    def norm(x: Any, module: str) -> Any:  # of the first shard, which all of them gather
        p = part(0, module + "replicated_layer_norm")
        mean, variance = jnp.mean(x, -1, keepdims=True), jnp.var(x, -1, keepdims=True)
        return p["scale"] * jax.lax.rsqrt(variance + 1e-5) * (x - mean) + p["offset"]

    def rotate(x: Any) -> Any:
        angle = jnp.outer(jnp.arange(length), 1.0 / 10000 ** (jnp.arange(0, turned, 2) / turned))
        sin, cos = (jnp.repeat(f(angle), 2, axis=-1)[:, None] for f in (jnp.sin, jnp.cos))
        head = x[..., :turned]
        swapped = jnp.stack((-head[..., 1::2], head[..., ::2]), -1).reshape(head.shape)
        return jnp.concatenate((head * cos + swapped * sin, x[..., turned:]), -1)

    rows = values["n_vocab"] // 2
    x = sum(
        linear(jax.nn.one_hot(ids - shard * rows, rows), part(shard, "embedding_shard/~/linear")) for shard in (0, 1)
    )
    mask = jnp.tril(jnp.ones((length, length)))
    for layer in range(values["layers"]):
        here = f"layer_{layer}/~/"
        h, out = norm(x, here), 0.0
        for shard in (0, 1):
            q, v, k = (
                linear(h, part(shard, here + name)).reshape(length, heads, width)
                for name in ("linear", "linear_1", "linear_2")
            )
            scores = jnp.einsum("thd,Thd->htT", rotate(q), rotate(k)) / width**0.5 - 1e10 * (1 - mask)
            mixed = jnp.einsum("htT,Thd->thd", jax.nn.softmax(scores), v).reshape(length, -1)
            inner = jax.nn.gelu(linear(h, part(shard, here + "linear_4")))
            out += linear(mixed, part(shard, here + "linear_3")) + linear(inner, part(shard, here + "linear_5"))
        x = x + out
    h = norm(x, "projection_shard/~/")
    theirs = np.concatenate([linear(h, part(shard, "projection_shard/~/linear")) for shard in (0, 1)], -1)
    # fp32 in another order of sums, through eleven blocks
    assert np.abs(ours - theirs).max() < 1e-4 * np.abs(theirs).max()


def test_the_order_of_leaves_is_haikus(mesh: Any) -> None:
    """The same modules, made in that project's order, named and flattened by haiku and JAX."""
    import haiku as hk  # noqa: PLC0415  (seconds)
    import jax  # noqa: PLC0415
    import jax.numpy as jnp  # noqa: PLC0415

    made = mesh(2)
    d, layers = made.config.n_embd, made.config.n_layer

    class ReplicatedLayerNorm(hk.Module):  # type: ignore[misc,name-defined]
        def __call__(self, x: Any) -> Any:
            scale = hk.get_parameter("scale", x.shape[-1:], init=jnp.ones)
            return x * scale + hk.get_parameter("offset", x.shape[-1:], init=jnp.zeros)

    class EmbeddingShard(hk.Module):  # type: ignore[misc,name-defined]
        def __init__(self, name: str | None = None) -> None:
            super().__init__(name=name)
            self.proj = hk.Linear(d)

    class Layer(hk.Module):  # type: ignore[misc,name-defined]
        def __init__(self, name: str) -> None:
            super().__init__(name=name)
            self.norm = ReplicatedLayerNorm()
            self.parts = [hk.Linear(d, with_bias=number > 3) for number in range(6)]

    class ProjectionShard(hk.Module):  # type: ignore[misc,name-defined]
        def __init__(self, name: str | None = None) -> None:
            super().__init__(name=name)
            self.norm = ReplicatedLayerNorm()
            self.proj = hk.Linear(d)

    class CausalTransformerShard(hk.Module):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.parts = [Layer(f"layer_{number}") for number in range(layers)]
            self.embed, self.proj = EmbeddingShard(), ProjectionShard()

        def __call__(self, x: Any) -> None:
            for module in (self.embed, *self.parts, self.proj):
                for part in [module.proj] if hasattr(module, "proj") else module.parts:
                    part(x)
                if hasattr(module, "norm"):
                    module.norm(x)

    def forward(x: Any) -> None:
        CausalTransformerShard()(x)  # modules are made inside of a transformation

    parameters = hk.transform(forward).init(jax.random.PRNGKey(0), jnp.ones((1, d)))
    state = {"params": parameters, "step": 0, "opt_state": 0}
    paths = ["/".join(str(key.key) for key in path) for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
    tree = made.trees[0]
    assert paths == [
        "opt_state",
        *(f"params/{module}/{name}" for module in sorted(tree) for name in sorted(tree[module])),
        "step",
    ]


def pack(folder: Path, path: Path, *, compress: bool = True, prefix: str = "step_383500/") -> Path:
    stream = BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        archive.add(folder, prefix.rstrip("/") or ".")
    content = stream.getvalue()
    path.write_bytes(zstandard.compress(content) if compress else content)
    return path


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("prefix", ["step_383500/", "./", "a/b/step_1/"])
def test_an_archive_as_it_is_released(compress: bool, prefix: str, mesh: Any, tiny: Any, tmp_path: Path) -> None:
    made = mesh(2)
    folder = made.write(tmp_path / "there" / "a")
    path = pack(folder, tmp_path / "step_383500_slim.tar.zstd", compress=compress, prefix=prefix)
    config(made, tmp_path)
    source = Checkpoint(path)
    found, expected = weights(source, tiny), weights(Checkpoint(folder, tmp_path / "mesh.json"), tiny)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert (source.step, source.format) == (383_500, "mesh-transformer-jax archive")
    assert len(list(tmp_path.iterdir())) == 4  # with what was unpacked
    del source
    assert sorted(each.name for each in tmp_path.iterdir()) == ["mesh.json", path.name, "there"]


@pytest.mark.parametrize("name", ["../shard_0/0.npz", "/tmp/shard_0/0.npz", "a/../../shard_0/0.npz"])
def test_members_outside_the_archive(name: str, tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    with pytest.raises(UserError, match=r"lies outside the archive; refused"):
        Checkpoint(tmp_path / "a.tar")
    assert [each.name for each in tmp_path.iterdir()] == ["a.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_members_that_are_no_files(kind: bytes, tmp_path: Path) -> None:
    member = tarfile.TarInfo("step_1/shard_0/0.npz")
    member.type, member.linkname = kind, "/etc/passwd"
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        archive.addfile(member)
    with pytest.raises(UserError, match=r"is a link, or lies outside"):
        Checkpoint(tmp_path / "a.tar")


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_names_that_are_bombs(kind: bytes, tmp_path: Path) -> None:
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 1 << 24
    content = header.tobuf() + bytes(1 << 24) + bytes(1024)
    (tmp_path / "a.tar.zstd").write_bytes(zstandard.compress(content))
    with pytest.raises(UserError, match=r"a\.tar\.zstd: damaged"):
        Checkpoint(tmp_path / "a.tar.zstd")
    assert [each.name for each in tmp_path.iterdir()] == ["a.tar.zstd"]


def test_what_a_killed_process_unpacked_goes(mesh: Any, tmp_path: Path) -> None:
    made = mesh(1)
    path = pack(made.write(tmp_path / "there" / "a"), tmp_path / "a.tar.zstd")
    config(made, tmp_path)
    stale = tmp_path / ".a.tar.zstd.unpacked"
    stale.mkdir()
    (stale / "x").write_text("left")
    source = Checkpoint(path)
    assert not (stale / "x").exists()
    with pytest.raises(UserError, match=r"another process is at it"):
        Checkpoint(path)
    del source
    assert not stale.exists()


def test_configurations_beside(mesh: Any, tmp_path: Path) -> None:
    """Other JSON is passed over; two that differ are one too many."""
    made = mesh(2)
    folder = made.write(tmp_path / "a")
    config(made, tmp_path)
    for name, content in (("b.json", "[1]"), ("c.json", "{"), ("._mesh.json", "x"), ("d.json", '{"d_model": 1}')):
        (tmp_path / name).write_text(content)
    (tmp_path / "same.json").write_text((tmp_path / "mesh.json").read_text())
    assert Checkpoint(folder).config.n_head == made.config.n_head
    (tmp_path / "other.json").write_text(json.dumps(made.values() | {"n_heads": 2}))
    with pytest.raises(UserError, match=r"several configurations \(mesh\.json, other\.json, same\.json\)"):
        Checkpoint(folder)


@pytest.mark.parametrize("share", [0.0001, 0.3, 0.9])
@pytest.mark.parametrize("compress", [True, False])
def test_an_archive_cut_short(share: float, compress: bool, mesh: Any, tmp_path: Path) -> None:
    made = mesh(2)
    path = pack(made.write(tmp_path / "there" / "a"), tmp_path / "a.tar.zstd", compress=compress)
    content = path.read_bytes()
    path.write_bytes(content[: max(600, int(len(content) * share))])
    config(made, tmp_path)
    with pytest.raises(UserError):
        Checkpoint(path)
    assert len(list(tmp_path.iterdir())) == 3


Damage = Callable[[Path], None]


def rewrite(name: str, change: Callable[[list[np.ndarray]], list[np.ndarray]]) -> Damage:
    def damage(folder: Path) -> None:
        path = folder / name
        with np.load(path, allow_pickle=False) as found:
            arrays = [found[f"arr_{i}"] for i in range(len(found.files))]
        np.savez(path, *change(arrays))

    return damage


def cut(name: str, size: int) -> Damage:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes((folder / name).read_bytes()[:size])

    return damage


def replaced(name: str, old: bytes, new: bytes) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        assert old in content
        (folder / name).write_bytes(content.replace(old, new))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "shard_1" / "7.npz").unlink(), r"7\.npz: no such file"),
        (lambda folder: (folder / "shard_1").rename(folder / "shard_2"), r"shard_1 is missing"),
        (cut("shard_0/3.npz", 400), r"3\.npz: not a whole zip archive"),
        (rewrite("shard_1/15.npz", lambda arrays: arrays[:-1]), r"not how one list of them is cut"),
        (rewrite("shard_0/0.npz", lambda arrays: [*arrays, arrays[0]]), r"not how one list of them is cut"),
        (rewrite("shard_0/0.npz", lambda arrays: [arrays[1], arrays[0], *arrays[2:]]), r"embedding"),
        (rewrite("shard_0/1.npz", lambda arrays: [x[:-1] for x in arrays]), r"1\.npz: arr_\d+\.npy, .* must be"),
        (rewrite("shard_1/2.npz", lambda arrays: [x.astype(object) for x in arrays]), r"only C-ordered"),
        (rewrite("shard_1/2.npz", lambda arrays: [np.asfortranarray(x) for x in arrays]), r"only C-ordered"),
        (rewrite("shard_1/2.npz", lambda arrays: [x.astype(">f4") for x in arrays]), r"only C-ordered"),
        (rewrite("shard_1/2.npz", lambda arrays: [x.astype("i8") for x in arrays]), r"only C-ordered"),
        (rewrite("shard_1/2.npz", lambda arrays: [x.astype("i4") for x in arrays]), r"must be"),
        (replaced("shard_0/1.npz", b"(32, 16)", b"(92, 16)"), r"does not have the size of its data"),
        (replaced("shard_0/1.npz", b"(32, 16), } ", b"(999999,), }"), r"does not have the size of its data"),
        (replaced("shard_0/1.npz", b"'shape': (32, 16), }" + b" " * 30, b"'shape': (" + b"1" * 40), r"only C-ordered"),
        (replaced("shard_0/1.npz", b"\x93NUMPY", b"\x93NOMPY"), r"is no NumPy array of version 1"),
    ],
)
def test_damage(damage: Damage, message: str, mesh: Any, tmp_path: Path, tiny: Any) -> None:
    made = mesh(2)
    folder = made.write(tmp_path / "a")
    file = config(made, tmp_path)
    damage(folder)
    with pytest.raises(UserError, match=message):
        weights(Checkpoint(folder, file), tiny)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"layers": 10}, r"115 arrays .* 10 layers|117 arrays a shard; 10 layers \(.*\) make 107, or 321"),
        ({"d_model": 64}, r"d_model is 64; .* has an embedding bias of \(32,\)"),
        ({"n_vocab": 208}, r"must be \(104, 32\)"),
        ({"n_vocab": 105}, r"must be multiples of 2 shards"),
        ({"n_heads": 3}, r"must be multiples of 2 shards"),
        ({"cores_per_replica": 8}, r"cores_per_replica is 8; there are 2 shards"),
        ({"pe": "fixed"}, r"pe is 'fixed'; GPT-J has 'rotary'"),
        ({"norm": "rmsnorm"}, r"norm is 'rmsnorm'"),
        ({"pe_rotary_dims": 64}, r"rotary_dim 64 must be even and at most the head size 8"),
        ({"layers": 1e9}, r"layers is 1000000000\.0"),
        ({"layers": 10**9}, r"layers is 1000000000"),
        ({"layers": None}, r"layers is None"),
    ],
)
def test_a_configuration_of_another_model(changed: dict[str, Any], message: str, mesh: Any, tmp_path: Path) -> None:
    made = mesh(2)
    folder = made.write(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        Checkpoint(folder, config(made, tmp_path, **changed))


def test_without_a_configuration_it_must_be_the_6b(mesh: Any, tmp_path: Path) -> None:
    folder = mesh(2).write(tmp_path / "x" / "a")
    with pytest.raises(UserError, match=r"28 layers \(GPT-J-6B's configuration, as no other is beside it"):
        Checkpoint(folder)


def test_several_steps(mesh: Any, tmp_path: Path) -> None:
    made = mesh(1)
    made.write(tmp_path / "step_1")
    config(made, tmp_path)
    assert Checkpoint(tmp_path).step == 383_500
    made.write(tmp_path / "step_2")
    with pytest.raises(UserError, match=r"holds 2 checkpoints; name one of them: .*step_2"):
        Checkpoint(tmp_path)
