"""From files, hub datasets and TFDS to batches: two streams, task rows and sentence pairs.

from jaxalign.data.chat import load_tokenizer
from jaxalign.data.streams import pair_stream, task_stream

tokenizer = load_tokenizer("path/to/model")
tasks = task_stream(config, tokenizer, "train")
batch = tasks.batch(0)  # the same batch on every call, in every process
"""
