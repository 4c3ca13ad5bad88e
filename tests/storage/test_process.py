"""Storage processes that write and read back what arenas have: split tensors, replicas on several nodes, shards; and what they refuse."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from torch.distributed import checkpoint as dcp

from lightning_gemini.snapshot import arena
from lightning_gemini.snapshot.slots import SlotFile
from lightning_gemini.state.catalogue import Entry
from lightning_gemini.state.ownership import Layout, owned
from lightning_gemini.storage import catalog, layout, messages, process
from lightning_gemini.storage.description import Description, Value, publish
from lightning_gemini.storage.layout import Key, Part, decode, part_file
from tests.storage.helpers import CHUNK, Node, files_of, nodes

STEP = 7


def tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {
        "param/a": torch.randn(33, 17, generator=made),
        "param/b": torch.randn(5, generator=made).bfloat16(),
        "param/c": torch.tensor(float("nan")),
        "param/empty": torch.empty(0, 3),
        "optim/0/0/exp_avg": torch.randn(33, 17, generator=made, dtype=torch.float64),
        "optim/0/0/step": torch.tensor(7.0),
        "optim/0/1/mask": torch.tensor([True, False, True]),
    }


def replicated(ranks: int) -> list[list[Entry]]:
    """Of each rank under DDP."""
    holders = tuple(range(ranks))
    return [[Entry(name, t, holders, "", tuple(t.shape), (0,) * t.dim()) for name, t in tensors().items()] for _ in holders]


def sharded(ranks: int, replicas: int = 1, *, near: bool = False) -> list[list[Entry]]:
    """Of each rank, tensors cut along their first dimension; `replicas` ranks hold the same (HSDP): neighbours, or far apart."""
    found = []
    cuts = ranks // replicas
    for rank in range(ranks):
        shard = rank // replicas if near else rank % cuts
        holders = tuple(range(shard * replicas, (shard + 1) * replicas)) if near else tuple(range(shard, ranks, cuts))
        mine = []
        for name, tensor in tensors().items():
            if tensor.dim() == 0:
                mine.append(Entry(name, tensor, (rank,), f"r{rank}", (), ()))
                continue
            chunks = tensor.chunk(cuts)
            part = chunks[shard].contiguous() if shard < len(chunks) else tensor[:0]
            begin = sum(len(chunk) for chunk in chunks[:shard]) if len(part) else 0
            mine.append(Entry(name, part, holders, str(holders[0]), tuple(tensor.shape), (begin,) + (0,) * (tensor.dim() - 1)))
        found.append(mine)
    return found


def fill(made: list[Node], entries: list[list[Entry]], step: int = STEP) -> None:
    """What the ranks of all nodes write, and what rank 0 says of it."""
    per_node = len(made[0].ranks)
    for rank, mine in enumerate(entries):
        share = owned(mine, Layout(rank, len(entries), per_node, min(2, len(made))))
        file = SlotFile(made[rank // per_node].arenas[rank % per_node])
        need = arena.payload_size(share, CHUNK, b"local")
        if file.capacity < need:
            file.allocate(need)
        arena.capture(file, step, share, chunk=CHUNK, local=f"local {rank}".encode())
        file.close()
    keys = [Key(("state", name.replace("/", "_")), name) for name in tensors()] + [Key(("extra",), "v/e"), Key(("buffer",), "v/b")]
    said = Description(keys, {"v/e": _saved({"x": 1})}, [Value("v/b", "int32", (2,), struct.pack("<2i", 1, 2))], b"m")
    publish(SlotFile(made[0].description), step, msgspec.msgpack.encode(said))


def _saved(value: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


def persist(made: list[Node], url: Path | str, step: int = STEP) -> str:
    path = f"{url}/{layout.directory(step, 'a')}"
    for node in made:
        node.persist(path, step, node.number, len(made))
    made[0].ask(messages.Commit, messages.Committed, path=path, step=step, nodes=[node.number for node in made])
    return path


LAYOUTS = {
    "ddp, 1 node of 2": (replicated(2), [[0, 1]]),
    "ddp, 1 node of 3": (replicated(3), [[0, 1, 2]]),
    "ddp, 2 nodes of 2": (replicated(4), [[0, 1], [2, 3]]),
    "fsdp, 1 node of 2": (sharded(2), [[0, 1]]),
    "fsdp, 2 nodes of 2": (sharded(4), [[0, 1], [2, 3]]),
    "hsdp, replicas on 2 nodes": (sharded(4, 2), [[0, 1], [2, 3]]),
    "hsdp, replicas on each node": (sharded(4, 2, near=True), [[0, 1], [2, 3]]),
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    """Plain DCP sees whole tensors, and lost arenas come back bit for bit."""
    entries, ranks = LAYOUTS[name]
    with nodes(*ranks) as made:
        fill(made, entries)
        before = [node.contents() for node in made]
        path = persist(made, tmp_path)
        state: dict[str, Any] = {"state": {key.replace("/", "_"): torch.zeros_like(t) for key, t in tensors().items()}, "extra": None}
        state["buffer"] = torch.zeros(2, dtype=torch.int32)
        dcp.load(state, checkpoint_id=path)
        for key, tensor in tensors().items():
            assert state["state"][key.replace("/", "_")].flatten().view(torch.uint8).equal(tensor.flatten().view(torch.uint8)), key
        assert state["extra"] == {"x": 1} and state["buffer"].tolist() == [1, 2]
        for node in made:
            node.wipe()
            assert node.ask(messages.Fill, messages.Filled, path=path, places=node.places()).step == STEP
        assert [node.contents() for node in made] == before


def test_each_tensor_is_written_once(tmp_path: Path) -> None:
    with nodes([0, 1], [2, 3]) as made:
        fill(made, replicated(4))
        path = Path(persist(made, tmp_path))
        parts = [decode((path / part_file(node)).read_bytes(), Part, "part") for node in (0, 1)]
    names = [box.name for part in parts for box in part.boxes]
    assert sorted(names) == sorted(tensors()), "by one node each"
    assert all(part.boxes for part in parts), "spread over both"


def test_a_tensor_that_two_nodes_have_written(tmp_path: Path) -> None:
    """Bytes that too few nodes hold travel from each of them: then both write them, and the first counts."""
    with nodes([0, 1], [2, 3]) as made:
        fill(made, replicated(4))
        path = f"{tmp_path}/step-7.a"
        for node in made:
            node.persist(path, STEP)
        made[0].ask(messages.Commit, messages.Committed, path=path, step=STEP, nodes=[0, 1])
    state = {"state": {"param_a": torch.zeros(33, 17)}}
    dcp.load(state, checkpoint_id=path)
    assert state["state"]["param_a"].equal(tensors()["param/a"])


def test_the_files_of_a_checkpoint(tmp_path: Path) -> None:
    with nodes([0, 1]) as made:
        fill(made, replicated(2))
        path = persist(made, tmp_path)
    assert files_of(Path(path)) == sorted(
        [".metadata", "__0_0.distcp", "__names_0.distcp", "meta.pt", "gemini/checkpoint.json", "gemini/format", "gemini/names"]
        + ["gemini/node-0.part", "gemini/rank-0.state", "gemini/rank-1.state"]
    )
    about = catalog.summary(path)
    assert (about.step, about.world, about.nodes) == (STEP, 2, 1)
    assert catalog.newest(str(tmp_path)) == catalog.Checkpoint(STEP, path)


def test_a_job_begins(tmp_path: Path) -> None:
    with nodes([0, 1]) as made:
        fill(made, replicated(2))
        (node,) = made
        url = str(tmp_path / "new")
        assert node.ask(messages.Open, messages.Opened, url=url) == messages.Opened(id=1)
        path = persist(made, url)
        found = node.ask(messages.Open, messages.Opened, url=url)
        assert (found.path, found.step, found.world, found.nodes) == (path, STEP, 2, 1)
        refused = node.ask(messages.Open, messages.Failed, url=url, resume="never")
        assert "has a newer checkpoint of step 7" in refused.error
        assert files_of(tmp_path / "new") == [f"step-7.a/{name}" for name in files_of(Path(path))], "nothing is left of the probe"


@pytest.mark.parametrize("url", ["nosuch://x", "/proc/no/such", "memory_://"])
def test_a_place_that_cannot_be_written(url: str) -> None:
    with nodes([0]) as (node,):
        refused = node.ask(messages.Open, messages.Failed, url=url)
        assert f"persistent.url={url!r} cannot be used" in refused.error


def test_the_process_that_users_get(tmp_path: Path) -> None:
    """A fresh interpreter, not a fork."""
    with nodes([0]) as (node,):
        fill([node], replicated(1))
        node.process = process.StorageProcess.start(process.spawner(), arenas=node.arenas, description=node.description)
        path = f"{tmp_path}/{layout.directory(STEP, 'a')}"
        node.persist(path, STEP)
        assert node.ask(messages.Commit, messages.Committed, path=path, step=STEP, nodes=[0]).removed == []
        threads = [int(thread) for thread in os.listdir(f"/proc/{node.process.child.pid}/task")]
        assert max(os.getpriority(os.PRIO_PROCESS, thread) for thread in threads) > os.getpriority(os.PRIO_PROCESS, 0)
        assert node.process.close() == 0
        node.process = None
    assert catalog.newest(str(tmp_path)) is not None


# ---- what is refused


def test_a_step_that_is_not_there(tmp_path: Path) -> None:
    with nodes([0, 1]) as (node,):
        fill([node], replicated(2))
        path = f"{tmp_path}/step-8.a"
        refused = node.ask(messages.Persist, messages.Failed, path=path, step=8, node=0, places=node.places())
        assert refused.error.endswith("rank 0 has no tensors of step 8")
        assert not list(tmp_path.iterdir()), "nothing has been written"


def test_a_step_that_rank_0_has_not_described(tmp_path: Path) -> None:
    with nodes([0]) as (node,):
        fill([node], replicated(1))
        os.ftruncate(node.description, 0)
        refused = node.ask(messages.Persist, messages.Failed, path=f"{tmp_path}/step-7.a", step=STEP, node=0, places=node.places())
        assert "rank 0 has not said what step 7 is" in refused.error and not list(tmp_path.iterdir())


def test_a_flipped_bit_is_not_persisted(tmp_path: Path) -> None:
    with nodes([0]) as (node,):
        fill([node], replicated(1))
        file = SlotFile(node.arenas[0])
        with file.payload(file.slots()[-1].place) as view:
            view[1000] ^= 1
        file.close()
        refused = node.ask(messages.Persist, messages.Failed, path=f"{tmp_path}/step-7.a", step=STEP, node=0, places=node.places())
        assert "CorruptSnapshot" in refused.error


def test_a_flipped_bit_is_not_restored(tmp_path: Path) -> None:
    with nodes([0]) as (node,):
        fill([node], sharded(1))
        path = persist([node], tmp_path)
        data = Path(path, "__0_0.distcp")
        raw = bytearray(data.read_bytes())
        at = raw.index(tensors()["param/a"].numpy().tobytes()[:64])
        raw[at + 5] ^= 4
        data.write_bytes(raw)
        node.wipe()
        refused = node.ask(messages.Fill, messages.Failed, path=path, places=node.places())
        assert "differ" in refused.error or "PytorchStreamReader" in refused.error
        assert SlotFile(node.arenas[0]).slots() == []


def test_another_number_of_ranks_is_not_filled(tmp_path: Path) -> None:
    with nodes([0, 1]) as made:
        fill(made, sharded(2))
        path = persist(made, tmp_path)
    with nodes([2]) as (node,):
        refused = node.ask(messages.Fill, messages.Failed, path=path, places=node.places())
        assert refused.error.endswith("is of 2 ranks: rank 2 must load it through DCP")


@pytest.mark.parametrize("missing", ["gemini/node-1.part", "__1_0.distcp", "gemini/rank-1.state", "gemini/names"])
def test_what_is_missing_is_not_committed(missing: str, tmp_path: Path) -> None:
    with nodes([0], [1]) as made:
        fill(made, sharded(2))
        path = f"{tmp_path}/step-7.a"
        for node in made:
            node.persist(path, STEP)
        Path(path, missing).unlink()
        refused = made[0].ask(messages.Commit, messages.Failed, path=path, step=STEP, nodes=[0, 1])
        assert Path(missing).name in refused.error
        assert catalog.complete(str(tmp_path)) == []


def test_a_node_that_was_forgotten(tmp_path: Path) -> None:
    with nodes([0], [1]) as made:
        fill(made, sharded(2))
        for node in made:
            node.persist(f"{tmp_path}/step-7.a", STEP)
        refused = made[0].ask(messages.Commit, messages.Failed, path=f"{tmp_path}/step-7.a", step=STEP, nodes=[0])
        assert "do not fill" in refused.error
        assert made[0].ask(messages.Discard, messages.Discarded, path=f"{tmp_path}/step-7.a")
        assert not list(tmp_path.iterdir())


def test_retention_goes_with_a_commit(tmp_path: Path) -> None:
    with nodes([0]) as (node,):
        for step in (1, 2, 3):
            fill([node], replicated(1), step)
            path = f"{tmp_path}/{layout.directory(step, 'a')}"
            node.persist(path, step)
            done = node.ask(messages.Commit, messages.Committed, path=path, step=step, nodes=[0], keep_last=2)
        assert done.removed == ["step-1.a"] and done.warning == ""
    assert [found.step for found in catalog.complete(str(tmp_path))] == [2, 3]
