import json
import math
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

REPOSITORY = Path(__file__).parents[1]
ASSETS = REPOSITORY / "actcache" / "assets"
sys.path.insert(0, str(REPOSITORY / "pipelines"))

import base_lm_card  # noqa: E402
import make_corpus  # noqa: E402
import sample_stories  # noqa: E402
import train_base_lm  # noqa: E402

from actcache.lm.stories import StoriesConfig  # noqa: E402
from actcache.source import read_texts  # noqa: E402

SIZES = StoriesConfig(d_model=16, d_mlp=32, n_layers=2, n_heads=2, n_ctx=32, d_vocab=300)
RECIPE = train_base_lm.Recipe(tokens=3 * 4 * 32, batch_sequences=4, warmup_steps=2)


def write_stories(path, n_stories, animal):
    stories = (
        f"One day, {animal} number {i} saw {i % 7} birds in the old tree. It said: please sing to me, and we fly home!"
        for i in range(n_stories)
    )
    path.write_text("".join(json.dumps({"text": story}) + "\n" for story in stories))
    return str(path)


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    return [write_stories(folder / "real.jsonl", 230, "cat"), write_stories(folder / "sampled.jsonl", 50, "dog")]


def train(sources, out, **options):
    train_base_lm.main(text=sources, out=out, **{"recipe": RECIPE, "config": SIZES, "evaluate_every": 1, **options})


@pytest.fixture(scope="module")
def trained(sources, tmp_path_factory):
    """A whole run of three steps."""
    out = tmp_path_factory.mktemp("whole")
    train(sources, out, about=["real cats", "sampled dogs"])
    return out


class StopError(Exception):
    pass


def train_until(monkeypatch, n_steps, sources, out):
    """Break off a run like a crash would: in the midst of a step, after `n_steps` whole ones."""
    learn = train_base_lm.Run.learn

    def learn_or_stop(run, ids):
        loss = learn(run, ids)
        if run.step > n_steps:
            raise StopError
        return loss

    with monkeypatch.context() as patch:
        patch.setattr(train_base_lm.Run, "learn", learn_or_stop)
        with pytest.raises(StopError):
            train(sources, out)


@pytest.mark.parametrize("n_steps", [0, 1, 2])
def test_a_stopped_run_continues_to_the_same_weights(sources, trained, tmp_path, monkeypatch, n_steps):
    train_until(monkeypatch, n_steps, sources, tmp_path)
    assert (tmp_path / "checkpoint.pt").exists() == (n_steps > 0)
    train(sources, tmp_path)
    for name in ("model.safetensors", "config.json", "tokenizer.json"):
        assert (tmp_path / name).read_bytes() == (trained / name).read_bytes()
    whole, resumed = (torch.load(folder / "checkpoint.pt", weights_only=True) for folder in (trained, tmp_path))
    assert all(whole["model"][name].equal(tensor) for name, tensor in resumed["model"].items())
    assert whole["history"] == resumed["history"]


def test_a_finished_run_only_writes_its_outputs_again(sources, trained):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    (trained / "model.safetensors").unlink()
    train(sources, trained, about=["real cats", "sampled dogs"])
    after = {path.name: path.read_bytes() for path in trained.iterdir()}
    assert {n: b for n, b in before.items() if n != "loss.svg"} == {n: b for n, b in after.items() if n != "loss.svg"}


def test_export_takes_the_checkpoint_as_it_stands(sources, tmp_path, monkeypatch):
    train_until(monkeypatch, 1, sources, tmp_path / "run")
    train(sources, tmp_path / "run", export_to=tmp_path / "exported")
    checkpoint = torch.load(tmp_path / "run" / "checkpoint.pt", weights_only=True)
    assert checkpoint["step"] == 1
    exported = load_file(tmp_path / "exported" / "model.safetensors")
    assert {name: t.to(torch.bfloat16) for name, t in checkpoint["model"].items()}.keys() == exported.keys()
    assert all(tensor.equal(checkpoint["model"][name].to(torch.bfloat16)) for name, tensor in exported.items())
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_training_lowers_the_loss(sources, tmp_path):
    train(
        sources,
        tmp_path,
        recipe=train_base_lm.Recipe(tokens=40 * 128, batch_sequences=4, warmup_steps=2),
        evaluate_every=20,
    )
    first, last = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["history"]
    assert last["nats_per_char"] < first["nats_per_char"] < math.log(300)


def test_another_recipe_does_not_continue_the_run(sources, trained):
    with pytest.raises(ValueError, match=r"begun with muon_lr 0.006, not 0.1"):
        train(
            sources,
            trained,
            recipe=train_base_lm.Recipe(tokens=1e6, batch_sequences=4, warmup_steps=2, muon_lr=0.1),
        )


def test_held_out_texts_are_not_trained_on():
    texts = [str(i) for i in range(500)]
    train_texts, held_out = train_base_lm.split_held_out(texts, seed=3)
    assert sorted(train_texts + held_out) == sorted(texts)
    assert len(held_out) == 200
    with pytest.raises(ValueError, match="has 200 texts, but 200 are to be held out"):
        train_base_lm.split_held_out(texts[:200], seed=3)


@pytest.mark.parametrize("option", [{"tokens": 0}, {"real_fraction": 1.5}, {"warmup_steps": 0}])
def test_an_impossible_recipe_is_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        train_base_lm.Recipe(**option)


def test_a_second_run_starts_from_the_first_with_its_dead_neurons_made_anew(sources, trained, tmp_path):
    first = tmp_path / "first"
    shutil.copytree(trained, first)
    saved = torch.load(first / "checkpoint.pt", weights_only=True)
    saved["model"]["blocks.1.mlp.in.bias"][[3, 8, 30]] = -1e6
    torch.save(saved, first / "checkpoint.pt")
    run = train_base_lm.Run(SIZES, RECIPE)
    run.model.load_state_dict(saved["model"])
    ids = torch.arange(4 * 32).view(4, 32)
    before = run.model(ids)
    run.start_from(first / "checkpoint.pt", ids)
    torch.testing.assert_close(run.model(ids), before)
    assert (run.model.blocks[1].mlp["in"].bias[[3, 8, 30]] > -100).all()
    assert (run.step, run.tokens) == (0, 384)
    train(sources, tmp_path / "second", start_from=first)
    assert (tmp_path / "second" / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    history = torch.load(tmp_path / "second" / "checkpoint.pt", weights_only=True)["history"]
    assert [h["tokens"] for h in history] == [128, 256, 384, 512, 640, 768]


def test_batches_mix_the_sources_as_the_recipe_says():
    streams = [torch.zeros(99, dtype=torch.int32).numpy(), torch.ones(99, dtype=torch.int32).numpy()]
    recipe = train_base_lm.Recipe(batch_sequences=10, real_fraction=0.3)
    ids = train_base_lm.batch_of(streams, recipe, step=5, n_ctx=8)
    assert ids.shape == (10, 9)
    assert (ids == 0).all(1).sum() == 3
    assert train_base_lm.batch_of(streams[:1], recipe, step=5, n_ctx=8).sum() == 0


def naive_loss(model, tokenizer, texts):
    """One forward pass per token, over just the context that the definition gives it."""
    half, losses = model.config.n_ctx // 2, []
    for text in texts:
        ids = [tokenizer.token_to_id("<|bos|>"), *tokenizer.encode(text).ids]
        for position in range(1, len(ids)):
            begin = 0 if position < 2 * half else half * (position // half - 1)
            with torch.inference_mode():
                log_probabilities = model(torch.tensor([ids[begin:position]]))[0, -1].log_softmax(-1)
            losses.append(-log_probabilities[ids[position]].item())
    return sum(losses) / len(losses), sum(losses) / sum(map(len, texts))


def test_held_out_loss_equals_one_forward_pass_per_token(trained):
    model, tokenizer = base_lm_card.load_stories(trained)
    lengths = [1, 30, 31, 32, 33, 47, 48, 49, 90]
    words = "One day, cat number 12 saw 5 birds. It said: please sing with me! " * 20
    texts = [tokenizer.decode(tokenizer.encode(words).ids[:n]) for n in lengths]
    assert {len(tokenizer.encode(text).ids) for text in texts} >= {31, 32, 33, 48}
    loss = base_lm_card.held_out_loss(model, tokenizer, texts, batch=4)
    assert (loss.nats_per_token, loss.nats_per_char) == pytest.approx(naive_loss(model, tokenizer, texts), rel=1e-5)


def test_ablation_silences_one_mlp_and_is_undone(trained):
    model, tokenizer = base_lm_card.load_stories(trained)
    texts = ["One day, cat number 3 saw a bird."]
    clean = base_lm_card.held_out_loss(model, tokenizer, texts)
    with base_lm_card.zero_ablated(model, 1):
        ablated = base_lm_card.held_out_loss(model, tokenizer, texts)
    silent, _ = base_lm_card.load_stories(trained)
    silent.blocks[1].mlp["out"].weight.data.zero_()
    silent.blocks[1].mlp["out"].bias.data.zero_()
    assert ablated == base_lm_card.held_out_loss(silent, tokenizer, texts) != clean
    assert base_lm_card.held_out_loss(model, tokenizer, texts) == clean


def test_neurons_are_counted_token_by_token(trained):
    model, tokenizer = base_lm_card.load_stories(trained)
    model.blocks[1].mlp["in"].bias.data[:5] = -1e6
    text = "One day, cat number 3 saw a bird."
    counts, n_tokens = base_lm_card.firing_counts(model, tokenizer, [text])
    ids = torch.tensor([[0, *tokenizer.encode(text).ids]])
    with torch.inference_mode():
        x = model.embed(ids) + model.pos_embed(torch.arange(ids.shape[1]))
        x = x + model.blocks[0].attn(x)
        on = model.blocks[0].mlp["in"](x) > 0
    assert n_tokens == ids.shape[1]
    assert counts[0].equal(on.sum((0, 1)).float())
    assert (counts[1, :5] == 0).all()


def test_the_card_tells_what_was_measured_on_the_shipped_weights(trained, sources):
    card = (trained / "model_card.md").read_text()
    model, tokenizer = base_lm_card.load_stories(trained)
    _, held_out = train_base_lm.split_held_out(list(read_texts(sources[0])), RECIPE.seed)
    loss = base_lm_card.held_out_loss(model, tokenizer, held_out)
    assert f"| unchanged | {loss.nats_per_token:.4f} | {loss.nats_per_char:.4f} |" in card
    assert len(re.findall(r"^\| MLP \d writes zeros \|", card, re.MULTILINE)) == SIZES.n_layers
    assert re.search(r"\| real.jsonl \| 30 \| [\d,]+ \| real cats \|", card)
    assert re.search(r"\| sampled.jsonl \| 50 \| [\d,]+ \| sampled dogs \|", card)
    assert "--text real.jsonl --text sampled.jsonl --tokens 384 --batch-sequences 4" in card
    assert "--d-model 16" in card
    assert str(trained) not in card


def sampled(model, out, characters, **options):
    sample_stories.main(
        **{"model": str(model), "characters": characters, "out": out, "batch": 4, "length": 300, **options}
    )
    return out.read_bytes()


@pytest.fixture(scope="module")
def talkative(sources, tmp_path_factory):
    """Trained just long enough to end its stories."""
    out = tmp_path_factory.mktemp("talkative")
    recipe = train_base_lm.Recipe(tokens=150 * 256, batch_sequences=8, warmup_steps=10, muon_lr=0.02, adam_lr=0.02)
    train(sources, out, recipe=recipe, evaluate_every=1000)
    return out


@pytest.mark.exhaustive
def test_sampling_stops_at_enough_and_continues_after_a_crash(talkative, tmp_path):
    whole = sampled(talkative, tmp_path / "whole.jsonl", 4_000)
    records = [json.loads(line) for line in whole.splitlines()]
    assert sum(len(r["text"]) for r in records) >= 4_000
    assert min(len(r["text"]) for r in records) > 100
    assert records[-1]["batch"] > 0
    for n_bytes in (10, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut.jsonl").write_bytes(whole[:n_bytes])
        assert sampled(talkative, tmp_path / "cut.jsonl", 4_000) == whole
    assert sampled(talkative, tmp_path / "other.jsonl", 1_000, seed=1) != whole


def test_only_finished_stories_are_taken_from_a_stream():
    row = torch.tensor([5, 6, 0, 7, 0, 0, 8, 9]).numpy()
    assert list(sample_stories.finished(row, ends=[0])) == [[5, 6], [7], []]
    assert list(sample_stories.finished(row[-2:], ends=[0])) == []


@pytest.mark.exhaustive
@pytest.mark.parametrize("eos", ["<|bos|>", "<|end|>"])
def test_a_hugging_face_model_writes_stories_too(tmp_path, talkative, eos):
    """One that never writes its end of text, as many Llamas do, ends its stories by beginning the next."""
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    torch.manual_seed(0)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(talkative / "tokenizer.json"), bos_token="<|bos|>", eos_token=eos
    )
    tokenizer.save_pretrained(tmp_path / "hf")
    config = GPT2Config(vocab_size=len(tokenizer), n_embd=16, n_layer=1, n_head=2, n_positions=256, bos_token_id=0)
    module = GPT2LMHeadModel(config)
    if eos != "<|bos|>":
        module.generation_config.suppress_tokens = [tokenizer.eos_token_id]
    module.save_pretrained(tmp_path / "hf")
    sampler = sample_stories.sampler_of(str(tmp_path / "hf"), n_sequences=8, seed=0, length=256)
    stories = sampler(0)
    assert stories
    assert sampler(0) == stories != sampler(1)


@pytest.mark.exhaustive
def test_make_corpus_writes_a_corpus_that_reads_as_texts(talkative, tmp_path, capsys):
    out = tmp_path / "corpus.jsonl.bz2"
    make_corpus.main(model=talkative, out=out, tokens=4_000, batch=8, length=512)
    _, tokenizer = base_lm_card.load_stories(talkative)
    stories = list(read_texts(str(out)))
    assert 4_000 <= sum(1 + len(tokenizer.encode(s).ids) for s in stories) < 4_200
    assert f"{len(stories):,} stories" in capsys.readouterr().out


def test_the_embedded_model_is_small_and_good():
    folder = ASSETS / "stories-4l"
    assert sum(path.stat().st_size for path in ASSETS.rglob("*") if path.is_file()) <= 6_000_000
    card = (folder / "model_card.md").read_text()
    losses = [float(x) for x in re.findall(r"writes zeros \| [\d.]+ \| ([\d.]+) \|", card)]
    (clean,) = (float(x) for x in re.findall(r"unchanged \| [\d.]+ \| ([\d.]+) \|", card))
    assert clean <= 0.70
    assert len(losses) == 4
    assert min(losses) > clean


def test_embedded_weights_are_bfloat16_and_fit_the_config():
    assert {t.dtype for t in load_file(ASSETS / "stories-4l" / "model.safetensors").values()} == {torch.bfloat16}
    model, tokenizer = base_lm_card.load_stories(ASSETS / "stories-4l")
    assert model.config.d_vocab == tokenizer.get_vocab_size()


def test_the_embedded_corpus_is_large_and_small():
    assert (ASSETS / make_corpus.CORPUS).stat().st_size <= 2_000_000
    _, tokenizer = base_lm_card.load_stories(ASSETS / "stories-4l")
    stories = list(read_texts("stories-corpus"))
    assert sum(1 + len(e.ids) for e in tokenizer.encode_batch_fast(stories)) >= 1_000_000
    assert len(set(stories)) == len(stories)
