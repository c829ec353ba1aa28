"""What stands on the report page, in words: headline, key numbers, facts, code to go on with.

In: the content of `metrics.json`. Out: plain text and lists for the template. A part that the run did not produce is
empty, and the template leaves it out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from actcache import formats

Metrics = Mapping[str, Any]


def headline(metrics: Metrics) -> str:
    """The page's title: the result if there is one, otherwise what was made."""
    recovered = _known(metrics, "loss_recovered")
    name = _model(metrics).get("name", "the base model")
    if recovered:
        best, worst = formats.percent(max(recovered)), formats.percent(min(recovered))
        share = best if len(recovered) == 1 else f"{worst.removesuffix(' %')} to {best}"
        return f"{share} of the loss recovered in {name}"
    return f"Sparse MLPs on {name}" if metrics.get("layers") else f"Activations of {name}"


def lede(metrics: Metrics) -> str:
    """One or two sentences: what was cached, what was trained."""
    store, layers, sentences = metrics.get("store"), metrics.get("layers", []), []
    if store:
        n_sites = len(store["sites"])
        sites = f"{n_sites} sites were" if n_sites > 1 else "one site was"
        sentences.append(
            f"{formats.count(store['n_rows'])} rows of activations at {sites} cached in {formats.size(store['bytes'])}."
        )
    if layers:
        what, own = ("sparse MLPs were", "MLPs") if len(layers) > 1 else ("sparse MLP was", "MLP")
        done = (
            f" and put in place of the model's own {own}, on text that was held out"
            if _known(metrics, "spliced")
            else ""
        )
        sentences.append(f"On these rows {len(layers)} {what} trained{done}.")
    return " ".join(sentences)


def tiles(metrics: Metrics) -> list[dict[str, str]]:
    """Up to four key numbers."""
    found = []
    if recovered := _known(metrics, "loss_recovered"):
        mean = sum(recovered) / len(recovered)
        found.append(
            _tile(formats.percent(mean), "of the loss recovered", "mean over layers" if len(recovered) > 1 else "")
        )
    if l0 := _known(metrics, "l0"):
        found.append(_tile(formats.number(sum(l0) / len(l0)), "latents active per token", "mean L0"))
    if store := metrics.get("store"):
        spec = store["spec"]
        note = f"{formats.percent(store['compression_ratio'])} of raw {spec['dtype']}, codec {store['codec']}"
        found.append(_tile(f"{store['bytes_per_activation']:.2f} bytes", "per activation on disk", note))
    if seconds := metrics.get("seconds"):
        n_stages = len(metrics.get("stages", {}))
        found.append(
            _tile(formats.duration(seconds), "from text to this page", f"{n_stages} stages" if n_stages else "")
        )
    return found


def store_line(metrics: Metrics) -> str:
    """Bytes of the store, in a sentence."""
    if not (store := metrics.get("store")):
        return ""
    spec, spared = store["spec"], 1 - store["compression_ratio"]
    return (
        f"The store holds {formats.size(store['raw_bytes'])} of {spec['dtype']} activations in "
        f"{formats.size(store['bytes'])}, tokens, row table and checksums included: "
        f"{store['bytes_per_activation']:.2f} bytes per activation, {formats.percent(spared)} less than raw "
        f"(codec {store['codec']})."
    )


def stages(metrics: Metrics) -> list[dict[str, Any]]:
    """Stages in order, with their share of the time and their speeds as text."""
    recorded = metrics.get("stages", {})
    total = sum(stage["seconds"] for stage in recorded.values()) or 1.0
    return [
        {
            "name": name,
            "seconds": stage["seconds"],
            "share": stage["seconds"] / total,
            "rates": formats.rates(stage),
            "note": _reused(stage),
        }
        for name, stage in recorded.items()
    ]


def facts(metrics: Metrics) -> list[dict[str, Any]]:
    """Groups of named settings: model, text, store, training, machine, versions."""
    spec = metrics.get("store", {}).get("spec", {})
    store = {
        "path": metrics.get("store", {}).get("path"),
        "fingerprint": metrics.get("store", {}).get("fingerprint"),
        "codec": metrics.get("store", {}).get("codec"),
        **{name: spec.get(name) for name in ("dtype", "n_sequences", "sequence_length", "skip_first", "seed")},
        "shards": metrics.get("store", {}).get("n_shards"),
        "audit": "; ".join(formats.audit_lines(metrics.get("store", {}).get("provenance", {}))) or None,
    }
    machine = {**metrics.get("machine", {})}
    if "memory_bytes" in machine:
        machine["memory"] = formats.size(machine.pop("memory_bytes"))
    groups = {
        "Model": _model(metrics),
        "Text": metrics.get("text") or spec.get("text", {}),
        "Store": store,
        "Training": metrics.get("training", {}),
        "Machine": machine,
        "Versions": metrics.get("versions", {}),
    }
    named = {title: _entries(values) for title, values in groups.items()}
    return [{"title": title, "entries": entries} for title, entries in named.items() if entries]


def sites(metrics: Metrics) -> list[dict[str, str]]:
    """Each cached site with its width and size on disk, and its NaN and infinite values if it has any."""
    found = []
    for name, site in metrics.get("store", {}).get("sites", {}).items():
        width = " by ".join(map(str, site["shape"]))
        broken = f", {site['n_nan']:,} NaN" if site.get("n_nan") else ""
        broken += f", {site['n_inf']:,} infinite" if site.get("n_inf") else ""
        found.append({"name": name, "note": f"{width}, {formats.size(site['bytes'])}{broken}"})
    return found


def created(metrics: Metrics) -> str:
    """When the run ended, as a date in UTC."""
    if not (when := metrics.get("created")):
        return ""
    moment = datetime.fromisoformat(when).astimezone(UTC)
    return f"{moment.day} {moment:%B %Y, %H:%M} UTC"


def snippets(metrics: Metrics) -> list[dict[str, str]]:
    """Short programs that go on with the files of this run."""
    found, store = [], metrics.get("store")
    rows = [row for row in metrics.get("layers", []) if row.get("path")]
    if store:
        path, site = store["path"], next(iter(store["sites"]))
        pair = [rows[0]["site_in"], rows[0]["site_out"]] if rows else [site]
        found.append({"title": "Read activations", "code": _READ.format(path=path, site=site)})
        found.append(
            {
                "title": "Feed your own trainer",
                "code": _LOAD.format(path=path, pair=pair, site=pair[-1], rows=min(2048, store["n_rows"])),
            }
        )
    if rows:
        row = rows[0]
        code = _SPARSE.format(path=row["path"], site_in=row["site_in"], store=store["path"] if store else "acts.zarr")
        found.append({"title": "Take a sparse MLP further", "code": code})
    return found


_READ = """\
import actcache as ac

store = ac.open_store({path!r})
acts_ND = store.read({site!r}, slice(0, 4096))
store.stats({site!r}).mean
"""

_LOAD = """\
loader = ac.Loader(ac.open_store({path!r}), {pair!r}, batch_rows={rows}, seed=0)
for batch in loader:
    batch[{site!r}]  # ({rows}, D), shuffled, checked, yours to modify
    batch.rows  # ({rows},) which rows of the store they are
"""

_SPARSE = """\
mlp = ac.SparseMLP.load({path!r})
acts_ND = ac.open_store({store!r}).read({site_in!r}, slice(0, 4096)).float()
latents_NF = mlp.encode(acts_ND)
"""


def _tile(value: str, label: str, note: str) -> dict[str, str]:
    figure, _, unit = value.partition(" ")
    split = unit and " " not in unit
    return {"value": figure if split else value, "unit": unit if split else "", "label": label, "note": note}


def _known(metrics: Metrics, key: str) -> list[float]:
    return [row[key] for row in metrics.get("layers", []) if row.get(key) is not None]


def _model(metrics: Metrics) -> Mapping[str, Any]:
    found: Mapping[str, Any] = metrics.get("model") or metrics.get("store", {}).get("spec", {}).get("model", {})
    return found


def _entries(values: Mapping[str, Any]) -> list[tuple[str, Any]]:
    def kept(value: Any) -> bool:
        return value is not None and (not isinstance(value, Sequence | Mapping) or len(value) > 0)

    return [(name.replace("_", " "), value) for name, value in values.items() if kept(value)]


def _reused(stage: Metrics) -> str:
    if not stage.get("reused"):
        return ""
    made = stage.get("made_in_s")
    return f"reused, made in {formats.duration(made)}" if made else "reused"
