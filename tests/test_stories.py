import pytest
import torch

from actcache.lm.stories import StoriesConfig, StoriesLM

CONFIG = StoriesConfig(d_model=16, d_mlp=32, n_layers=2, n_heads=2, n_ctx=12, d_vocab=20)


@pytest.fixture
def model():
    torch.manual_seed(0)
    return StoriesLM(CONFIG).eval()


def samples(model, n_tokens, seed=0):
    steps = model.sample(3, bos=0, max_tokens=n_tokens, generator=torch.Generator().manual_seed(seed))
    return torch.stack(list(steps), dim=1)


def sampled_without_cache(model, n_tokens, seed=0):
    """The definition, the slow way: read the whole context at every step; a full one is cut to its last half."""
    generator, ids, begin = torch.Generator().manual_seed(seed), torch.zeros((3, 1), dtype=torch.int64), 0
    for length in range(1, n_tokens + 1):
        if length - begin > CONFIG.n_ctx:
            begin = length - CONFIG.n_ctx // 2
        with torch.inference_mode():
            probabilities = model(ids[:, begin:])[:, -1].softmax(-1)
        race = torch.empty_like(probabilities).exponential_(generator=generator)
        ids = torch.cat([ids, (probabilities / race).argmax(-1, keepdim=True)], dim=1)
    return ids[:, 1:]


def test_cached_sampling_equals_uncached_beyond_the_context(model):
    torch.testing.assert_close(samples(model, 40), sampled_without_cache(model, 40), rtol=0, atol=0)


def test_a_sample_is_a_function_of_the_generator(model):
    assert samples(model, 20, seed=1).equal(samples(model, 20, seed=1))
    assert not samples(model, 20, seed=1).equal(samples(model, 20, seed=2))


def test_sampling_draws_from_the_models_distribution(model):
    """First tokens of 20,000 sequences against the probabilities themselves; a biased sampler must fail."""
    steps = model.sample(20_000, bos=0, max_tokens=1, generator=torch.Generator().manual_seed(0))
    found = torch.bincount(next(steps), minlength=CONFIG.d_vocab) / 20_000
    with torch.inference_mode():
        expected = model(torch.zeros((1, 1), dtype=torch.int64))[0, 0].softmax(-1)
    standard_error = (expected * (1 - expected) / 20_000).sqrt()
    assert ((found - expected).abs() < 5 * standard_error).all()


def test_later_tokens_do_not_change_earlier_logits(model):
    ids = torch.arange(12)[None] % CONFIG.d_vocab
    changed = ids.clone()
    changed[0, 7] = 19
    before, after = model(ids), model(changed)
    torch.testing.assert_close(before[:, :7], after[:, :7])
    assert not torch.allclose(before[:, 7:], after[:, 7:])


def test_what_is_longer_than_the_context_is_refused(model):
    with pytest.raises(ValueError, match="sequences of 13 tokens, but the model has 12 positions"):
        model(torch.zeros((1, 13), dtype=torch.int64))


@pytest.mark.parametrize(("option", "message"), [({"n_heads": 3}, "must divide d_model"), ({"n_ctx": 0}, "n_ctx")])
def test_impossible_sizes_are_refused(option, message):
    with pytest.raises(ValueError, match=message):
        StoriesConfig(**option)


def test_state_dict_names_are_component_names(model):
    names = set(model.state_dict())
    assert {"embed.weight", "blocks.1.attn.q.weight", "blocks.0.mlp.in.bias", "unembed.weight"} <= names
    assert not any("ln" in name for name in names)
