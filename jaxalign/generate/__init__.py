"""Answers: prompts of similar length share a batch, and compiled loops write its tokens.

    stops = stop_ids(spec, tokenizer)
    prompts = [list(ids) for ids in encode_prompts(examples, tokenizer)]
    answers = generate(decoder, params, lora, prompts, Decoding(128), stop_ids=stops)
    texts = tokenizer.batch_decode(answers, skip_special_tokens=True)

`answer_chunks` gives the same answers chunk by chunk, for a caller that keeps what is finished.
`weigh_chunks` writes nothing: it says how likely given answers are.
"""

from jaxalign.generate.choices import weigh_chunks, weighed
from jaxalign.generate.decoding import Decoding
from jaxalign.generate.run import answer_chunks, generate
from jaxalign.generate.shapes import chunks, lay_out
from jaxalign.generate.stops import stop_ids
from jaxalign.generate.system import System

__all__ = [
    "Decoding", "System", "answer_chunks", "chunks", "generate", "lay_out", "stop_ids",
    "weigh_chunks", "weighed",
]  # fmt: skip
