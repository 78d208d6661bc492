"""The networks of DeepSeek-VL2 against the reference's values, from tiles to logits (float32, CPU).

Token ids and tiles are taken from the golden files, so that only networks are under test here.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from seekvl.models.moe import Moe
from seekvl.models.vl2 import VL2, Grid
from seekvl.weights.config import read_config
from seekvl.weights.load import load_model
from tests.models.test_llama import GrowingCache

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = ["vl2-tiny-like", "vl2-small-like", "vl2-base-like"]
SINGLE = [
    "small",
    "wide",
    "tall",
    "two",
    "three",
    "text_only",
    "grounding_turns",
    "turns_two_images",
    "system_role",
    "system_prompt_argument",
    "prompt_raw",
    "prompt_sft",
    "train",
]
TILED = ["small", "wide", "tall", "two", "three"]

FEATURES = 3e-5
LOGITS = 1e-4
CACHE = 1e-4
GATE = 1e-6


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> None:
    torch.set_num_threads(1)


@cache
def network(name: str, dtype: torch.dtype = torch.float32) -> VL2:
    folder = GOLDEN / name
    model = load_model(folder, config=read_config(folder), device="cpu", dtype=dtype)
    assert isinstance(model, VL2)
    return model


@cache
def values(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / name / "cases.safetensors")


def has(name: str, key: str) -> bool:
    return key in values(name)


def grids_of(name: str, case: str) -> list[Grid]:
    """Grids of the pictures of a case; the reference writes (0, 0) where there is none."""
    pairs = values(name)[f"{case}/images_spatial_crop"][0].tolist()
    return [(columns, rows) for columns, rows in pairs if columns]


def tiles_of(name: str, case: str) -> Tensor:
    """Tiles of a case as we take them: the reference feeds the whole of a small picture twice."""
    tiles, kept, at = values(name)[f"{case}/tiles_u8"], [], 0
    for columns, rows in grids_of(name, case):
        count = 1 + columns * rows
        picture = tiles[at : at + count]
        if (columns, rows) == (1, 1):
            assert torch.equal(picture[0], picture[1])
            picture = picture[:1]
        kept.append(picture)
        at += count
    assert at == len(tiles)
    return (torch.cat(kept).float() / 255 - 0.5) / 0.5


def worst(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found.float() - expected.float()).abs().max())


def embeds_of(name: str, case: str) -> Tensor:
    """Embed a case with the reference's picture rows."""
    model, golden = network(name), values(name)
    mask = golden[f"{case}/images_seq_mask"]
    rows = golden.get(f"{case}/image_token_embeds")
    return model.embed(golden[f"{case}/input_ids"], image_mask=mask, image_features=rows)


@pytest.mark.parametrize("case", TILED)
@pytest.mark.parametrize("name", NAMES)
def test_tower_adaptor_and_layout(name: str, case: str) -> None:
    model, golden = network(name), values(name)
    tiles, grids = tiles_of(name, case), grids_of(name, case)
    if has(name, f"{case}/vision_features") and (1, 1) not in grids:
        features = model.vision(tiles, normalized=True)
        assert worst(features, golden[f"{case}/vision_features"]) < FEATURES
        assert worst(model.adaptor(features), golden[f"{case}/projector_output"]) < FEATURES
    expected = golden[f"{case}/image_token_embeds"]
    assert worst(model.encode_pictures(tiles, grids=grids), expected) < FEATURES
    assert worst(model.encode_pictures(tiles, grids=grids, chunk=2), expected) < FEATURES
    assert sum(model.config.slots(grid) for grid in grids) == len(expected)


def test_the_reference_sees_a_small_picture_twice_and_we_once() -> None:
    name = "vl2-tiny-like"
    model, golden = network(name), values(name)
    assert grids_of(name, "small") == [(1, 1)]
    features = model.adaptor(model.vision(tiles_of(name, "small"), normalized=True))
    assert len(features) == 1
    assert worst(features.expand(2, -1, -1), golden["small/projector_output"]) < FEATURES


@pytest.mark.parametrize("case", SINGLE)
@pytest.mark.parametrize("name", NAMES)
def test_embeddings_and_logits(name: str, case: str) -> None:
    model, golden = network(name), values(name)
    embeds = embeds_of(name, case)
    assert worst(embeds, golden[f"{case}/inputs_embeds"]) < FEATURES
    logits = model.head(model.hidden(embeds))
    assert worst(logits[:, -1], golden[f"{case}/logits_last"]) < LOGITS
    if has(name, f"{case}/logits_all"):
        assert worst(logits, golden[f"{case}/logits_all"]) < LOGITS


@pytest.mark.parametrize("name", NAMES)
def test_from_tiles_to_logits(name: str) -> None:
    model, golden = network(name), values(name)
    found = model(
        golden["two/input_ids"],
        image_mask=golden["two/images_seq_mask"],
        pixels=tiles_of(name, "two"),
        grids=grids_of(name, "two"),
    )
    assert worst(found[:, -1], golden["two/logits_last"]) < LOGITS


@pytest.mark.parametrize("name", NAMES)
def test_hidden_states_and_experts_of_every_layer(name: str) -> None:
    model, golden = network(name), values(name)
    states, routings, hooks = [], [], []
    for layer in model.language.layers:
        hooks.append(layer.register_forward_hook(lambda _, __, out: states.append(out)))
        if isinstance(layer.mlp, Moe):
            hooks.append(layer.mlp.gate.register_forward_hook(lambda _, __, out: routings.append(out)))
    embeds = embeds_of(name, "small")
    states[:] = [embeds, *states]
    states.append(model.hidden(embeds))
    for hook in hooks:
        hook.remove()
    del states[-2]  # the reference gives the last layer after the final norm only
    assert worst(torch.stack(states), golden["small/debug/llm_hidden_states"]) < LOGITS
    for index, routing in enumerate(routings):
        order = routing.experts.argsort(dim=-1)
        chosen = routing.experts.gather(-1, order)[0]
        assert torch.equal(chosen, golden[f"small/debug/moe_{index}_topk_idx_sorted"])
        weights = routing.weights.gather(-1, order)[0]
        assert worst(weights, golden[f"small/debug/moe_{index}_topk_weight"]) < GATE
    assert len(routings) == 2


def prefill(model: VL2, embeds: Tensor, *, chunk: int, cache: GrowingCache) -> Tensor:
    """Fill the cache in chunks and return the hidden state of the last token."""
    length, hidden = embeds.shape[1], embeds[:, :0]
    for start in range(0, length, chunk):
        end = min(length, start + chunk)
        mask = torch.ones(end - start, end, dtype=torch.bool).tril(start)[None, None]
        positions = torch.arange(start, end)[None]
        hidden = model.hidden(embeds[:, start:end], positions=positions, mask=mask, cache=cache)
    return hidden[:, -1]


@pytest.mark.parametrize(
    ("case", "chunk"),
    [("wide", 7), ("wide", 32), ("wide", 512), ("text_only", 5), ("grounding_turns", 16)],
)
@pytest.mark.parametrize("name", NAMES)
def test_prefill_in_chunks_and_what_the_cache_holds(name: str, case: str, chunk: int) -> None:
    model, golden = network(name), values(name)
    embeds, keys = embeds_of(name, case), GrowingCache()
    prefill(model, embeds[:, :-1], chunk=chunk, cache=keys)
    if has(name, f"{case}/chunk_{chunk}/cache_0_k"):
        for layer, label in ((0, "0"), (model.config.language.layers - 1, "last")):
            for slot, found in zip("kv", keys.layers[layer], strict=True):
                assert worst(found, golden[f"{case}/chunk_{chunk}/cache_{label}_{slot}"]) < CACHE
    last = torch.tensor([[embeds.shape[1] - 1]])
    logits = model.head(model.hidden(embeds[:, -1:], positions=last, cache=keys))[:, -1]
    assert worst(logits, golden[f"{case}/chunk_{chunk}/logits_last"]) < LOGITS


@pytest.mark.parametrize("case", [case for case in SINGLE if case != "train"])
@pytest.mark.parametrize("name", NAMES)
def test_greedy_ids_one_token_at_a_time(name: str, case: str) -> None:
    model, wanted = network(name), values(name)[f"{case}/generated_ids"][0]
    embeds, keys = embeds_of(name, case), GrowingCache()
    hidden, length, ids = prefill(model, embeds, chunk=4096, cache=keys), embeds.shape[1], []
    for step in range(len(wanted)):
        ids.append(int(model.head(hidden).argmax()))
        embedded = model.embed(torch.tensor([[ids[-1]]]))
        position = torch.tensor([[length + step]])
        hidden = model.hidden(embedded, positions=position, cache=keys)[:, -1]
    assert ids == wanted.tolist()


@pytest.mark.parametrize("length", [300, 4096])
@pytest.mark.parametrize("name", NAMES)
def test_long_prompts_in_chunks_equal_one_pass(name: str, length: int) -> None:
    torch.manual_seed(0)
    model = network(name)
    embeds = model.embed(torch.randint(0, model.config.language.vocab_size, (1, length)))
    whole = model.hidden(embeds)[:, -1]
    keys = GrowingCache()
    prefill(model, embeds[:, :-1], chunk=1024, cache=keys)
    last = torch.tensor([[length - 1]])
    found = model.hidden(embeds[:, -1:], positions=last, cache=keys)[:, -1]
    assert worst(found, whole) < LOGITS


@pytest.mark.parametrize("name", NAMES)
def test_rows_of_a_padded_batch_are_their_single_runs(name: str) -> None:
    model, golden = network(name), values(name)
    for row, real in enumerate(golden["batch_pad/attention_mask"]):
        embeds = golden["batch_pad/inputs_embeds"][row : row + 1, real]
        found = model.head(model.hidden(embeds)[:, -1])
        assert worst(found, golden["batch_pad/logits_last"][row : row + 1]) < LOGITS


@pytest.mark.parametrize("name", NAMES)
def test_loss_of_the_training_case(name: str) -> None:
    model, golden = network(name), values(name)
    content = json.loads((GOLDEN / name / "cases.json").read_text(encoding="utf-8"))
    wanted = next(case["loss"] for case in content["cases"] if case["name"] == "train")
    logits, labels = model.head(model.hidden(embeds_of(name, "train"))), golden["train/labels"]
    loss = F.cross_entropy(logits[0, :-1], labels[0, 1:], ignore_index=-100)
    assert float(loss) == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_stays_near(name: str) -> None:
    model, golden = network(name, torch.bfloat16), values(name)
    for case in ("small", "train"):
        logits = model.head(model.hidden(golden[f"{case}/inputs_embeds"].bfloat16()))
        error = logits.float() - golden[f"{case}/logits_all"]
        assert float(error.abs().mean()) < 0.05  # logits have a deviation of 1.3
