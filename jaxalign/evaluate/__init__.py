"""What a fine-tuned model writes, judged: scores per language, systems compared, tables drawn."""
