"""Tables that look like measured ones, without a model."""

from __future__ import annotations

import dataclasses
import re

import numpy as np

from jaxalign.probe.table import HEALTH, PIVOTED, SCORES, Table, keyed

MANY = re.findall(
    r"\w+",
    """am ar az bn cy da de el en es fa fi fr he hi hu hy id is it ja jv ka km ko lv ml mn ms my
    sw th tl tr ur zh""",
)


def invented(
    systems=("base", "aligned"), poolings=("mean", "last"), layers=32, languages=MANY, seed=0
) -> Table:
    """A bump over the layers, languages of unequal strength, the last system better."""
    rng = np.random.default_rng(seed)
    s, p, g = len(systems), len(poolings), len(languages)
    depth = np.linspace(0, 1, layers + 1)
    strength = rng.uniform(0.15, 1, g)
    bump = np.exp(-(((depth - 0.5) / 0.28) ** 2))  # [L+1]
    pair = np.sqrt(np.outer(strength, strength)) * rng.uniform(0.8, 1, (g, g))
    pairs = {}
    for number, score in enumerate(SCORES):
        values = np.empty((s, p, layers + 1, g, g))
        for place in np.ndindex(s, p):
            values[place] = (
                bump[:, None, None] * pair * (0.8 + 0.05 * number) * (1 - 0.2 * place[1])
            )
            values[place] **= 1 - 0.4 * place[0] * depth[:, None, None]
        values += rng.normal(0, 0.004, values.shape)
        values[..., np.arange(g), np.arange(g)] = np.nan
        pairs[score] = np.clip(values, 0, 1)
    at = languages.index("en") if "en" in languages else 0
    pivoted = {}
    for number, name in enumerate(PIVOTED):
        pivoted[name] = np.clip(pairs["cosine"][..., at] * (0.9 + 0.05 * number), 0, 1)
    health = {name: rng.uniform(0.2, 0.3, (s, p, layers + 1)) for name in HEALTH}
    health["norm"] = 0.8 * 300 ** (depth + 0.1 * np.arange(s)[:, None, None]) + 0 * health["norm"]
    health["dimension"] = 40 * (1 + bump) + 0 * health["norm"]
    health["shuffled"] = rng.uniform(0, 0.002, (s, p, layers + 1))
    return Table(
        model="meta-llama/Llama-3-8B",
        corpus="data/ntrex",
        systems=tuple(systems),
        poolings=tuple(poolings),
        languages=tuple(languages),
        pivot=languages[at],
        sentences=dict.fromkeys(languages, 988),
        pairs=pairs,
        pivoted=pivoted,
        health=health,
        warnings={systems[0]: ["layer 0, cy: different sentences have cosine 0.991 on average"]},
        notes=(),
    )


def in_forms(forms=("raw", "standardised", "all_but_top")) -> Table:
    """States in several forms; massive activations in the blocks 2 to 5 of the first system."""
    table = invented(("base", "aligned"), ("mean",), 6, ["cy", "de", "en"], 3)
    for number, form in enumerate(forms[1:], 1):
        for score in SCORES:
            table.pairs[keyed(score, form)] = np.roll(table.pairs[score], number, axis=2) ** 0.5
        table.pivoted[keyed("mexa", form)] = np.roll(table.pivoted["mexa"], number, axis=2) ** 0.5
    table.health["largest"][0, :, 2:6] = table.health["cosine"][0, :, 2:6] = 0.95
    return dataclasses.replace(table, forms=forms)


def small() -> Table:
    """One system, one pooling, five layers and the embeddings, three languages."""
    return invented(("base",), ("mean",), 5, ["cy", "de", "en"], 1)


def bilingual() -> Table:
    """Pairs with English only, and German with French: most directions are not measured."""
    table = invented(("base", "aligned"), ("mean",), 6, ["cy", "de", "en", "fr", "qq", "sw"], 2)
    there = np.zeros((6, 6), bool)
    there[[0, 1, 3], 2] = there[2, [0, 1, 3]] = there[1, 3] = there[3, 1] = True
    for values in table.pairs.values():
        values[..., ~there] = np.nan
    for values in table.pivoted.values():
        values[..., [4, 5]] = np.nan
    table.health["shuffled"][:] = np.nan
    return table
