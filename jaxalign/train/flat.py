"""A warning where the alignment loss cannot align anything.

Where any two sentences have nearly the same cosine, the softmax over candidates is uniform whatever
the weights do: the loss stays at ln(candidates) and its gradient vanishes. Nothing fails, and
nothing is learnt. Real LLMs with massive activations start like this.

    warning(config, metrics)                         # a sentence, or None
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jaxalign.settings import Config

FLAT = 0.1  # cosines that deviate by less than this share of the temperature
DEVIATION = "align/contrastive/deviation"


def warning(config: Config, metrics: Mapping[str, Any]) -> str | None:
    """What to tell the user after the first alignment update; None where the loss is not flat.

    Args:
      config: names the temperature and the form of the states.
      metrics: of that update; waits for the device.
    """
    if DEVIATION not in metrics:  # another objective
        return None
    align, further = config.align, dict[str, Any]()
    if align.objective != "contrastive":  # a further term may have options of its own
        named = (one for one in config.objectives if one.phase == "align")
        further = next((one.options for one in named if one.objective == "contrastive"), further)
    deviation = float(metrics[DEVIATION])
    layer, temperature = (further.get(k, getattr(align, k)) for k in ("layer", "temperature"))
    if not deviation < FLAT * temperature:
        return None
    if further:
        way_out = "give the term other options (objectives)"
    elif align.states == "raw":
        way_out = "set align.states=standardised (or align.pooling=mean_rest, or both)"
    else:
        way_out = "lower align.temperature, or choose another align.layer"
    return (
        f"warning: align: cosines of different sentences at layer {layer} deviate by only "
        f"{deviation:.2g}, less than a tenth of {'' if further else 'align.'}temperature="
        f"{temperature}: the loss is almost flat and aligns little; {way_out}"
    )
