"""Base language models: from a name to activations at sites. The only room that knows transformer-lens.

In: a model (the embedded one, a Hugging Face folder or name, a GGUF file, a transformer-lens model, any `nn.Module`)
and token ids. Out: activations by transformer-lens hook name or module path. A name that is just the input or output
of a module of the model is read there by a plain torch hook, so that users pay for the model and not for its
instrumentation.

    hooks.py           one place in a model: hooking it, and the layout of what passes there
    remembered.py      what a forward pass leaves behind in a model, and how it is taken back
    forward.py         calling a model: its arguments, padding masks, what its output means
    compiled.py        torch.compile around hooks
    survey.py          what passes at given places when a few tokens run; two models compared by that
    stories.py         the embedded architecture, and the hook names that stand for its modules
    bridge.py          transformer-lens: instrumented models, and what their hook names stand for
    processes.py       a guard under which a thread starts no process
    names.py           which names a model answers to, in which of the two models each is, and what patterns mean
    passes.py          forward passes: capture, splice, autocast, compiled parts
    padding.py         whether padding is harmless, tried at a length
    context_length.py  how long sequences may be, by trying
    inputs.py          checks of what a model is given: lengths, ids, ids that it moves for a decoder
    identity.py        digests of weights and tokenizers, settings that change values; whether two models are the same
    language_model.py  LanguageModel: resolve, capture, logits, splice
    diagnose.py        what is wrong with the files of a model
    trust.py           code that comes with a model, and is not run unless it is trusted
    tokenizers.py      tokenizers: there, missing, or there and unreadable
    huggingface.py     models of Hugging Face: causal, masked, bare; GGUF files, device maps, 8 bits
    load.py            load_lm
"""

from actcache.lm.hooks import ResolvedSite
from actcache.lm.language_model import LanguageModel
from actcache.lm.load import load_lm
from actcache.lm.survey import Listed

__all__ = ["LanguageModel", "Listed", "ResolvedSite", "load_lm"]
