"""Warnings where the alignment loss cannot align, or works against itself.

Where any two sentences have nearly the same cosine, the softmax over candidates is uniform whatever
the weights do: the loss stays at ln(candidates) and its gradient vanishes. Nothing fails, and
nothing is learnt. Real LLMs with massive activations start like this.

Where a micro-batch has a sentence several times, as in data of few pairs, or where one sentence has
translations into many languages, the loss pushes a source away from copies of its own target.

    [*warnings(config, metrics)]                     # sentences
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from jaxalign.settings import Config

FLAT = 0.1  # cosines that deviate by less than this share of the temperature
MANY = 0.1  # share of pairs that meet a copy of their target
DEVIATION, DUPLICATES = (f"align/contrastive/{log}" for log in ("deviation", "duplicates"))


def warnings(config: Config, metrics: Mapping[str, Any]) -> Iterator[str]:
    """What to tell the user after the first alignment update.

    Args:
      config: names the temperature and the form of the states.
      metrics: of that update; waits for the device.
    """
    if DEVIATION not in metrics:  # another objective
        return
    align, further = config.align, dict[str, Any]()
    options: Mapping[str, Any] = align.options
    if align.objective != "contrastive":  # a further term may have options of its own
        named = (one for one in config.objectives if one.phase == "align")
        further = next((one.options for one in named if one.objective == "contrastive"), further)
        options = further
    if flat := _flat(config, float(metrics[DEVIATION]), further):
        yield flat
    copies = float(metrics[DUPLICATES])
    if copies > MANY and options.get("duplicates") != "mask":
        where = "the term's options" if further else "align.options"
        yield (
            f"warning: align: {copies:.0%} of the pairs meet a copy of their own target among the "
            f"wrong candidates; add duplicates: mask to {where}, or give more pairs"
        )


def _flat(config: Config, deviation: float, further: Mapping[str, Any]) -> str:
    """The sentence about a flat loss; '' where it is not."""
    align = config.align
    layer, temperature = (further.get(k, getattr(align, k)) for k in ("layer", "temperature"))
    if not deviation < FLAT * temperature:
        return ""
    if further:
        way_out = "give the term other options (objectives)"
    elif align.states != "standardised":
        way_out = "set align.states=standardised (or align.pooling=mean_rest, or both)"
    else:
        way_out = "lower align.temperature, or choose another align.layer"
    return (
        f"warning: align: cosines of different sentences at layer {layer} deviate by only "
        f"{deviation:.2g}, less than a tenth of {'' if further else 'align.'}temperature="
        f"{temperature}: the loss is almost flat and aligns little; {way_out}"
    )
