"""What is fuzzed: the readers of rows, files, settings, templates, tokenizers, models, answers."""

from __future__ import annotations

import gzip

from hypothesis import strategies as st

from tests.fuzz import configs, models, rows, talks
from tests.fuzz.judge import Target
from tests.fuzz.odd import changed, damaged

zipped = st.tuples(
    st.one_of(damaged(gzip.compress(rows.LINES, mtime=0)), damaged(rows.LINES)),
    st.sampled_from(["rows.jsonl.gz", "rows.jsonl", "rows.csv.gz", "rows.json.gz"]),
)
corpora = st.tuples(rows.lines, rows.lines, st.sampled_from(["\n", "\r\n"]))
three = st.tuples(talks.sentences, talks.sentences, talks.sentences)
predicted = st.tuples(models.predictions, st.sampled_from(["p.jsonl", "p.txt", "p.csv"]))

TARGETS = (
    Target("rows of every task", rows.records, rows.read_record, 3),
    Target("pairs", rows.pair_fields, rows.read_pair),
    Target("one answer behind two prompts", rows.behind_two, rows.read_prompts),
    Target("JSON lines", rows.json_lines, rows.read_lines, 2),
    Target("JSON lists", changed(rows.ROWS), rows.read_list),
    Target("CSV and TSV", rows.tables, rows.read_table, 2),
    Target("compressed files", zipped, rows.read_zipped),
    Target("Parquet", st.deferred(lambda: damaged(rows.parquet())), rows.read_parquet),
    Target("parallel text", corpora, rows.read_corpus),
    Target("rows as tokens", three, talks.read_tokens, 2),
    Target("pairs as tokens", st.tuples(talks.sentences, talks.sentences), talks.read_pair_tokens),
    Target("chat templates", talks.templates, talks.read_template, 0.05),
    Target("tokenizer folders", talks.tokenizer_folders(), talks.read_tokenizer, 0.2),
    Target("settings as words", configs.settings_words, configs.read_words, 0.5),
    Target("settings as YAML", configs.yamls, configs.read_yaml, 0.5),
    Target("jaxalign config", configs.settings_words, configs.read_command, 0.2),
    Target("config.json", changed(models.LLAMA) | changed(models.GEMMA), models.read_model, 2),
    Target("adapter_config.json", changed(models.ADAPTER), models.read_adapter, 2),
    Target("safetensors", models.safetensors_files(), models.read_weights, 2),
    Target("predictions", predicted, models.read_predicted),
    Target("cached answers", damaged(models.ANSWERED), models.read_answers),
)
