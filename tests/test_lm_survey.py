"""A name is one value of one token: axes and runs are seen in several forward passes; what stays unclear is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lm_models import LLAMA_LIKE, n_hooks, names, random_ids, random_model
from torch import Tensor, nn

from actcache.errors import ConfigError, SiteError
from actcache.lm import load_lm


class Part(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Around(nn.Module):
    """Embedding, a part of any kind, head."""

    def __init__(self, part: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(64, 8)
        self.part = Part(part)
        self.head = nn.Linear(8, 64)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        self.part(x)
        return self.head(x)


ROWS: dict[str, tuple[Callable[[Tensor], Tensor], str, Callable[[Tensor], Tensor]]] = {
    "streams first": (lambda x: torch.stack([x, -x]), "F Q T F", lambda e: torch.cat([e, -e], 2)),
    "positions first": (lambda x: x.transpose(0, 1), "T Q F", lambda e: e),
    "heads first": (lambda x: x.unflatten(2, (2, 4)).transpose(1, 2), "Q F T F", lambda e: e),
    "streams last": (lambda x: torch.stack([x, -x], 3), "Q T F F", lambda e: torch.stack([e, -e], 3).flatten(2)),
    "tokens in one axis": (lambda x: x.flatten(0, 1), "QT F", lambda e: e),
    "positions, no sequences": (
        lambda x: torch.arange(x.shape[1]).float()[:, None].repeat(1, 3),
        "T F",
        lambda e: torch.arange(e.shape[1]).float()[None, :, None].repeat(len(e), 1, 3),
    ),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("shape", [(2, 11), (3, 7), (2, 2), (8, 8), (4, 16), (1, 1), (5, 2)])
def test_rows_belong_to_their_tokens_in_every_layout(kind: str, shape: tuple[int, int]) -> None:
    part, layout, wanted = ROWS[kind]
    lm, ids = load_lm(Around(part)), random_ids(*shape, 64)
    (site,) = lm.resolve(["part:out"])
    assert site.layout == layout
    rows = wanted(lm.module.embed(ids))
    assert torch.equal(lm.capture(ids, [site])["part:out"], rows)
    # A splice writes where the value was read.
    with lm.splice("part:out", "part:out", lambda x: 2 * x):
        assert torch.equal(lm.capture(ids, [site])["part:out"], 2 * rows)


REFUSED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "some of the tokens": (lambda x: x.flatten(0, 1)[::3], "some of the tokens only"),
    "as many tokens, by chance, as there are sequences": (lambda x: x[:, 0], "no axis of positions"),
    "widths that happen to be Q and T": (lambda x: x.new_ones(2, 11, 8) * x.sum(), "no axis of positions"),
    "heads and sequences in one axis": (
        lambda x: x.unflatten(2, (2, 4)).transpose(1, 2).flatten(0, 1),
        "no axis of seq",
    ),
    "attention weights": (lambda x: x @ x.transpose(1, 2), "2 axes that are as long as the sequence"),
    "half of the positions": (lambda x: x[:, ::2], "some of the tokens only"),
    "normalised over the batch": (lambda x: x - x.mean(0, keepdim=True), "other sequences of its batch"),
    "tokens in one axis, positions first": (lambda x: x.transpose(0, 1).flatten(0, 1), "other sequences of its batch"),
    "sequences in another order": (lambda x: x.flip(0), "other sequences of its batch"),
    "a mean that all sequences share": (lambda x: x.mean(0), "other sequences of its batch"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_no_row_of_a_token_is_refused_with_the_reason(kind: str) -> None:
    part, reason = REFUSED[kind]
    lm = load_lm(Around(part))
    assert "part:out" not in lm.site_names
    assert reason in lm.refused_sites["part:out"]
    with pytest.raises(SiteError, match=f"part:out.*{reason}"):
        lm.resolve(["part:out"])
    assert {"embed:out", "part:in", "head:in", "head:out"} <= set(lm.site_names)


def test_a_value_of_another_shape_than_the_survey_saw_is_an_error() -> None:
    lm = load_lm(Around(lambda x: x if x.shape[1] < 20 else x[:, :20]))  # truncates what is long
    (site,) = lm.resolve(["part:out"])
    assert lm.capture(random_ids(2, 19, 64), [site])["part:out"].shape == (2, 19, 8)
    with pytest.raises(SiteError, match=r"part:out: its value has shape \(2, 20, 8\) for 2 sequences of 30"):
        lm.capture(random_ids(2, 30, 64), [site])


def test_what_does_not_run_or_is_no_activation_says_so() -> None:
    module = Around(lambda x: x)
    module.unused = nn.Linear(2, 2)
    lm = load_lm(module)
    with pytest.raises(SiteError, match=r"unused:out takes no part in a forward pass"):
        lm.resolve(["unused:out"])
    with pytest.raises(SiteError, match=r"embed:in is a tensor of int64"):
        lm.resolve(["embed:in"])
    assert lm.refused_sites == {}


@pytest.mark.parametrize("n_ctx", range(1, 13))
def test_tiny_contexts(n_ctx: int) -> None:
    lm = load_lm(random_model("gpt2", n_embd=8, n_layer=1, n_head=2, n_positions=n_ctx, vocab_size=40, bos_token_id=1))
    ids = random_ids(2, n_ctx, 40)
    seen: list[Tensor] = []
    lm.module.transformer.h[0].register_forward_hook(lambda _m, _a, out: seen.append(out))
    sites = lm.resolve(["transformer.h.0:out"])
    value = lm.capture(ids, sites)["transformer.h.0:out"]
    assert torch.equal(value, seen[-1])


# Modules that run several times


class Looped(nn.Module):
    """A layer that runs three times, and is in two places."""

    def __init__(self, n_loops: Callable[[Tensor], int] = lambda ids: 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(40, 6)
        self.layer = nn.Sequential(nn.Linear(6, 6), nn.Tanh())
        self.again = self.layer
        self.head = nn.Linear(6, 40)
        self.n_loops = n_loops

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for _ in range(self.n_loops(ids)):
            x = self.layer(x)
        return self.head(x)


def by_hand(module: Any, ids: Tensor) -> list[Tensor]:
    values = [module.embed(ids)]
    for _ in range(3):
        values.append(module.layer(values[-1]))
    return values


def test_runs_of_a_module_are_sites_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    lm, ids = load_lm(Looped()), random_ids(2, 5, 40)
    wanted = by_hand(lm.module, ids)
    with pytest.raises(SiteError, match=r"layer:out runs 3 times.*say which, layer:out@1 to layer:out@3"):
        lm.resolve(["layer:out"])
    sites = lm.resolve(["layer:out@1", "layer:out@3", "again:out@2", "layer:in@3"])
    values = lm.capture(ids, sites)
    assert names(sites) == ["layer:out@1", "again:out@2", "layer:in@3", "layer:out@3"]
    for name, n in {"layer:out@1": 1, "again:out@2": 2, "layer:out@3": 3, "layer:in@3": 2}.items():
        assert torch.equal(values[name], wanted[n]), name
    assert [(s.site.meaning.module, s.site.meaning.call) for s in sites if s.site.meaning] == [
        ("layer", 1),
        ("layer", 2),
        ("layer", 3),
        ("layer", 3),
    ]
    ran: list[int] = []
    lm.module.layer[1].register_forward_hook(lambda *_: ran.append(1))
    lm.capture(ids, lm.resolve(["layer:out@2"]))
    assert len(ran) == 2  # it ends with the run that is wanted
    assert n_hooks(lm.module) == 1


def test_a_splice_replaces_one_run_in_every_forward_pass() -> None:
    lm, ids = load_lm(Looped()), random_ids(2, 5, 40)
    x = 2 * by_hand(lm.module, ids)[2]
    wanted = lm.module.head(lm.module.layer(x))
    (first,) = lm.resolve(["layer:out@1"])
    with lm.splice("layer:out@2", "layer:out@2", lambda x: 2 * x):
        for _ in range(2):
            torch.testing.assert_close(lm.logits(ids), wanted)
            lm.capture(ids, [first])  # a pass that ends before the run that is spliced


def test_compiled_model_takes_the_right_run() -> None:
    lm, ids = load_lm(Looped(), compile=True), random_ids(2, 5, 40)
    value = lm.capture(ids, lm.resolve(["layer:out@2"]))["layer:out@2"]
    torch.testing.assert_close(value, by_hand(lm.module, ids)[2], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("n_loops", [lambda ids: ids.shape[1], lambda ids: 1 + int(ids.sum()) % 5])
def test_runs_that_depend_on_the_tokens_are_refused(n_loops: Callable[[Tensor], int]) -> None:
    lm = load_lm(Looped(n_loops))
    for name in ("layer:out", "layer:out@1"):
        with pytest.raises(SiteError, match=r"depending on the tokens" if name == "layer:out" else "no site matches"):
            lm.resolve([name])
    assert "embed:out" in lm.site_names


def test_shared_layers_of_albert() -> None:
    sizes = {**LLAMA_LIKE, "embedding_size": 16, "num_hidden_layers": 3, "num_hidden_groups": 1}
    lm = load_lm(random_model("albert", "AutoModel", **sizes))
    ids = random_ids(2, 7, 40)
    with torch.no_grad():
        wanted = lm.module(ids, output_hidden_states=True).hidden_states
    with pytest.warns(UserWarning, match=r"named module\.path"):
        sites = lm.resolve(["encoder.albert_layer_groups.0.albert_layers.0:out@*"])
    values = list(lm.capture(ids, sites).values())
    assert len(values) == 3
    for value, hidden in zip(values, wanted[1:], strict=True):
        torch.testing.assert_close(value, hidden, atol=1e-6, rtol=1e-5)


# Looking is not running


def test_what_is_found_out_while_a_splice_is_in_force_is_not_spliced() -> None:
    lm = load_lm(Looped())
    with lm.splice("embed:out", "embed:out", torch.zeros_like):
        assert "layer:out@3" in load_lm(lm.module).site_names  # of somebody else, who does not know of the splice
        assert lm.resolve(["head:in"])
        assert not lm.capture(random_ids(1, 3, 40), lm.resolve(["layer:in@1"]))["layer:in@1"].any()
    with pytest.raises(ConfigError, match="matches 2"), lm.splice("layer:out@[12]", "head:in", lambda x: x):
        pass
