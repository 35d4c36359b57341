"""The demo: a small base model, its recipe, its data, and the paper's experiment with them."""

from pathlib import Path

ASSETS = Path(__file__).parent / "assets"
ALIGNED = ("da", "de", "id", "it", "nl", "tr")  # have pairs with English in the aligned run
UNALIGNED = ("de-st", "sr")  # South Tyrolean, Serbian: seen by the base only
LANGUAGES = ("en", *ALIGNED, *UNALIGNED)
